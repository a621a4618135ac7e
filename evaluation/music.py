"""Tempo, key, width and cleanness of music, as signal processing hears them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stable_audio_lite.audio.io import resample
from stable_audio_lite.audio.stft import stft

TONICS = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
# How well each degree fits a major and a minor key, by listeners (Krumhansl & Kessler 1982).
_PROFILES = {
    "major": (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
    "minor": (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17),
}
_RATE, _HOP = 22050, 128  # Hz and samples: at 200 bpm a hop is 2 % of a beat
_USUAL_BPM, _SPREAD = 115.0, 0.8  # where tempos are expected, and by how many octaves they scatter
_TEMPOS = 50 * 1.01 ** np.arange(145)  # 50 to 210 bpm
_OCTAVES = (250, 500, 1000, 2000)  # Hz, where each begins that valleys are looked for in
_SMOOTH = 5  # hops over which an onset is spread: 29 ms


@dataclass(frozen=True)
class Key:
    """A tonic, one of `TONICS`, and "major" or "minor"."""

    tonic: str
    mode: str


def tempo(audio: Tensor, sample_rate: int) -> float | None:
    """Beats per minute of (channels, T) audio, to half a percent, at which its onsets are most like themselves one to
    four beats later; None where there are no onsets.
    """
    import librosa

    mono = _mono(audio, sample_rate)
    onsets = librosa.onset.onset_strength(y=mono, sr=_RATE, hop_length=_HOP, n_fft=1024, aggregate=np.median)
    if not float(onsets.max()) > 0:
        return None
    likeness = _autocorrelation(np.convolve(onsets, np.hanning(_SMOOTH + 2)[1:-1], "same"))
    scores = [_periodicity(likeness, 60 / bpm * _RATE / _HOP) for bpm in _TEMPOS]
    usual = np.exp(-0.5 * (np.log2(_TEMPOS / _USUAL_BPM) / _SPREAD) ** 2)
    return float(_TEMPOS[np.argmax(np.maximum(scores, 0) * usual)])


def _autocorrelation(values: np.ndarray) -> np.ndarray:
    """Mean product of (N,) values, less their mean, with themselves 0, 1, ... N - 1 later."""
    count = len(values)
    spectrum = np.fft.rfft(values - values.mean(), 2 * count)
    return np.fft.irfft(np.abs(spectrum) ** 2)[:count] / np.arange(count, 0, -1)


def _periodicity(likeness: np.ndarray, period: float) -> float:
    """Mean autocorrelation one to four periods later, as far as half of the sound reaches."""
    lags = period * np.arange(1, 5)
    lags = lags[lags < len(likeness) / 2]
    return float(np.interp(lags, np.arange(len(likeness)), likeness).mean()) if len(lags) else 0.0


def key(audio: Tensor, sample_rate: int) -> Key | None:
    """The key whose profile the chroma of (channels, T) audio correlates with best; None for silence."""
    import librosa

    mono = _mono(audio, sample_rate)
    if not float(np.abs(mono).max()) > 0:
        return None
    chroma = librosa.feature.chroma_cqt(y=mono, sr=_RATE, tuning=0.0).mean(1)
    fits = {
        Key(TONICS[shift], mode): np.corrcoef(np.roll(profile, shift), chroma)[0, 1]
        for mode, profile in _PROFILES.items()
        for shift in range(12)
    }
    return max(fits, key=lambda k: fits[k])


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
    loudness = power.sum(0)
    if not float(loudness.max()) > 0:
        return math.nan
    power = power[:, loudness > loudness.max() * 1e-3]
    octaves = [power[round(low * size / sample_rate) : round(2 * low * size / sample_rate)] for low in _OCTAVES]
    levels = [10 * torch.log10((p.quantile(0.2, 0) / p.mean(0).clamp_min(1e-20)).clamp_min(1e-9)) for p in octaves]
    return float(torch.stack(levels).mean())


def _mono(audio: Tensor, sample_rate: int) -> np.ndarray:
    return resample(audio.float().mean(0, keepdim=True).numpy(), sample_rate, _RATE)[0]
