"""Examples for diffusion networks: windows of cached latents, or crops of sound."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from stable_audio_lite.data.crops import Crops, epoch_index, item_numbers
from stable_audio_lite.data.latents import CachedLatent, read_cache, read_index
from stable_audio_lite.edits import ENDING_FRAMES
from stable_audio_lite.representation import LatentRepresentation, Representation


class Examples(Protocol):
    """Training examples.

    A batch is data x0 (B, ...), "seconds_start" and "seconds_total" (B,), and "captions" where there are any.
    """

    @property
    def captions(self) -> list[str]:
        """Every caption of every item."""
        ...

    def __len__(self) -> int:
        """Count the items."""
        ...

    def batch(self, number: int, rank: int, world: int, size: int, seed: int) -> dict[str, Any]:
        """Draw the share of process `rank` in the `number`-th batch, `size` items in each of `world` processes.

        All processes together draw what one would with `size * world` items.
        """
        ...

    def draw(self, numbers: range, seed: int) -> dict[str, Any]:
        """Draw the examples with these numbers, each a function of its own number and the seed."""
        ...


class Buckets:
    """Items by the length of the window that they are seen in: all of a batch are seen in one length.

    Args:
        frames: of each item.
        lengths: of windows, the longest last.
    """

    def __init__(self, frames: Iterable[int], lengths: Sequence[int]):
        self._items: dict[int, list[int]] = {}
        for index, count in enumerate(frames):
            fitting = (length for length in lengths if count + ENDING_FRAMES <= length)
            self._items.setdefault(next(fitting, lengths[-1]), []).append(index)

    def batch(self, number: int, size: int, seed: int) -> tuple[int, list[int]]:
        """Window length and items of the `number`-th batch of `size`; every epoch visits all, each in its own order."""
        epoch, place = divmod(number, len(self._epoch(0, size, seed)))
        return self._epoch(epoch, size, seed)[place]

    @lru_cache(maxsize=4)  # noqa: B019 (as long-lived as the run)
    def _epoch(self, epoch: int, size: int, seed: int) -> list[tuple[int, list[int]]]:
        """Window length and items of each batch of an epoch.

        What is left of a length that fills no batch goes with the next longer one; a few items of the longest are drawn
        twice.
        """
        rng = random.Random(f"{seed}/epoch {epoch}")
        groups = []
        rest: list[int] = []
        for frames, bucket in sorted(self._items.items()):
            order = rest + rng.sample(bucket, len(bucket))
            if frames == max(self._items):
                order += [rng.choice(order) for _ in range(-len(order) % size)]
            whole = len(order) // size * size
            groups += [(frames, order[i : i + size]) for i in range(0, whole, size)]
            rest = order[whole:]
        rng.shuffle(groups)
        return groups


class LatentWindows:
    """Windows of cached latents held in memory, as a network sees them.

    Where an item is shorter than the window, the rest is the VAE's latent of digital silence. The windows of a batch
    have one length, the shortest that its items fit into, so that little of them is silence; nor is a window drawn that
    an item's own long silences fill by more than a quarter, where there are others.

    Args:
        folders: what runs of `training.pre_encode` wrote; their items follow one another.
        latents: the representation whose latents they are.
        lengths: of windows in frames that are shorter than the representation's.

    Raises:
        UserError: a folder is unfinished or of another VAE.
    """

    def __init__(self, folders: Sequence[str | Path], latents: LatentRepresentation, lengths: Sequence[int] = ()):
        self.entries = [entry for folder in folders for entry in read_cache(folder, latents.hash)[1]]
        self.latents, self.lengths = latents, sorted({*lengths, latents.shape[1]})
        self.frame_seconds = latents.hop / latents.sample_rate
        self._buckets = Buckets((entry.latent.shape[1] for entry in self.entries), self.lengths)

    @property
    def captions(self) -> list[str]:
        """As `Examples`."""
        return [caption for entry in self.entries for caption in entry.about.captions]

    def __len__(self) -> int:
        return len(self.entries)

    def windows(self, items: Sequence[int], rngs: Iterable[random.Random], frames: int | None = None) -> dict[str, Any]:
        """Draw a uniformly placed window of each of `items` and one of its captions, by generators of their own.

        `frames` is the length of the windows, by default the longest.
        """
        frames = frames or self.lengths[-1]
        x0 = torch.empty(len(items), self.latents.shape[0], frames)
        rows: list[tuple[str, float, float]] = []
        for row, index, rng in zip(x0, items, rngs, strict=True):
            entry = self.entries[index]
            start = rng.choice(self._starts(entry, frames))
            piece = entry.latent[:, start : start + frames]
            row[:, : piece.shape[1]] = self.latents.normalise(piece.float())
            if rest := frames - piece.shape[1]:
                row[:, -rest:] = self.latents.silence[:, -rest:]
            begin = entry.about.seconds_start + start * self.frame_seconds
            rows.append((rng.choice(entry.about.captions), begin, entry.about.seconds_start + entry.about.seconds))
        captions, starts, totals = zip(*rows, strict=True)
        timing = {"seconds_start": torch.tensor(starts), "seconds_total": torch.tensor(totals)}
        return {"x0": x0, "captions": list(captions)} | timing

    @staticmethod
    def _starts(entry: CachedLatent, frames: int) -> Sequence[int]:
        """First frames of the windows of an item that may be drawn."""
        starts = range(max(entry.latent.shape[1] - frames, 0) + 1)
        if not entry.about.silences or len(starts) == 1:
            return starts
        silent = torch.zeros(entry.latent.shape[1] + 1, dtype=torch.int32)
        for begin, end in entry.about.silences:
            silent[begin + 1 : end + 1] = 1
        silent = silent.cumsum(0)
        share = (silent[frames:] - silent[:-frames]) / frames
        return (share <= max(0.25, float(share.min()))).nonzero()[:, 0].tolist()

    def batch(self, number: int, rank: int, world: int, size: int, seed: int) -> dict[str, Any]:
        """As `Examples`."""
        frames, group = self._buckets.batch(number, size * world, seed)
        rngs = (random.Random(f"{seed}/{n}") for n in item_numbers(number, rank, world, size))
        own = group[rank * size : (rank + 1) * size]
        return self.windows(own, rngs, frames)

    def draw(self, numbers: range, seed: int) -> dict[str, Any]:
        """As `Examples`."""
        items = [epoch_index(n, len(self), seed) for n in numbers]
        return self.windows(items, (random.Random(f"{seed}/{n}") for n in numbers))


def latent_statistics(folders: Sequence[str | Path], encoder: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) per channel over all frames of several caches.

    Raises:
        UserError: a folder is unfinished, or its VAE is not the one with the hash `encoder`.
    """
    caches = [read_index(folder, encoder) for folder in folders]
    frames = torch.tensor([index.frames for index in caches], dtype=torch.float64)
    share = (frames / frames.sum())[:, None]
    means = torch.tensor([index.mean for index in caches], dtype=torch.float64)
    squares = torch.tensor([index.std for index in caches], dtype=torch.float64).square() + means.square()
    mean = (share * means).sum(0)
    return mean.float(), ((share * squares).sum(0) - mean.square()).sqrt().float()


class SoundExamples:
    """Crops of sound, mixed to the channels of `representation` and encoded by it."""

    def __init__(self, crops: Crops, representation: Representation, captioned: bool):
        self.crops, self.representation, self.captioned = crops, representation, captioned

    @property
    def captions(self) -> list[str]:
        """As `Examples`."""
        return [caption for item in self.crops.items for caption in item.captions]

    def __len__(self) -> int:
        return len(self.crops.items)

    def batch(self, number: int, rank: int, world: int, size: int, seed: int) -> dict[str, Any]:
        """As `Examples`."""
        return self.draw(item_numbers(number, rank, world, size), seed)

    def draw(self, numbers: range, seed: int) -> dict[str, Any]:
        """Draw examples, see `Examples`."""
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
