"""One HTML page for one result: `python -m evaluation.report`."""
