"""Random crops of audio files, read by seeking."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_audio_lite.audio.io import audio_info, read_audio
from stable_audio_lite.data.manifest import Item


@dataclass(frozen=True)
class Crop:
    """A stretch of an item: `audio` (2, T), its start and the item's whole length in seconds."""

    audio: Tensor
    seconds_start: float
    seconds_total: float


class Crops:
    """Crops of `samples` samples at `sample_rate`, silence-padded where the file ends before.

    Batches are functions of (seed, step, process), so that a resumed run sees the same ones.

    Args:
        endings: share of the crops that lie across an item's end, where half a crop on average is silence.
    """

    def __init__(self, items: list[Item], sample_rate: int, samples: int, seed: int, endings: float = 0.0):
        self.items, self.sample_rate, self.samples, self.seed = items, sample_rate, samples, seed
        self.endings = endings

    def draw(self, step: int, batch_size: int, rank: int, world: int) -> list[tuple[Item, random.Random]]:
        """The items of one step's batch on process `rank`, each with the generator of its own random choices.

        Each epoch goes through all items in a new order. The batch of a step over all processes depends on
        batch_size * world only, so one process with a doubled batch sees what two see.
        """
        first = (step * world + rank) * batch_size
        return [self._drawn(first + i) for i in range(batch_size)]

    def batch(self, step: int, batch_size: int, rank: int = 0, world: int = 1) -> Tensor:
        """Audio (batch_size, 2, samples) of one step."""
        return torch.stack([self.crop(item, rng).audio for item, rng in self.draw(step, batch_size, rank, world)])

    def crop(self, item: Item, rng: random.Random) -> Crop:
        """A uniformly placed crop of an item, or of the stretch around its end.

        Raises:
            UserError: the file can't be read.
        """
        seconds = self.samples / self.sample_rate
        total = audio_info(item.path).seconds
        first, last = 0.0, max(total - seconds, 0.0)
        if self.endings and rng.random() < self.endings:
            first, last = last, max(total - seconds / 16, 0.0)  # some of the item is left
        start = rng.uniform(first, last)
        audio = read_audio(item.path, self.sample_rate, start, seconds)[:, : self.samples]
        return Crop(F.pad(audio, (0, self.samples - audio.shape[1])), start, total)

    def _drawn(self, number: int) -> tuple[Item, random.Random]:
        index = epoch_index(number, len(self.items), self.seed)
        return self.items[index], random.Random(f"{self.seed}/{number}")


@lru_cache(maxsize=4)
def _order(epoch: int, size: int, seed: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(f"{seed}/epoch {epoch}").shuffle(order)
    return tuple(order)


def epoch_index(number: int, size: int, seed: int) -> int:
    """Which of `size` items is the `number`-th drawn: every epoch visits all of them, each in its own order."""
    epoch, position = divmod(number, size)
    return _order(epoch, size, seed)[position]
