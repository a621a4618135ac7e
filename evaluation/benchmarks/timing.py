"""Wall times of several functions that take turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Spread:
    """Median and range of a figure measured several times."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise `values`, one or more."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.least:.3g} to {self.most:.3g})"


@dataclass(frozen=True)
class Timing:
    """Wall times in seconds of the runs of one function, and what the last run returned."""

    seconds: tuple[float, ...]
    output: Any

    @property
    def spread(self) -> Spread:
        """Median and range of the times."""
        return Spread.of(self.seconds)

    def rates(self, amount: float) -> tuple[float, ...]:
        """`amount` per second in each run."""
        return tuple(amount / seconds for seconds in self.seconds)

    def ratio(self, other: Timing) -> Spread:
        """Speed as a multiple of that of another function, turn by turn."""
        return Spread.of([theirs / own for own, theirs in zip(self.seconds, other.seconds, strict=True)])


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
