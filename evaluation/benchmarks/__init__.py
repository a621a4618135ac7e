"""Speed and memory, measured beside a peer or beside the machine itself."""
