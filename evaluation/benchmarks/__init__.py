"""Speed and memory of a model on this machine, in one table: `python -m evaluation.benchmarks`."""
