"""Random crops of audio files, read by seeking."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_audio_lite.audio.io import audio_info, read_audio
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
    """Crops of `samples` samples at `sample_rate`, padded with silence where the file ends earlier.

    Batches are functions of (seed, number, process), so that a resumed run sees the same ones. A crop that can't be
    read is replaced by one of the next file.

    Args:
        endings: share of the crops that cross an item's end; half of such a crop is silence on average.
        gain_db: the level of each crop is changed by up to this many dB either way.
        panned: share of the crops whose stereo image is changed: mixed to mono and placed anywhere, or sides exchanged.
        unreadable: records the files that can't be read; None allows no such file.
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
        panned: float = 0.0,
        unreadable: Unreadable | None = None,
    ):
        self.items, self.sample_rate, self.samples, self.seed = items, sample_rate, samples, seed
        self.endings, self.gain_db, self.panned = endings, gain_db, panned
        self.unreadable = Unreadable(len(items), 0.0) if unreadable is None else unreadable

    def batch(self, number: int, batch_size: int, rank: int = 0, world: int = 1) -> Tensor:
        """Audio (batch_size, 2, samples) of the `number`-th batch; each epoch goes through all items in a new order.

        Raises:
            UserError: more items can't be read than are allowed.
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
        """Cut a uniformly placed crop from an item, or from the stretch around its end."""
        seconds = self.samples / self.sample_rate
        total = audio_info(item.path).seconds
        first, last = 0.0, max(total - seconds, 0.0)
        if self.endings and rng.random() < self.endings:
            first, last = last, max(total - seconds / 16, 0.0)  # some of the item is left
        start = rng.uniform(first, last)
        audio = read_audio(item.path, self.sample_rate, start, seconds)[:, : self.samples]
        if self.panned and rng.random() < self.panned:
            audio = _pan(audio, rng)
        gain = 10 ** (rng.uniform(-self.gain_db, self.gain_db) / 20) if self.gain_db else 1.0
        return Crop(F.pad(gain * audio, (0, self.samples - audio.shape[1])), start, total, item.captions)


def _pan(audio: Tensor, rng: random.Random) -> Tensor:
    """Mix (2, T) sound to mono and pan it with constant power, often to the middle or a side; or exchange its sides."""
    if rng.random() < 0.4:
        return audio.flip(0)
    place = rng.choice((0.0, 0.5, 1.0, rng.random(), rng.random(), rng.random())) * math.pi / 2
    return audio.mean(0) * torch.tensor([[math.cos(place)], [math.sin(place)]]) * math.sqrt(2)


@lru_cache(maxsize=4)
def _order(epoch: int, size: int, seed: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(f"{seed}/epoch {epoch}").shuffle(order)
    return tuple(order)


def item_numbers(batch: int, rank: int, world: int, batch_size: int) -> range:
    """Numbers of the items in the `batch`-th batch of process `rank` of `world`.

    Over all processes the numbers only depend on batch_size * world, so one process with a doubled batch sees what two
    see.
    """
    first = (batch * world + rank) * batch_size
    return range(first, first + batch_size)


def epoch_index(number: int, size: int, seed: int) -> int:
    """Index of the `number`-th of `size` items drawn: every epoch visits all of them, each in its own order."""
    epoch, position = divmod(number, size)
    return _order(epoch, size, seed)[position]
