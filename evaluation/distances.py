"""Fréchet distances of any embedder, with their intervals and what they are for real recordings, noise and a VAE.

What stands beside is between halves: of the recordings, of noise or of what a VAE makes of them, and of the generated
sounds, each half against the recordings of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from evaluation.bootstrap import spread
from evaluation.case import Case, Measured, halves
from evaluation.embedders import Embedder
from evaluation.embedding import Rows
from evaluation.frechet import Gaussian, frechet_distance, frechet_infinity
from evaluation.result import Figure, Missing, different_settings
from evaluation.sounds import Clip

_RESAMPLES, _RESAMPLES_INFINITE = 100, 40
_SIZES, _SIZES_RESAMPLED = 15, 5  # numbers of sounds from which a distance is extrapolated

_Distance = Callable[[Rows, Gaussian, Tensor | None], float]


def _plain(rows: Rows, real: Gaussian, weights: Tensor | None = None) -> float:
    return frechet_distance(rows.gaussian(weights), real)


def _infinite(rows: Rows, real: Gaussian, weights: Tensor | None = None) -> float:
    rng, count = np.random.default_rng(0), len(rows.counts)

    def draw(number: int) -> Gaussian:
        if weights is not None:
            return rows.gaussian(torch.from_numpy(rng.multinomial(number, weights.numpy() / count)))
        chosen = torch.zeros(count)
        chosen[torch.from_numpy(rng.permutation(count)[:number])] = 1
        return rows.gaussian(chosen)

    return frechet_infinity(draw, count, real, _SIZES if weights is None else _SIZES_RESAMPLED)


def frechet(metric: str, embedder: Embedder, case: Case) -> Measured:
    """The distance of all generated sounds to all recordings, or to statistics; "fd_inf_..." is extrapolated.

    Raises:
        Missing: there are fewer than two of either, or the statistics are of another embedder.
    """
    if len(case.generated) < 2:
        raise Missing(f"needs at least 2 generated sounds, got {len(case.generated)}")
    if case.statistics is None and len(case.reference) < 2:
        raise Missing("needs at least 2 recordings; give REFERENCE, their folder or a .npz of statistics")
    infinite = metric.startswith("fd_inf")
    distance: _Distance = _infinite if infinite else _plain

    def gaussian(clips: Sequence[Clip]) -> Gaussian:
        with case.rows(clips, embedder) as rows:
            return rows.gaussian()

    def apart(clips: Sequence[Clip], others: Gaussian) -> float:
        with case.rows(clips, embedder) as rows:
            return distance(rows, others, None)

    with case.rows(case.generated, embedder) as made:
        real = gaussian(case.reference) if case.statistics is None else _checked(case, embedder, made.width)
        value, n = distance(made, real, None), sum(made.counts)
        resamples = _RESAMPLES_INFINITE if infinite else _RESAMPLES
        half = spread(lambda weights: distance(made, real, weights), len(made.counts), resamples)
    beside, sizes = {}, {}
    if case.statistics is not None:
        beside, sizes = {"noise": apart(case.noise, real)}, {"noise": len(case.noise)}
    elif groups := _split(case):
        first, second = (gaussian(clips) for clips in halves(case.reference))
        beside = {name: (apart(one, second) + apart(two, first)) / 2 for name, (one, two) in groups.items()}
        sizes = {name: len(one) for name, (one, _) in groups.items()}
    figure = Figure(
        name=metric,
        value=value,
        low=value - half if infinite else max(0.0, value - half),
        high=value + half,
        n=n,
        unit=embedder.unit,
        higher_is_better=False,
        beside=beside,
    )
    rows = [{"metric": metric, "beside": name, "value": there, "n": sizes[name]} for name, there in beside.items()]
    return Measured(figure, rows)


def _split(case: Case) -> dict[str, tuple[list[Clip], list[Clip]]]:
    """Halves of equally many sounds, each to be compared with the recordings of the other half, which none is made of.

    The distance grows as sounds get fewer, and is small between a recording and what is made of it: only like this does
    what stands beside a figure compare. What has fewer than two sounds in a half is left out.
    """
    groups = {"real halves": halves(case.reference), "generated halves": _halves_of_generated(case)}
    for name, clips in (("noise", case.noise), ("vae", case.vae)):
        if clips:
            groups[name] = halves(clips, [clip.key for clip in case.reference])
    groups = {name: pair for name, pair in groups.items() if min(map(len, pair)) >= 2}
    count = min((len(half) for pair in groups.values() for half in pair), default=0)
    return {name: (one[:count], two[:count]) for name, (one, two) in groups.items()}


def _halves_of_generated(case: Case) -> tuple[list[Clip], list[Clip]]:
    """Each sound in the half that its prompt's recording is in, so that it is compared with the others."""
    first, second = ({clip.key for clip in half} for half in halves(case.reference))
    partner = {generated.sound.path: recorded.key for generated, recorded in case.pairs()}
    one: list[Clip] = []
    two: list[Clip] = []
    for clip in case.generated:
        key = partner.get(clip.sound.path)
        fewer = one if len(one) <= len(two) else two
        (one if key in first else two if key in second else fewer).append(clip)
    return one, two


def _checked(case: Case, embedder: Embedder, width: int) -> Gaussian:
    """The statistics, which must be of this embedder."""
    assert case.statistics is not None
    own = {"name": embedder.name, **embedder.settings}
    if other := different_settings(case.statistics_settings or own, own):
        told = ", ".join(f"{key} ({one} and {mine})" for key, (one, mine) in other.items())
        raise Missing(f"the statistics were made with other settings: {told}; make them with --save-statistics")
    if len(case.statistics.mean) != width:
        raise Missing(f"the statistics are of {len(case.statistics.mean)} dimensions, this embedder gives {width}")
    return case.statistics
