"""Random draws keyed by an item's number in the run, not by the process that happens to train on it.

One process with a doubled batch therefore sees what two see, and a resumed run what an uninterrupted one does.
"""

from __future__ import annotations

import torch
from torch import Tensor


def generator(seed: int, *numbers: int) -> torch.Generator:
    """A generator on the CPU for the draws named by `numbers`."""
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % 2**61
    return torch.Generator().manual_seed(seed)


def item_noise(seed: int, numbers: range, shape: tuple[int, ...]) -> Tensor:
    """Draw normal noise (len(numbers), *shape), each item's keyed by its number."""
    return torch.stack([torch.randn(shape, generator=generator(seed, number)) for number in numbers])
