"""Audio as networks take it: at their rate and level, in blocks, so that memory doesn't grow with a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.metrics.levels import loudness
from evaluation.sounds import DESCRIBED_SECONDS
from stable_audio_lite.audio.io import AudioSource, audio_info, read_audio, resample_blocks, stereo_blocks


@dataclass(frozen=True)
class TargetLevel:
    """The level that sounds are brought to: a "peak" in dB of full scale, or a loudness in "lufs" (BS.1770-4)."""

    kind: Literal["peak", "lufs"] = "peak"
    decibels: float = -1.0

    def __str__(self) -> str:
        unmeasured = ", or peak -1 of less than 0.4 s or below -70" if self.kind == "lufs" else ""
        return f"{self.kind} {self.decibels:g}{unmeasured}"

    def of(self, what: str) -> str:
        """The level in words, a peak being that of `what`, a loudness that of the file."""
        return f"{self}, of the {what if self.kind == 'peak' else 'file'}"

    def gain(self, source: AudioSource, read: Callable[[], Iterable[Tensor]]) -> float:
        """Factor for the sound that `read` gives of `source`; 1 for silence.

        What is too short or quiet for a loudness is brought to a peak of -1 dB.

        Raises:
            UserError: the file can't be read.
        """
        if self.kind == "lufs":
            rate = audio_info(source).sample_rate
            found = loudness(read_audio(source, rate, seconds=DESCRIBED_SECONDS), rate)
            return 10 ** ((self.decibels - found) / 20) if found > -70 else TargetLevel().gain(source, read)
        peak = max((float(block.abs().max()) for block in read() if block.numel()), default=0.0)
        return 10 ** (self.decibels / 20) / peak if peak else 1.0


def stereo_at(source: AudioSource, rates: tuple[int, ...], level: TargetLevel) -> Iterator[Tensor]:
    """Blocks (2, T) at the last of `rates`, by way of the others; the level is that of the file as it lies.

    Raises:
        UserError: the file can't be read.
    """
    own = audio_info(source).sample_rate
    gain = level.gain(source, lambda: stereo_blocks(source, own))
    blocks: Iterator[np.ndarray] = (block.numpy() for block in stereo_blocks(source, rates[0]))
    for rate, new_rate in zip(rates, rates[1:], strict=False):
        blocks = resample_blocks(blocks, rate, new_rate, 2)
    for block in blocks:
        yield gain * torch.from_numpy(block)


def mono_at(source: AudioSource, sample_rate: int, level: TargetLevel) -> Iterator[Tensor]:
    """Blocks (1, T) of both channels' mean, brought to `sample_rate` and then to the level.

    Raises:
        UserError: the file can't be read.
    """
    own = audio_info(source).sample_rate

    def read() -> Iterator[Tensor]:
        means = (block.mean(0, keepdim=True).numpy() for block in stereo_blocks(source, own))
        return (torch.from_numpy(block) for block in resample_blocks(means, own, sample_rate, 1))

    gain = level.gain(source, read)
    for block in read():
        yield gain * block


def overlapping_windows(
    blocks: Iterable[Tensor], size: int, hop: int, channels: int, front: int = 0
) -> Iterator[Tensor]:
    """Stretches (channels, size), one every `hop` samples, that together hold every sample of (channels, any) blocks.

    The first begins with `front` samples of silence and the last is filled up with it, as is all of it without blocks.
    """
    held = torch.zeros(channels, front)
    for block in blocks:
        held = torch.cat((held, block), 1)
        while held.shape[1] > size:
            yield held[:, :size]
            held = held[:, hop:]
    yield F.pad(held, (0, size - held.shape[1]))


def batches(parts: Iterable[Tensor], count: int) -> Iterator[Tensor]:
    """Stacks of up to `count` of the tensors that come."""
    held: list[Tensor] = []
    for part in parts:
        held.append(part)
        if len(held) == count:
            yield torch.stack(held)
            held = []
    if held:
        yield torch.stack(held)
