"""Speed and memory, each a command: `python -m evaluation.benchmarks.NAME`."""
