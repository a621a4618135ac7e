"""Examples for diffusion networks: windows of cached latents, or crops of sound."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from stable_audio_lite.data.crops import Crops, epoch_index
from stable_audio_lite.data.latents import read_cache, read_index
from stable_audio_lite.representation import LatentRepresentation, Representation


class Examples(Protocol):
    """Training examples, each a function of its number and the seed."""

    def __len__(self) -> int:
        """How many items there are."""
        ...

    def draw(self, numbers: range, seed: int) -> dict[str, Any]:
        """Data x0 (B, ...), "seconds_start" and "seconds_total" (B,), and "captions" where there are any."""
        ...


@dataclass(frozen=True)
class Window:
    """A training example: normalised `latent` (C, window), one of the item's captions, and its timing in seconds."""

    latent: Tensor
    caption: str
    seconds_start: float
    seconds_total: float


class LatentWindows:
    """Windows of cached latents held in memory, as a network sees them.

    Where an item is shorter than the window, the rest is the VAE's latent of digital silence.

    Args:
        folders: what runs of `training.pre_encode` wrote; their items follow one another.
        latents: the representation whose latents they are, and whose windows.

    Raises:
        UserError: a folder is unfinished or of another VAE.
    """

    def __init__(self, folders: Sequence[str | Path], latents: LatentRepresentation):
        self.entries = [entry for folder in folders for entry in read_cache(folder, latents.hash)[1]]
        self.latents, self.frames = latents, latents.shape[1]
        self.frame_seconds = latents.hop / latents.sample_rate

    def __len__(self) -> int:
        return len(self.entries)

    def window(self, index: int, rng: random.Random) -> Window:
        """A uniformly placed window of item `index`, with one of its captions."""
        entry = self.entries[index]
        start = rng.randint(0, max(entry.latent.shape[1] - self.frames, 0))
        piece = self.latents.normalise(entry.latent[:, start : start + self.frames].float())
        if rest := self.frames - piece.shape[1]:
            piece = torch.cat((piece, self.latents.silence[:, -rest:]), 1)
        begin = entry.about.seconds_start + start * self.frame_seconds
        total = entry.about.seconds_start + entry.about.seconds
        return Window(piece, rng.choice(entry.about.captions), begin, total)

    def draw(self, numbers: range, seed: int) -> dict[str, Any]:
        """As `Examples`."""
        drawn = [self.window(epoch_index(n, len(self), seed), random.Random(f"{seed}/{n}")) for n in numbers]
        return {
            "x0": torch.stack([w.latent for w in drawn]),
            "captions": [w.caption for w in drawn],
            "seconds_start": torch.tensor([w.seconds_start for w in drawn]),
            "seconds_total": torch.tensor([w.seconds_total for w in drawn]),
        }


def latent_statistics(folders: Sequence[str | Path], encoder: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) per channel over all frames of several caches.

    Raises:
        UserError: a folder is unfinished or of another VAE than that with the hash `encoder`.
    """
    caches = [read_index(folder, encoder) for folder in folders]
    frames = torch.tensor([index.frames for index in caches], dtype=torch.float64)
    share = (frames / frames.sum())[:, None]
    means = torch.tensor([index.mean for index in caches], dtype=torch.float64)
    squares = torch.tensor([index.std for index in caches], dtype=torch.float64).square() + means.square()
    mean = (share * means).sum(0)
    return mean.float(), ((share * squares).sum(0) - mean.square()).sqrt().float()


class SoundExamples:
    """Crops of sound as `representation` has them, mixed to its channels."""

    def __init__(self, crops: Crops, representation: Representation, captioned: bool):
        self.crops, self.representation, self.captioned = crops, representation, captioned

    def __len__(self) -> int:
        return len(self.crops.items)

    def draw(self, numbers: range, seed: int) -> dict[str, Any]:
        """As `Examples`."""
        crops = [self.crops.crop(n) for n in numbers]
        audio = torch.stack([crop.audio for crop in crops])
        if self.representation.audio_channels == 1:
            audio = audio.mean(1, keepdim=True)
        examples: dict[str, Any] = {
            "x0": self.representation.encode(audio),
            "seconds_start": torch.tensor([crop.seconds_start for crop in crops]),
            "seconds_total": torch.tensor([crop.seconds_total for crop in crops]),
        }
        if self.captioned:
            pairs = zip(numbers, crops, strict=True)
            examples["captions"] = [random.Random(f"{seed}/{n}/caption").choice(crop.captions) for n, crop in pairs]
        return examples
