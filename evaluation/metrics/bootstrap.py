"""95 % bootstrap intervals (Efron 1979)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_RESAMPLES = 2000
_NORMAL = 1.96  # standard deviations that hold 95 %


def interval(
    values: Sequence[float] | np.ndarray, seed: int = 0, statistic: Callable[[np.ndarray], Any] = np.mean
) -> tuple[float, float]:
    """Percentile interval of a statistic of N `values`; NaN of a single one, which says nothing of others."""
    rng, known = np.random.default_rng(seed), np.asarray(values, float)
    if len(known) < 2:
        return math.nan, math.nan
    drawn = [statistic(known[rng.integers(len(known), size=len(known))]) for _ in range(_RESAMPLES)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def half_width(statistic: Callable[[Tensor], float], count: int, resamples: int, seed: int = 0) -> float:
    """Half the interval of a statistic of `count` sounds, given how often each is drawn (count,).

    By the standard deviation, for a distance of sounds drawn twice is larger than that of the sounds themselves: its
    percentiles would lie beside it.
    """
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(count, np.full(count, 1 / count), size=resamples)
    return _NORMAL * float(np.std([statistic(torch.from_numpy(draw)) for draw in draws], ddof=1))
