"""The embedded sounds that metrics are taken of, and metrics with their baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.metrics.bootstrap import interval
from evaluation.metrics.frechet import EmbeddingRows, Gaussian
from evaluation.result import MetricValue, Missing, partners
from evaluation.sounds import Clip
from evaluation.store import Embedder, Store


@dataclass(frozen=True)
class MetricInputs:
    """Clips of every kind, all of them embedded.

    Attributes:
        generated: the sounds under test.
        reference: recordings; may be none.
        noise: white noise as long as the recordings, or as the generated sounds where there are none.
        vae: what a VAE makes of each recording; () where none was given.
        store: holds the embeddings.
        statistics: of other recordings, for Fréchet distances in the place of `reference`.
        statistics_settings: of the embedder that they were made with, where that is known.
    """

    generated: Sequence[Clip]
    reference: Sequence[Clip]
    noise: Sequence[Clip]
    vae: Sequence[Clip]
    store: Store
    statistics: Gaussian | None = None
    statistics_settings: dict[str, Any] | None = None

    def rows(self, clips: Sequence[Clip], embedder: Embedder) -> EmbeddingRows:
        """All embeddings of clips, on the disk."""
        return EmbeddingRows(self._read(clip, embedder)["embedding"] for clip in clips)

    def means(self, clips: Sequence[Clip], embedder: Embedder, part: str = "embedding") -> Tensor:
        """The mean of each clip's windows, (clips, D)."""
        return torch.stack([self._read(clip, embedder)[part].mean(0) for clip in clips])

    def _read(self, clip: Clip, embedder: Embedder) -> dict[str, Tensor]:
        found = self.store.read(clip, embedder)
        if found is None:
            where = f"the embedding of {clip.record.path} is not in {self.store.folder}"
            raise Missing(f"{where}; run again, on several machines with a --cache that all of them share")
        return found

    def pairs(self) -> list[tuple[Clip, Clip]]:
        """Generated sounds with the recordings of their prompts or names."""
        clips = {clip.record.path: clip for clip in self.reference}
        found = partners([clip.record for clip in self.generated], [clip.record for clip in self.reference])
        return [(g, clips[record.path]) for g, record in zip(self.generated, found, strict=True) if record]


def halves(clips: Sequence[Clip], keys: Sequence[str] | None = None) -> tuple[list[Clip], list[Clip]]:
    """Split alternately, in the order of the clips' hashes or of `keys`: the same whatever files are called."""
    named = zip(keys or [clip.key for clip in clips], range(len(clips)), strict=True)
    ordered = [clips[index] for _, index in sorted(named)]
    return ordered[::2], ordered[1::2]


@dataclass(frozen=True)
class CalibratedMetric:
    """A metric's value, and a row for each of its baselines: metric, baseline, value, n, perhaps low and high."""

    value: MetricValue
    rows: list[dict[str, Any]]


def mean_metric(
    name: str, values: Any, baselines: dict[str, Any], higher_is_better: bool | None = None, least: float = -np.inf
) -> CalibratedMetric:
    """The mean of (N,) values of single sounds, and of those of each baseline that has any.

    What lies below `least`, as rounding or an epsilon may, is that.
    """
    rows: list[dict[str, Any]] = []
    for baseline, known in {"": values, **baselines}.items():
        if len(known):
            numbers = np.maximum((np.mean(known), *interval(known)), least).tolist()  # leaves NaN what it is
            own = dict(zip(("value", "low", "high"), numbers, strict=True))
            rows.append({"metric": name, "baseline": baseline, **own, "n": len(known)})
    first = {key: rows[0][key] for key in ("value", "low", "high", "n")}
    means = {row["baseline"]: row["value"] for row in rows[1:]}
    return CalibratedMetric(
        MetricValue(name=name, **first, higher_is_better=higher_is_better, baselines=means), rows[1:]
    )
