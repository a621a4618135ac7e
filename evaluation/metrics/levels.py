"""Levels of one sound: when it ends, how loud and how wide it is, and how quiet between its partials."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stable_audio_lite.audio.stft import stft

END_TOLERANCE, WIDTH_TOLERANCE_DB = 0.5, 6.0
"""Seconds and dB by which an end and a width may be off and still count as right."""

METER_WINDOW, METER_HOP, FLOOR_DB = 0.05, 0.01, -40.0
"""Seconds of the level meter's window and hop, and the level (relative to its maximum) that counts as silence."""

_OCTAVES = (250, 500, 1000, 2000)  # Hz, where each begins that valleys are looked for in


def sound_end(audio: Tensor, sample_rate: int) -> float:
    """Seconds at which the sound in (channels, T) `audio` ends; 0 for silence.

    The level is the root mean square over all channels in windows of `METER_WINDOW` s, every `METER_HOP` s. The sound
    ends with the last window whose level is above the highest level plus `FLOOR_DB`: what lies 40 dB under the music is
    its fading tail, or a codec's noise floor.
    """
    window, hop = round(METER_WINDOW * sample_rate), round(METER_HOP * sample_rate)
    power = audio.float().square().mean(0)
    padded = F.pad(power, (0, max(window - len(power), -(len(power) - window) % hop)))
    level = padded.unfold(0, window, hop).mean(1)
    if not float(level.max()) > 0:
        return 0.0
    last = int((level > level.max() * 10 ** (FLOOR_DB / 10)).nonzero()[-1])
    return min(last * hop + window, len(power)) / sample_rate


def loudness(audio: Tensor, sample_rate: int) -> float:
    """Integrated loudness (ITU-R BS.1770-4) of (2, T) audio in LUFS.

    Minus infinity for less than 0.4 s, or where all of it lies below the gate.
    """
    import pyloudnorm

    meter = pyloudnorm.Meter(sample_rate)
    if audio.shape[1] <= meter.block_size * sample_rate:
        return -math.inf
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # it takes logarithms of silent blocks
        return float(meter.integrated_loudness(audio.T.double().numpy()))


def width_db(audio: Tensor) -> float:
    """Power of left - right relative to left + right of (2, T) audio, in dB; -100 for mono."""
    side, middle = (audio[0] - audio[1]).square().sum(), (audio[0] + audio[1]).square().sum()
    return float(10 * torch.log10((side / middle.clamp_min(1e-12)).clamp_min(1e-10)))


def valley_db(audio: Tensor, sample_rate: int) -> float:
    """Level between the partials of (channels, T) audio beside that of the whole, in dB; NaN of silence.

    In each octave from 250 to 4000 Hz it is the power that a fifth of the bins of a 93 ms spectrum stay below, relative
    to the mean power there; the mean of the decibels over octaves and over frames that are at most 30 dB quieter than
    the loudest. White noise has -6, a chord of steady partials -45 and less.
    """
    size = 2 ** round(math.log2(0.093 * sample_rate))
    mono = audio.float().mean(0)
    power = stft(F.pad(mono, (0, max(size - len(mono), 0))), torch.hann_window(size), size // 4, centred=False)
    power = power.abs().square()
    frames = power.sum(0)
    if not float(frames.max()) > 0:
        return math.nan
    power = power[:, frames > frames.max() * 1e-3]
    octaves = [power[round(low * size / sample_rate) : round(2 * low * size / sample_rate)] for low in _OCTAVES]
    levels = [10 * torch.log10((p.quantile(0.2, 0) / p.mean(0).clamp_min(1e-20)).clamp_min(1e-9)) for p in octaves]
    return float(torch.stack(levels).mean())
