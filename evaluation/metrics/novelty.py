"""Structure as novelty (Foote 2000, "Automatic audio segmentation using a measure of audio novelty").

Novelty is how much what precedes a moment differs from what follows it. An introduction that gives way to something
else, a development and an ending each leave a peak, in the first quarter, the middle half and the last quarter of a
sound; so does anything else that changes the sound: a break, a fade, a fault. Peaks of real music stand beside those of
the generated.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_audio_lite.audio.stft import stft

STRETCHES, KERNEL = 128, 16
"""Parts that a sound is cut into for its structure, and how many before and after a moment are compared."""

_QUIETEST = -60.0  # dB beside the loudest, below which nothing counts
_BANDS, _LOWEST, _HIGHEST = 32, 40.0, 16000.0  # mel bands, Hz


def novelty(audio: Tensor, sample_rate: int) -> Tensor:
    """Change of (2, T) audio between its `STRETCHES`: (STRETCHES + 1,) in dB, NaN too near to both ends.

    The distance of two stretches is the root mean square difference of their mel bands' levels. The novelty is the mean
    distance between the `KERNEL` stretches before and the `KERNEL` after, less the mean distance within each: Foote's
    kernel without a window, or the energy distance, which is 0 on average where nothing changes.
    """
    bands = _levels(audio, sample_rate)
    distances = torch.cdist(bands, bands) / math.sqrt(_BANDS)
    curve = torch.full((STRETCHES + 1,), math.nan)
    for moment in range(KERNEL // 2, STRETCHES - KERNEL // 2 + 1):
        before, after = slice(max(0, moment - KERNEL), moment), slice(moment, moment + KERNEL)
        within = [_within(distances[side, side]) for side in (before, after)]
        curve[moment] = distances[before, after].mean() - sum(within) / 2
    return curve


def _within(distances: Tensor) -> Tensor:
    return distances.sum() / (len(distances) * (len(distances) - 1))


def _levels(audio: Tensor, sample_rate: int) -> Tensor:
    """Mean level of each mel band in each stretch, (STRETCHES, bands), in dB beside the loudest of all."""
    import torchaudio.functional

    hop = max(1, round(sample_rate * 0.012))
    window, block = 4 * hop, 2000 * hop
    highest = min(_HIGHEST, sample_rate / 2)
    bank = torchaudio.functional.melscale_fbanks(window // 2 + 1, _LOWEST, highest, _BANDS, sample_rate)
    padded = F.pad(audio, (window // 2, window // 2))
    frames = []
    for start in range(0, padded.shape[1] - window + 1, block):
        piece = padded[:, start : start + block + window - hop]
        spectrum = stft(piece, torch.hann_window(window), hop, centred=False)
        frames.append((spectrum.abs().square().mean(0).T @ bank).T)
    power = F.adaptive_avg_pool1d(torch.cat(frames, 1)[None], STRETCHES)[0].T
    return (10 * (power / power.max()).clamp_min(1e-12).log10()).clamp_min(_QUIETEST)
