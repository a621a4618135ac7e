"""Fréchet distances of any embedder, with their intervals and what they are for real recordings, noise and a VAE.

Baselines are between halves: of the recordings, of noise or of what a VAE makes of them, and of the generated sounds,
each half against the recordings of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from evaluation.metrics.bootstrap import half_width
from evaluation.metrics.frechet import EmbeddingRows, Gaussian, frechet_distance, frechet_infinity
from evaluation.metrics.inputs import CalibratedMetric, MetricInputs, halves
from evaluation.result import MetricValue, Missing, different_settings
from evaluation.sounds import Clip
from evaluation.store import Embedder

_RESAMPLES, _RESAMPLES_INFINITE = 100, 40
_SIZES, _SIZES_RESAMPLED = 15, 5  # numbers of sounds from which a distance is extrapolated

_Distance = Callable[[EmbeddingRows, Gaussian, Tensor | None], float]


def _plain(rows: EmbeddingRows, real: Gaussian, weights: Tensor | None = None) -> float:
    return frechet_distance(rows.gaussian(weights), real)


def _infinite(rows: EmbeddingRows, real: Gaussian, weights: Tensor | None = None) -> float:
    rng, count = np.random.default_rng(0), len(rows.counts)

    def draw(number: int) -> Gaussian:
        if weights is not None:
            return rows.gaussian(torch.from_numpy(rng.multinomial(number, weights.numpy() / count)))
        chosen = torch.zeros(count)
        chosen[torch.from_numpy(rng.permutation(count)[:number])] = 1
        return rows.gaussian(chosen)

    return frechet_infinity(draw, count, real, _SIZES if weights is None else _SIZES_RESAMPLED)


def frechet_metric(metric: str, embedder: Embedder, inputs: MetricInputs) -> CalibratedMetric:
    """The distance of all generated sounds to all recordings, or to statistics; "fd_inf_..." is extrapolated.

    Raises:
        Missing: there are fewer than two of either, or the statistics are of another embedder.
    """
    if len(inputs.generated) < 2:
        raise Missing(f"needs at least 2 generated sounds, got {len(inputs.generated)}")
    if inputs.statistics is None and len(inputs.reference) < 2:
        raise Missing("needs at least 2 recordings; give REFERENCE, their folder or a .npz of statistics")
    infinite = metric.startswith("fd_inf")
    distance: _Distance = _infinite if infinite else _plain
    with inputs.rows(inputs.generated, embedder) as made:
        real = _reference(inputs, embedder, made.width)
        value, n = distance(made, real, None), sum(made.counts)
        resamples = _RESAMPLES_INFINITE if infinite else _RESAMPLES
        half = half_width(lambda weights: distance(made, real, weights), len(made.counts), resamples)
    rows = _baselines(inputs, embedder, distance, real)
    found = MetricValue(
        name=metric,
        value=value,
        low=value - half if infinite else max(0.0, value - half),
        high=value + half,
        n=n,
        unit=embedder.unit,
        higher_is_better=False,
        baselines={name: baseline for name, (baseline, _) in rows.items()},
    )
    table = [{"metric": metric, "baseline": name, "value": value, "n": size} for name, (value, size) in rows.items()]
    return CalibratedMetric(found, table)


def _reference(inputs: MetricInputs, embedder: Embedder, width: int) -> Gaussian:
    """The recordings' Gaussian, or the statistics in their place, which must be of this embedder."""
    if inputs.statistics is None:
        return _gaussian(inputs, inputs.reference, embedder)
    own = {"name": embedder.name, **embedder.settings}
    if other := different_settings(inputs.statistics_settings or own, own):
        told = ", ".join(f"{key} ({one} and {mine})" for key, (one, mine) in other.items())
        raise Missing(f"the statistics were made with other settings: {told}; make them with --save-statistics")
    if len(inputs.statistics.mean) != width:
        raise Missing(f"the statistics are of {len(inputs.statistics.mean)} dimensions, this embedder gives {width}")
    return inputs.statistics


def _gaussian(inputs: MetricInputs, clips: Sequence[Clip], embedder: Embedder) -> Gaussian:
    with inputs.rows(clips, embedder) as rows:
        return rows.gaussian()


def _baselines(
    inputs: MetricInputs, embedder: Embedder, distance: _Distance, real: Gaussian
) -> dict[str, tuple[float, int]]:
    """Each baseline's distance, and of how many sounds it is."""

    def apart(clips: Sequence[Clip], others: Gaussian) -> float:
        with inputs.rows(clips, embedder) as rows:
            return distance(rows, others, None)

    if inputs.statistics is not None:
        return {"noise": (apart(inputs.noise, real), len(inputs.noise))}
    if not (groups := _split(inputs)):
        return {}
    first, second = (_gaussian(inputs, clips, embedder) for clips in halves(inputs.reference))
    return {name: ((apart(one, second) + apart(two, first)) / 2, len(one)) for name, (one, two) in groups.items()}


def _split(inputs: MetricInputs) -> dict[str, tuple[list[Clip], list[Clip]]]:
    """Halves of equally many sounds, each to be compared with the recordings of the other half, which none is made of.

    The distance grows as sounds get fewer, and is small between a recording and what is made of it: only like this do
    baselines compare with each other. A group that has fewer than two sounds in a half is left out.
    """
    groups = {"real halves": halves(inputs.reference), "generated halves": _halves_of_generated(inputs)}
    for name, clips in (("noise", inputs.noise), ("vae", inputs.vae)):
        if clips:
            groups[name] = halves(clips, [clip.key for clip in inputs.reference])
    groups = {name: pair for name, pair in groups.items() if min(map(len, pair)) >= 2}
    count = min((len(half) for pair in groups.values() for half in pair), default=0)
    return {name: (one[:count], two[:count]) for name, (one, two) in groups.items()}


def _halves_of_generated(inputs: MetricInputs) -> tuple[list[Clip], list[Clip]]:
    """Each sound in the half that its prompt's recording is in, so that it is compared with the others."""
    first, second = ({clip.key for clip in half} for half in halves(inputs.reference))
    partner = {generated.record.path: recorded.key for generated, recorded in inputs.pairs()}
    one: list[Clip] = []
    two: list[Clip] = []
    for clip in inputs.generated:
        key = partner.get(clip.record.path)
        fewer = one if len(one) <= len(two) else two
        (one if key in first else two if key in second else fewer).append(clip)
    return one, two
