"""Measurements of one sound by name: its end, width, loudness and structure.

Structure is novelty (Foote 2000, "Automatic audio segmentation using a measure of audio novelty"): how much what
precedes a moment differs from what follows it. An introduction that gives way to something else, a development and an
ending each leave a peak, in the first quarter, the middle half and the last quarter of a sound; so does anything else
that changes the sound: a break, a fade, a fault. Peaks of real music stand beside those of the generated.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.metrics import levels
from evaluation.sounds import DESCRIBED_SECONDS
from evaluation.store import code_hash
from stable_audio_lite.audio.io import AudioSource, audio_info, read_audio
from stable_audio_lite.audio.stft import stft

STRETCHES, KERNEL = 128, 16
"""Parts that a sound is cut into for its structure, and how many before and after a moment are compared."""

_QUIETEST = -60.0  # dB beside the loudest, below which nothing counts
_BANDS, _LOWEST, _HIGHEST = 32, 40.0, 16000.0  # mel bands, Hz
_RATE = 44100  # Hz at which files are described
_SHORTEST = 4.0  # seconds from which structure is looked for


def describe_sound(audio: Tensor, sample_rate: int) -> dict[str, float]:
    """Measurements by name of (2, T) audio at `sample_rate` Hz; a sound lacks those that it is too short or silent for.

    - end: seconds at which the sound ends (`levels.sound_end`), 0 for silence
    - width: power of left - right beside left + right, in dB (`levels.width_db`)
    - level: integrated loudness in LUFS (`levels.loudness`), of at least 0.4 s above its gate
    - intro, development, outro: the highest `novelty` in the first quarter, the middle half and the last
      quarter of at least 4 s of sound, in dB
    """
    end = levels.sound_end(audio, sample_rate)
    sound = audio[:, : round(end * sample_rate)].float()
    found = {"end": end}
    if end:
        found["width"] = levels.width_db(sound)
    level = levels.loudness(sound, sample_rate)
    if math.isfinite(level):
        found["level"] = level
    if end >= _SHORTEST:
        curve = novelty(sound, sample_rate)
        first, last = STRETCHES // 4 + 1, STRETCHES * 3 // 4
        parts = {"intro": curve[:first], "development": curve[first:last], "outro": curve[last:]}
        found |= {name: max(0.0, float(part.nan_to_num(0.0).max())) for name, part in parts.items()}
    return found


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


class Describer:
    """`describe_sound` of files, as a `FeatureExtractor`; a file over `DESCRIBED_SECONDS` is cut and has no end."""

    name = "description"

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {"code": code_hash(sys.modules[__name__], levels)}

    def embed(self, source: AudioSource) -> dict[str, Tensor]:
        """A scalar for each measurement."""
        found = describe_sound(read_audio(source, _RATE, seconds=DESCRIBED_SECONDS), _RATE)
        if audio_info(source).seconds > DESCRIBED_SECONDS:
            found.pop("end", None)
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}
