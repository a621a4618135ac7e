"""Seams: how much a sound changes where two pieces of it meet, beside how much it changes elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_WINDOW, _STEP = 1024, 512  # samples
_BANDS, _FLOOR_DB = 64, -60.0  # below the loudest band of the sound
_NEAR = 0.1  # s beside a seam that counts as it


def seam_distances(audio: Tensor, sample_rate: int, seams: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Spectral distances in (channels, T) audio at sample numbers `seams`, and at all other places.

    The distance at a place is the mean difference in dB, over mel bands, between the spectrum of the window across it
    and those of the windows before and after. A click is in the first alone, a change in one of the others.

    Raises:
        ValueError: a seam is closer to an end than a window is long.
    """
    length = audio.shape[-1]
    if any(not _WINDOW <= seam <= length - _WINDOW for seam in seams):
        raise ValueError(f"seams must lie {_WINDOW} samples within {length}, got {list(seams)}")
    others = np.arange(_WINDOW, length - _WINDOW + 1, _STEP)
    near = np.abs(others[:, None] - np.asarray(seams)[None]) < _NEAR * sample_rate
    places = np.concatenate((np.asarray(seams, int), others[~near.any(1)]))
    starts = torch.from_numpy(places)[:, None] + torch.tensor([-_WINDOW, -_WINDOW // 2, 0])
    levels = _levels(audio, starts.flatten(), sample_rate).reshape(len(places), 3, -1)
    change = (levels[:, 1:] - levels[:, :-1]).abs().mean((1, 2)).numpy()
    return change[: len(seams)], change[len(seams) :]


def _levels(audio: Tensor, starts: Tensor, sample_rate: int) -> Tensor:
    """Mel spectra (N, bands) in dB of the windows that begin at `starts` (N,), all channels together."""
    from torchaudio.functional import melscale_fbanks

    windows = audio[:, starts[:, None] + torch.arange(_WINDOW)] * torch.hann_window(_WINDOW)
    power = torch.fft.rfft(windows.double()).abs().square().sum(0)
    bands = melscale_fbanks(_WINDOW // 2 + 1, 0.0, sample_rate / 2, _BANDS, sample_rate, None, "slaney").double()
    levels = 10 * (power @ bands).clamp_min(1e-12).log10()
    return levels.clamp_min(levels.max() + _FLOOR_DB)
