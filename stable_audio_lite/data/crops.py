"""Random crops of audio files, read by seeking."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_audio_lite.audio.io import audio_info, read_audio
from stable_audio_lite.data.latents import read_latents
from stable_audio_lite.data.manifest import Item
from stable_audio_lite.data.unreadable import Unreadable
from stable_audio_lite.errors import UserError


@dataclass(frozen=True)
class Crop:
    """A stretch of an item: `audio` (2, T), its start and the item's whole length in seconds, the captions."""

    audio: Tensor
    seconds_start: float
    seconds_total: float
    captions: tuple[str, ...]


class Crops:
    """Crops of `samples` samples at `sample_rate`, silence-padded where the file ends before.

    Batches are functions of (seed, number, process), so that a resumed run sees the same ones. In the place of a crop
    that can't be read comes one of the next file.

    Args:
        endings: share of the crops that lie across an item's end, where half a crop on average is silence.
        gain_db: the level of each crop is changed by up to this many dB either way.
        inverted: share of the crops whose polarity is inverted.
        unreadable: takes note of what can't be read; None allows nothing of that.
    """

    def __init__(
        self,
        items: list[Item],
        sample_rate: int,
        samples: int,
        seed: int,
        *,
        endings: float = 0.0,
        gain_db: float = 0.0,
        inverted: float = 0.0,
        unreadable: Unreadable | None = None,
    ):
        self.items, self.sample_rate, self.samples, self.seed = items, sample_rate, samples, seed
        self.endings, self.gain_db, self.inverted = endings, gain_db, inverted
        self.unreadable = Unreadable(len(items), 0.0) if unreadable is None else unreadable

    def batch(self, number: int, batch_size: int, rank: int = 0, world: int = 1) -> Tensor:
        """Audio (batch_size, 2, samples) of the `number`-th batch; each epoch goes through all items in a new order.

        Raises:
            UserError: more of the items can't be read than may be.
        """
        return torch.stack([self.crop(n).audio for n in item_numbers(number, rank, world, batch_size)])

    def crop(self, number: int) -> Crop:
        """The `number`-th crop of the run."""
        index = epoch_index(number, len(self.items), self.seed)
        for other in range(len(self.items)):
            item = self.items[(index + other) % len(self.items)]
            try:
                return self._cut(item, random.Random(f"{self.seed}/{number}"))
            except UserError as error:
                self.unreadable.add(item.path, error)
        raise UserError(f"none of the {len(self.items)} files can be read")

    def _cut(self, item: Item, rng: random.Random) -> Crop:
        """A uniformly placed crop of an item, or of the stretch around its end."""
        seconds = self.samples / self.sample_rate
        total = audio_info(item.path).seconds
        first, last = 0.0, max(total - seconds, 0.0)
        if self.endings and rng.random() < self.endings:
            first, last = last, max(total - seconds / 16, 0.0)  # some of the item is left
        start = rng.uniform(first, last)
        audio = read_audio(item.path, self.sample_rate, start, seconds)[:, : self.samples]
        gain = 10 ** (rng.uniform(-self.gain_db, self.gain_db) / 20) if self.gain_db else 1.0
        if self.inverted and rng.random() < self.inverted:
            gain = -gain
        return Crop(F.pad(gain * audio, (0, self.samples - audio.shape[1])), start, total, item.captions)


class LatentCrops:
    """Crops of recordings with the latents that are to be decoded into them, both cut at whole latent frames.

    Args:
        items: the recordings, those that `folder` was made of; those without a latent are left out.
        folder: latents of the items from their beginning, perhaps with silence after their end.
        silence: latent (C, frames) of silence, of which what lies beyond is taken.
        encoder: hash of the encoder whose latents they are.
        hop: samples per latent frame.
        frames: latent frames in a crop.
        endings: share of the crops that lie across an item's end.

    Raises:
        UserError: the latents are unfinished, of another VAE or of other items.
    """

    def __init__(
        self,
        items: list[Item],
        folder: str | Path,
        silence: Tensor,
        encoder: str,
        sample_rate: int,
        hop: int,
        frames: int,
        seed: int,
        endings: float = 0.0,
    ):
        self.sample_rate, self.hop, self.frames = sample_rate, hop, frames
        self.seed, self.endings, self.silence = seed, endings, silence
        found = read_latents(folder, encoder, [item.name for item in items])
        self.items, self.latents = [items[i] for i in found], list(found.values())

    def batch(self, number: int, batch_size: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        """Audio (batch_size, 2, frames * hop) and latents (batch_size, C, frames) of the `number`-th batch."""
        pairs = [self.crop(n) for n in item_numbers(number, rank, world, batch_size)]
        return torch.stack([audio for audio, _ in pairs]), torch.stack([latent for _, latent in pairs])

    def crop(self, number: int) -> tuple[Tensor, Tensor]:
        """The `number`-th crop of the run, (2, frames * hop) and (C, frames); beyond the end is silence."""
        rng = random.Random(f"{self.seed}/{number}")
        index = epoch_index(number, len(self.items), self.seed)
        path, latent = self.items[index].path, self.latents[index]
        sounding = min(math.ceil(audio_info(path).seconds * self.sample_rate / self.hop), latent.shape[1])
        first, last = 0, max(sounding - self.frames, 0)
        if self.endings and rng.random() < self.endings:
            first, last = last, max(sounding - max(self.frames // 16, 1), last)
        start = rng.randint(first, last)
        seconds = self.hop / self.sample_rate
        samples = self.frames * self.hop
        audio = read_audio(path, self.sample_rate, start * seconds, self.frames * seconds)[:, :samples]
        piece = latent[:, start : start + self.frames].float()
        piece = torch.cat((piece, self.silence[:, piece.shape[1] :]), 1)
        return F.pad(audio, (0, samples - audio.shape[1])), piece


@lru_cache(maxsize=4)
def _order(epoch: int, size: int, seed: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(f"{seed}/epoch {epoch}").shuffle(order)
    return tuple(order)


def item_numbers(batch: int, rank: int, world: int, batch_size: int) -> range:
    """The numbers of the items in the `batch`-th batch of process `rank` of `world`.

    Over all processes they depend on batch_size * world only, so one process with a doubled batch sees what two see.
    """
    first = (batch * world + rank) * batch_size
    return range(first, first + batch_size)


def epoch_index(number: int, size: int, seed: int) -> int:
    """Which of `size` items is the `number`-th drawn: every epoch visits all of them, each in its own order."""
    epoch, position = divmod(number, size)
    return _order(epoch, size, seed)[position]
