"""The short-time Fourier transform and its inverse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def stft(audio: Tensor, window: Tensor, hop: int, *, centred: bool = True) -> Tensor:
    """Compute the spectra of windowed frames, one every `hop` samples.

    Real audio (..., T) under a `window` (N,), such as `torch.hann_window(N)`, becomes complex (..., N / 2 + 1, frames).
    If `centred`, frame k is centred on sample k * hop, and the sound is mirrored beyond its ends (T > N / 2); otherwise
    frame k begins there, and only whole frames count (T >= N).
    """
    flat = audio.reshape(-1, audio.shape[-1])
    spectrum = torch.stft(flat, len(window), hop, window=window, center=centred, return_complex=True)
    return spectrum.reshape(*audio.shape[:-1], *spectrum.shape[1:])


def istft(spectrum: Tensor, window: Tensor, hop: int) -> Tensor:
    """Find the sound whose uncentred `stft` is nearest to `spectrum` (Griffin & Lim 1984, equation 6).

    Complex (B, N / 2 + 1, frames) becomes real (B, (frames - 1) * hop + N), the hop at most N / 2 for a Hann window;
    samples that no frame covers (a Hann window's first) are 0.
    """
    size, frames = len(window), spectrum.shape[-1]
    total = (frames - 1) * hop + size
    pieces = torch.fft.irfft(spectrum, size, dim=1) * window[:, None]  # B, N, frames
    weights = (window.square()[:, None]).expand(1, size, frames)
    summed, weight = (_overlap_add(x, total, size, hop) for x in (pieces, weights))
    return torch.where(weight > 1e-10, summed / weight.clamp_min(1e-10), 0.0)


def _overlap_add(pieces: Tensor, total: int, size: int, hop: int) -> Tensor:
    """(B, size, frames) -> (B, total)."""
    return F.fold(pieces, (1, total), (1, size), stride=(1, hop))[:, 0, 0]
