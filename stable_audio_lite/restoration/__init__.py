"""Restoration of recordings by DDRM: degradations, their linear operators, the sampler and the restorer."""
