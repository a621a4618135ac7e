"""Measurements, each a command: `python -m evaluation.NAME`."""
