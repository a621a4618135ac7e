"""Levels of sound that is made piece by piece, whose peak is known only at its end."""

from __future__ import annotations

import torch
from torch import Tensor

_FADE_SECONDS = 0.25  # from one gain to another


class Leveller:
    """Turns down successive pieces of a sound where they are too loud, without a step between two.

    Attributes:
        least: smallest gain so far.
    """

    def __init__(self, sample_rate: int):
        """Begin a sound of `sample_rate` Hz."""
        self.least = self._gain = 1.0
        self._fade = round(_FADE_SECONDS * sample_rate)

    def levelled(self, piece: Tensor) -> Tensor:
        """Return the next (C, T) within -1..1."""
        wanted = 1 / max(float(piece.abs().max()), 1.0)
        gains = torch.full((piece.shape[1],), wanted)
        fade = min(self._fade, len(gains))
        gains[:fade] = torch.linspace(self._gain, wanted, fade)
        self._gain, self.least = wanted, min(self.least, wanted)
        return (piece * gains).clamp(-1, 1)
