"""Noise schedule, denoisers and samplers."""
