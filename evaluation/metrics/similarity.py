"""Nearest training sounds and diversity, in the space of any embedder.

A generated sound whose embedding lies as close to a training sound as a copy does is one to listen to beside it: the
memorisation check of Evans et al. 2024 (arXiv 2402.04825).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.metrics.bootstrap import half_width
from evaluation.metrics.inputs import MetricInputs
from evaluation.result import MetricValue, Neighbour
from evaluation.sounds import Clip
from evaluation.store import Embedder

_QUERIES = 16  # sounds that are compared with all others at once: 64 MB of cosines for a million
_RESAMPLES = 100

Neighbours = tuple[Neighbour, ...]


def training_neighbours(
    inputs: MetricInputs, training: Sequence[Clip], embedder: Embedder
) -> tuple[dict[str, Neighbours], dict[str, Neighbours]]:
    """By the clips' keys, the training sounds closest to each generated sound and, as a yardstick, to each recording.

    A recording that is a training sound itself is no yardstick, and is left out.
    """
    known, paths = inputs.means(training, embedder), [clip.record.path for clip in training]
    learned = {clip.key for clip in training}
    held_out = [clip for clip in inputs.reference if clip.key not in learned]

    def closest(clips: Sequence[Clip]) -> dict[str, Neighbours]:
        near = nearest_sounds(inputs.means(clips, embedder), known, paths) if clips else []
        return {clip.key: own for clip, own in zip(clips, near, strict=True)}

    return closest(inputs.generated), closest(held_out)


def nearest_sounds(generated: Tensor, training: Tensor, paths: Sequence[str], k: int = 3) -> list[Neighbours]:
    """The `k` training sounds (M, D) at `paths` closest to each generated one (N, D), closest first, or all if fewer.

    Raises:
        ValueError: the shapes don't fit each other.
    """
    if generated.ndim != 2 or training.ndim != 2 or generated.shape[1] != training.shape[1]:
        raise ValueError(f"expected (N, D) and (M, D), got {tuple(generated.shape)} and {tuple(training.shape)}")
    if len(paths) != len(training) or k < 1:
        raise ValueError(f"expected a path for each of {len(training)} sounds and k >= 1, got {len(paths)} and {k}")
    found, known = [], F.normalize(training.float(), dim=1)
    for queries in F.normalize(generated.float(), dim=1).split(_QUERIES):
        cosines, rows = (queries @ known.T).clamp(-1, 1).topk(min(k, len(known)), dim=1)
        for values, indices in zip(cosines.tolist(), rows.tolist(), strict=True):
            found.append(tuple(Neighbour(paths[i], value) for i, value in zip(indices, values, strict=True)))
    return found


def vendi_score(embeddings: Tensor, weights: Tensor | None = None) -> float:
    """The number of sounds with nothing in common that would be as diverse as (N, D) embeddings: between 1 and N.

    The exponential of the entropy of the eigenvalues of the cosines' matrix over N (Friedman & Dieng 2023, arXiv
    2210.02410); with `weights` (N,) that sum to 1, some sounds count more. In float64.

    Raises:
        ValueError: there are none, or one is zero.
    """
    if embeddings.ndim != 2 or not len(embeddings) or not bool(embeddings.any(1).all()):
        raise ValueError(f"expected (N, D) embeddings that are not zero, got {tuple(embeddings.shape)}")
    rows = F.normalize(embeddings.double(), dim=1)
    shares = torch.full((len(rows),), 1 / len(rows)) if weights is None else weights
    rows = rows * shares.to(rows).sqrt()[:, None]
    # Both products have the same eigenvalues but for zeros.
    values = torch.linalg.eigvalsh(rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows).clamp_min(0)
    return float(torch.special.entr(values).sum().exp())


def diversity(generated: Tensor, reference: Tensor | None = None, seed: int = 0) -> MetricValue:
    """The Vendi score of (N, D) embeddings, and as its baseline that of the (M, D) of the reference.

    It grows with the number of sounds, so both are of as many, drawn at random where one side has more. Resampled sets
    hold sounds twice and are less diverse than the set itself, so the interval is as wide as theirs, around the value.

    Raises:
        ValueError: as `vendi_score`.
    """
    count = len(generated) if reference is None else min(len(generated), len(reference))
    rng = np.random.default_rng(seed)
    made, real = (
        None if side is None else side[np.sort(rng.permutation(len(side))[:count])] for side in (generated, reference)
    )
    assert made is not None
    value = vendi_score(made)
    half = half_width(lambda draw: vendi_score(made, draw / count), count, _RESAMPLES, seed)
    return MetricValue(
        name="diversity",
        value=value,
        low=max(1.0, value - half),
        high=min(float(count), value + half),
        n=count,
        baselines={} if real is None else {"real": vendi_score(real)},
    )
