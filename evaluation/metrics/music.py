"""Tempo and key of music, estimated by signal processing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from stable_audio_lite.audio.io import resample
from stable_audio_lite.corpus.harmony import KEYS

TEMPO_TOLERANCE = 0.04
"""Share by which a tempo may be off and still count as right."""

# How well each degree fits a major and a minor key, by listeners (Krumhansl & Kessler 1982).
_PROFILES = {
    "major": (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
    "minor": (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17),
}
_RATE, _HOP = 22050, 128  # Hz and samples: at 200 bpm a hop is 2 % of a beat
_USUAL_BPM, _SPREAD = 115.0, 0.8  # where tempos are expected, and by how many octaves they scatter
_TEMPOS = 50 * 1.01 ** np.arange(145)  # 50 to 210 bpm
_SMOOTH = 5  # hops over which an onset is spread: 29 ms


@dataclass(frozen=True)
class Key:
    """A tonic, one of `stable_audio_lite.corpus.harmony.KEYS`, and "major" or "minor"."""

    tonic: str
    mode: str


def tempo(audio: Tensor, sample_rate: int) -> float | None:
    """Beats per minute of (channels, T) audio, to half a percent; None where there are no onsets.

    It is the tempo at which onsets are most like themselves one to four beats later.
    """
    import librosa

    mono = _mono(audio, sample_rate)
    onsets = librosa.onset.onset_strength(y=mono, sr=_RATE, hop_length=_HOP, n_fft=1024, aggregate=np.median)
    if not float(onsets.max()) > 0:
        return None
    correlation = _autocorrelation(np.convolve(onsets, np.hanning(_SMOOTH + 2)[1:-1], "same"))
    scores = [_periodicity(correlation, 60 / bpm * _RATE / _HOP) for bpm in _TEMPOS]
    usual = np.exp(-0.5 * (np.log2(_TEMPOS / _USUAL_BPM) / _SPREAD) ** 2)
    return float(_TEMPOS[np.argmax(np.maximum(scores, 0) * usual)])


def _autocorrelation(values: np.ndarray) -> np.ndarray:
    """Mean product of (N,) values, less their mean, with themselves 0, 1, ... N - 1 later."""
    count = len(values)
    spectrum = np.fft.rfft(values - values.mean(), 2 * count)
    return np.fft.irfft(np.abs(spectrum) ** 2)[:count] / np.arange(count, 0, -1)


def _periodicity(correlation: np.ndarray, period: float) -> float:
    """Mean autocorrelation one to four periods later, as far as half of the sound reaches."""
    lags = period * np.arange(1, 5)
    lags = lags[lags < len(correlation) / 2]
    return float(np.interp(lags, np.arange(len(correlation)), correlation).mean()) if len(lags) else 0.0


def key(audio: Tensor, sample_rate: int) -> Key | None:
    """The key whose profile the chroma of (channels, T) audio correlates with best; None for silence."""
    import librosa

    mono = _mono(audio, sample_rate)
    if not float(np.abs(mono).max()) > 0:
        return None
    chroma = librosa.feature.chroma_cqt(y=mono, sr=_RATE, tuning=0.0).mean(1)
    fits = {
        Key(KEYS[shift], mode): np.corrcoef(np.roll(profile, shift), chroma)[0, 1]
        for mode, profile in _PROFILES.items()
        for shift in range(12)
    }
    return max(fits, key=lambda k: fits[k])


def _mono(audio: Tensor, sample_rate: int) -> np.ndarray:
    return resample(audio.float().mean(0, keepdim=True).numpy(), sample_rate, _RATE)[0]
