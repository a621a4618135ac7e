"""CLAP: one embedding space for texts and sounds, and text features for generators; `checkpoints` loads any source."""
