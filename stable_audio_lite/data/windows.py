"""Windows of one length from cached latents: what the U-Net is trained on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stable_audio_lite.data.latents import CacheIndex, read_cache


@dataclass(frozen=True)
class Window:
    """A training example: standardised `latent` (C, window), one of the item's captions, and its timing in seconds.

    The first `frames` frames are the item's, the rest is silence.
    """

    latent: Tensor
    frames: int
    caption: str
    seconds_start: float
    seconds_total: float


class LatentWindows:
    """Windows of `frames` frames from cached latents held in memory, normalised to unit variance per channel.

    Where an item is shorter than the window, the rest is `silence`'s latent: what the VAE gives for digital silence.

    Args:
        folders: what runs of `training.pre_encode` wrote; their items follow one another.
        frames: length of a window.
        silence: latent (C, window) of silence, not normalised.
        encoder: hash of the VAE encoder whose decoder generation will use.
        frame_seconds: seconds per latent frame.
        statistics: mean and standard deviation (C,) to normalise by; those of all frames where None.

    Raises:
        UserError: a folder is unfinished or of another VAE.
    """

    def __init__(
        self,
        folders: Sequence[str | Path],
        frames: int,
        silence: Tensor,
        encoder: str,
        frame_seconds: float,
        statistics: tuple[Tensor, Tensor] | None = None,
    ):
        caches = [read_cache(folder, encoder) for folder in folders]
        self.items = sum(index.items for index, _ in caches)
        self.entries = [entry for _, entries in caches for entry in entries]
        self.mean, self.std = statistics or _pooled([index for index, _ in caches])
        self.frames, self.frame_seconds, self.silence = frames, frame_seconds, self._normal(silence)

    def __len__(self) -> int:
        return len(self.entries)

    def window(self, index: int, rng: random.Random) -> Window:
        """A uniformly placed window of item `index`, with one of its captions."""
        entry = self.entries[index]
        start = rng.randint(0, max(entry.latent.shape[1] - self.frames, 0))
        return self.cut(index, start, rng.choice(entry.about.captions))

    def cut(self, index: int, start: int, caption: str) -> Window:
        """The window of item `index` that begins with frame `start`."""
        entry = self.entries[index]
        piece = self._normal(entry.latent[:, start : start + self.frames].float())
        frames = piece.shape[1]
        if rest := self.frames - frames:
            piece = torch.cat((piece, self.silence[:, -rest:]), 1)
        begin = entry.about.seconds_start + start * self.frame_seconds
        return Window(piece, frames, caption, begin, entry.about.seconds_start + entry.about.seconds)

    def _normal(self, latent: Tensor) -> Tensor:
        return (latent - self.mean[:, None]) / self.std[:, None]


def stack(windows: list[Window]) -> dict[str, Any]:
    """Latents x0 (B, C, T), the frames that are no padding (B,), captions, and timing (B,) of a batch."""
    return {
        "x0": torch.stack([w.latent for w in windows]),
        "frames": torch.tensor([w.frames for w in windows]),
        "captions": [w.caption for w in windows],
        "seconds_start": torch.tensor([w.seconds_start for w in windows]),
        "seconds_total": torch.tensor([w.seconds_total for w in windows]),
    }


def _pooled(caches: list[CacheIndex]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) over the frames of several caches."""
    frames = torch.tensor([index.frames for index in caches], dtype=torch.float64)
    share = (frames / frames.sum())[:, None]
    means = torch.tensor([index.mean for index in caches], dtype=torch.float64)
    squares = torch.tensor([index.std for index in caches], dtype=torch.float64).square() + means.square()
    mean = (share * means).sum(0)
    return mean.float(), ((share * squares).sum(0) - mean.square()).sqrt().float()
