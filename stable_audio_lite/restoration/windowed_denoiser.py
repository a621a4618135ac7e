"""A denoiser of any length, made from one of a fixed length with overlapping windows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stable_audio_lite.diffusion.samplers import Denoiser


class WindowedDenoiser:
    """A denoiser of (B, C, F, T), T >= frames, that works in overlapping windows along the last axis.

    At each step all windows (N, C, F, frames) are denoised, `batch` of them at once, which bounds the memory, and their
    estimates cross-faded where they overlap, by `overlap` frames at least: the result is one sound without seams.

    Raises:
        ValueError: not 0 < overlap < frames, or batch < 1.
    """

    def __init__(self, denoiser: Denoiser, frames: int, overlap: int, batch: int = 4) -> None:
        if not 0 < overlap < frames or batch < 1:
            raise ValueError(f"expected 0 < overlap < {frames} and batch >= 1, got {overlap} and {batch}")
        self.denoiser, self.frames, self.overlap, self.batch = denoiser, frames, overlap, batch

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Estimate x0 from x (B, C, F, T) = x0 + sigma eps, sigma (B,)."""
        starts = window_starts(x.shape[-1], self.frames, self.overlap)
        ramp = torch.arange(1, self.frames + 1, device=x.device, dtype=x.dtype)
        fade = torch.minimum(ramp, ramp.flip(0)).clamp(max=self.overlap) / self.overlap  # a trapezoid
        total = torch.zeros_like(x)
        weight = x.new_zeros(x.shape[-1])
        for start in starts:
            weight[start : start + self.frames] += fade
        places = [(item, start) for start in starts for item in range(len(x))]
        for first in range(0, len(places), self.batch):
            chunk = places[first : first + self.batch]
            windows = torch.stack([x[item, ..., start : start + self.frames] for item, start in chunk])
            denoised = self.denoiser(windows, sigma[[item for item, _ in chunk]]).to(x) * fade
            for (item, start), window in zip(chunk, denoised, strict=True):
                total[item, ..., start : start + self.frames] += window
        return total / weight


def window_starts(total: int, frames: int, overlap: int) -> list[int]:
    """Return the first frames of evenly spaced windows that cover 0..total and share at least `overlap` frames.

    Raises:
        ValueError: total < frames.
    """
    if total < frames:
        raise ValueError(f"expected at least {frames} frames, got {total}; pad them")
    count = 1 + math.ceil((total - frames) / (frames - overlap))
    return [round(i * (total - frames) / max(count - 1, 1)) for i in range(count)]
