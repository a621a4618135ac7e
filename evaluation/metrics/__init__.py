"""Definitions of what is measured: in single sounds, between sets of embeddings, and as metrics with baselines."""
