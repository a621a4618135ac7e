"""Phases for magnitudes: a first guess from the frequencies of spectral peaks, then Griffin-Lim with momentum.

torchaudio's Griffin-Lim only starts from random phases and can't keep neighbouring frames fixed. Here a good start
makes a few iterations enough, and fixed frames let the pieces of a stream join.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALLEST = 1e-7


def advance(magnitude: Tensor, before: Tensor, hop: int) -> Tensor:
    """Estimate the phases of consecutive frames from their spectral peaks (phase locking, Laroche & Dolson 1999).

    The frequency of each local maximum is read off a parabola through the logarithms of three bins; its phase advances
    at that frequency from the frame before, and the bins around it alternate in sign, as those of a sine under a Hann
    window of the transform's length do.

    Args:
        magnitude: (..., frames, bins) of a transform of 2 (bins - 1) samples.
        before: (..., bins) phases of the frame before the first.
        hop: samples from frame to frame.

    Returns:
        (..., frames, bins) radians.
    """
    bins = magnitude.shape[-1]
    index = torch.arange(bins, device=magnitude.device).expand(magnitude.shape)
    log = (magnitude + _SMALLEST).log()
    low, middle, high = log[..., :-2], log[..., 1:-1], log[..., 2:]
    offset = (0.5 * (low - high) / (low - 2 * middle + high).clamp_max(-1e-9)).clamp(-0.5, 0.5)
    peak = F.pad((middle > low) & (middle >= high), (1, 1))
    below = torch.where(peak, index, -2 * bins).cummax(-1).values
    above = torch.where(peak, index, 3 * bins).flip(-1).cummin(-1).values.flip(-1)
    nearest = torch.where(index - below <= above - index, below, above).clamp(0, bins - 1)
    frequency = (index + F.pad(offset, (1, 1))).gather(-1, nearest)
    turn = frequency * (math.pi * hop / (bins - 1))
    sign = math.pi * (index - nearest)
    phases, phase = [], before
    for ahead, peaks, signs in zip(turn.unbind(-2), nearest.unbind(-2), sign.unbind(-2), strict=True):
        phase = (phase + ahead).gather(-1, peaks).add_(signs)
        phases.append(phase)
    return torch.stack(phases, -2)


class GriffinLim:
    """Griffin-Lim with momentum (Perraudin et al. 2013) over frames of a stream.

    Args:
        window: (N,), a Hann window.
        hop: N / 4 samples.
        iterations: number of projections onto consistent spectra.
        momentum: how far each step extrapolates beyond its projection; 0 is plain Griffin-Lim.
    """

    def __init__(self, window: Tensor, hop: int, iterations: int, momentum: float = 0.99):
        if len(window) != 4 * hop:
            raise ValueError(f"expected a window of 4 hops, got {len(window)} samples and hops of {hop}")
        self.window, self.hop, self.iterations, self.momentum = window, hop, iterations, momentum

    def __call__(
        self, magnitude: Tensor, phase: Tensor, before: Tensor | None = None, after: Tensor | None = None
    ) -> Tensor:
        """Find complex spectra (B, frames, bins) of these magnitudes, starting from these phases.

        `before` and `after` (B, any, bins) are the spectra of the first and last frames, which don't change.
        """
        spectrum = torch.polar(magnitude, phase)
        last = torch.zeros_like(spectrum)
        for iteration in range(self.iterations):
            _fix(spectrum, before, after)
            consistent = self.analyse(self.synthesise(spectrum))
            ahead = consistent
            if iteration:
                ahead = (consistent - last).mul_(self.momentum).add_(consistent)
            last = consistent
            # `abs`, and products with one number for two, give the same and take several times as long.
            length = torch.hypot(ahead.real.contiguous(), ahead.imag.contiguous())
            scale = magnitude / length.clamp_min_(_SMALLEST)
            pairs = torch.view_as_real(ahead) * torch.view_as_real(torch.complex(scale, scale))
            spectrum = torch.view_as_complex(pairs)
        return _fix(spectrum, before, after)

    def analyse(self, audio: Tensor) -> Tensor:
        """Spectra (..., frames, bins) of the whole frames of (..., T) audio."""
        return torch.fft.rfft(audio.unfold(-1, len(self.window), self.hop) * self.window)

    def synthesise(self, spectrum: Tensor) -> Tensor:
        """Overlap-add frames to audio (B, (frames + 3) hop), which is complete where four frames overlap."""
        pieces = torch.fft.irfft(spectrum).mul_(self.window / 1.5).unflatten(-1, (4, self.hop))
        batch, frames = pieces.shape[:2]
        audio = pieces.new_zeros(batch, frames + 3, self.hop)
        for quarter in range(4):
            audio[:, quarter : quarter + frames] += pieces[:, :, quarter]
        return audio.flatten(1)


def _fix(spectrum: Tensor, before: Tensor | None, after: Tensor | None) -> Tensor:
    """Put the spectra of the first and last frames in place."""
    if before is not None:
        spectrum[:, : before.shape[1]] = before
    if after is not None and after.shape[1]:
        spectrum[:, -after.shape[1] :] = after
    return spectrum
