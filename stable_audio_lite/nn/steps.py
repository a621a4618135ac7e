"""Sinusoidal features of diffusion step indices."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def step_features(t: Tensor, width: int, base: float) -> Tensor:
    """Cosines and sines at frequencies that fall geometrically from 1 to nearly 1 / base (Vaswani et al. 2017).

    Args:
        t: (B,) step indices, fractions allowed.
        width: features, an even number.
        base: of the frequencies; the slowest wave has a period of about 2 pi base steps.

    Returns:
        (B, width) float32.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(base) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angles = t.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
