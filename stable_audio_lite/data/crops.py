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
    """Crops of `samples` samples at `sample_rate`, silence-padded where the file ends before.

    Batches are functions of (seed, number, process), so that a resumed run sees the same ones. In the place of a crop
    that can't be read comes one of the next file.

    Args:
        endings: share of the crops that lie across an item's end, where half a crop on average is silence.
        gain_db: the level of each crop is changed by up to this many dB either way.
        panned: share of the crops whose stereo image is changed: mixed to mono and placed anywhere, or sides exchanged.
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
        panned: float = 0.0,
        unreadable: Unreadable | None = None,
    ):
        self.items, self.sample_rate, self.samples, self.seed = items, sample_rate, samples, seed
        self.endings, self.gain_db, self.panned = endings, gain_db, panned
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
        if self.panned and rng.random() < self.panned:
            audio = _pan(audio, rng)
        gain = 10 ** (rng.uniform(-self.gain_db, self.gain_db) / 20) if self.gain_db else 1.0
        return Crop(F.pad(gain * audio, (0, self.samples - audio.shape[1])), start, total, item.captions)


def _pan(audio: Tensor, rng: random.Random) -> Tensor:
    """(2, T) sound mixed to mono and panned with constant power, often to the middle or a side; or sides exchanged."""
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
    """The numbers of the items in the `batch`-th batch of process `rank` of `world`.

    Over all processes they depend on batch_size * world only, so one process with a doubled batch sees what two see.
    """
    first = (batch * world + rank) * batch_size
    return range(first, first + batch_size)


def epoch_index(number: int, size: int, seed: int) -> int:
    """Which of `size` items is the `number`-th drawn: every epoch visits all of them, each in its own order."""
    epoch, position = divmod(number, size)
    return _order(epoch, size, seed)[position]
