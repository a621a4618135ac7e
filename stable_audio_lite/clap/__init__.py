"""CLAP: one space for texts and sounds, and the text features that generators read; `checkpoints` loads any source."""
