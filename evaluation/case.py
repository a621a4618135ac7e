"""What a metric is taken of, and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evaluation.embedders import Embedder
from evaluation.embedding import Rows, Store
from evaluation.frechet import Gaussian
from evaluation.result import Figure, Missing, partners
from evaluation.sounds import Clip


@dataclass(frozen=True)
class Case:
    """What metrics are taken of, all of it embedded.

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

    def rows(self, clips: Sequence[Clip], embedder: Embedder) -> Rows:
        """All embeddings of clips, on the disk."""
        return Rows(self._read(clip, embedder)["embedding"] for clip in clips)

    def means(self, clips: Sequence[Clip], embedder: Embedder, part: str = "embedding") -> Tensor:
        """The mean of each clip's windows, (clips, D)."""
        return torch.stack([self._read(clip, embedder)[part].mean(0) for clip in clips])

    def _read(self, clip: Clip, embedder: Embedder) -> dict[str, Tensor]:
        found = self.store.read(clip, embedder)
        if found is None:
            where = f"the embedding of {clip.sound.path} is not in {self.store.folder}"
            raise Missing(f"{where}; run again, on several machines with a --cache that all of them share")
        return found

    def pairs(self) -> list[tuple[Clip, Clip]]:
        """Generated sounds with the recordings of their prompts or names."""
        clips = {clip.sound.path: clip for clip in self.reference}
        found = partners([clip.sound for clip in self.generated], [clip.sound for clip in self.reference])
        return [(g, clips[sound.path]) for g, sound in zip(self.generated, found, strict=True) if sound]


def halves(clips: Sequence[Clip], keys: Sequence[str] | None = None) -> tuple[list[Clip], list[Clip]]:
    """The same two whatever the files are called: alternately, in the order of their hashes, or of `keys`."""
    named = zip(keys or [clip.key for clip in clips], range(len(clips)), strict=True)
    ordered = [clips[index] for _, index in sorted(named)]
    return ordered[::2], ordered[1::2]


@dataclass(frozen=True)
class Measured:
    """A figure, and a row for each thing beside it: metric, beside, value, low, high, n."""

    figure: Figure
    rows: list[dict[str, Any]]
