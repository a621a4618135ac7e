"""Repair of recordings by DDRM: what went wrong, as operators, and the sampler."""
