"""Exponential moving average of weights with power-law warm-up."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.shard import local

_POWER = 0.75  # of the warm-up


class EMA:
    """Exponential moving average of a module's floating-point state.

    The decay at step n is min(decay, 1 - (1 + n)^-0.75), so that early weights are forgotten quickly
    (Karras-style warm-up as in k-diffusion, which reaches 0.9999 after about 215,000 steps).
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.average: dict[str, Tensor] = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the average towards the module's weights after optimizer step `step` (from 0)."""
        decay = min(self.decay, 1 - (1 + step) ** -_POWER)
        current = module.state_dict()
        floating = [k for k, v in current.items() if v.is_floating_point()]
        average, weights = ([local(tensors[k]) for k in floating] for tensors in (self.average, current))
        torch._foreach_lerp_(average, weights, 1 - decay)
        for key in current.keys() - set(floating):
            self.average[key].copy_(current[key])
