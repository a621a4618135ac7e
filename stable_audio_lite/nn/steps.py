"""Sinusoidal features of diffusion step indices."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def step_features(t: Tensor, width: int, base: float) -> Tensor:
    """Cosines and sines, (B, width) float32 with an even width, of step indices t (B,), fractions allowed.

    Their frequencies fall geometrically from 1 to nearly 1 / base (Vaswani et al. 2017): the slowest wave has a period
    of about 2 pi base steps.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(base) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angles = t.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
