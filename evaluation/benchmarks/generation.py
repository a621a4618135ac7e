"""Speed of whole generation, warm, by number type and steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from evaluation.benchmarks.table import Row
from evaluation.benchmarks.timing import Spread, time_in_turns
from stable_audio_lite.pipeline import StableAudio

_PROMPT = "solo piano, slow, classical"


def generation_rows(
    bundle: str,
    lengths: Sequence[float],
    steps: Sequence[int],
    device: str,
    dtypes: Sequence[torch.dtype],
    repeats: int,
) -> Iterator[Row]:
    """Time one sound of each length in each number of steps, which take turns; no steps: the model's own.

    Raises:
        UserError: there is no such bundle, or a number of steps is out of range.
    """
    for dtype in dtypes:
        yield from _rows(StableAudio.from_pretrained(bundle, device, dtype), lengths, steps, repeats)


def _rows(model: StableAudio, lengths: Sequence[float], steps: Sequence[int], repeats: int) -> Iterator[Row]:
    prompt = _PROMPT if model.conditioner else None
    counts = dict.fromkeys(steps or [model.config.generation.steps])
    cases = list(itertools.product(dict.fromkeys(lengths), counts))
    runs = [partial(model.generate, prompt, seconds=seconds, steps=count, seed=0) for seconds, count in cases]
    for (seconds, count), timing in zip(cases, time_in_turns(runs, repeats), strict=True):
        how = f"{str(model.dtype).removeprefix('torch.')}, {count} steps, {seconds:g} s"
        figure = Spread.of(timing.rates(seconds))
        yield Row(part="generate", what="generate", how=how, unit="x real time", figure=figure)
