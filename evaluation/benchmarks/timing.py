"""Wall times of several functions that take turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Wall times in seconds of the runs of one function, and what the last run returned."""

    seconds: tuple[float, ...]
    output: Any

    @property
    def minimum(self) -> float:
        """The least time, which other work on the machine disturbs least."""
        return min(self.seconds)

    def __str__(self) -> str:
        median = statistics.median(self.seconds)
        return f"{self.minimum:.3f} s (median {median:.3f}, most {max(self.seconds):.3f})"


def time_in_turns(runs: Sequence[Callable[[], Any]], repeats: int, warmups: int = 1) -> list[Timing]:
    """Time `repeats` rounds in which each of `runs` is called once, after `warmups` rounds that don't count."""
    seconds: list[list[float]] = [[] for _ in runs]
    outputs: list[Any] = [None] * len(runs)
    for turn in range(warmups + repeats):
        for index, run in enumerate(runs):
            start = time.perf_counter()
            outputs[index] = run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmups:
                seconds[index].append(time.perf_counter() - start)
    return [Timing(tuple(own), output) for own, output in zip(seconds, outputs, strict=True)]
