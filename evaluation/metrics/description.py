"""Measurements of one sound by name: its end, width, loudness and structure."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from evaluation.metrics import levels, novelty
from evaluation.provenance import code_hash
from evaluation.sounds import LONGEST
from stable_audio_lite.audio.io import AudioSource, audio_info, read_audio

_RATE = 44100  # Hz at which files are described
_SHORTEST = 4.0  # seconds from which structure is looked for


def describe(audio: Tensor, sample_rate: int) -> dict[str, float]:
    """Measurements by name of (2, T) audio at `sample_rate` Hz; a sound lacks those that it is too short or silent for.

    - end: seconds at which the sound ends (`levels.sound_end`), 0 for silence
    - width: power of left - right beside left + right, in dB (`levels.width_db`)
    - level: integrated loudness in LUFS (`levels.loudness`), of at least 0.4 s above its gate
    - intro, development, outro: the highest `novelty.novelty` in the first quarter, the middle half and the last
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
        curve = novelty.novelty(sound, sample_rate)
        first, last = novelty.STRETCHES // 4 + 1, novelty.STRETCHES * 3 // 4
        parts = {"intro": curve[:first], "development": curve[first:last], "outro": curve[last:]}
        found |= {name: max(0.0, float(part.nan_to_num(0.0).max())) for name, part in parts.items()}
    return found


class Describer:
    """`describe` of files, as a `FeatureExtractor`; of one over `LONGEST`, its beginning's, without its end."""

    name = "description"

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {"code": code_hash(sys.modules[__name__], levels, novelty)}

    def embed(self, source: AudioSource) -> dict[str, Tensor]:
        """A scalar for each measurement."""
        found = describe(read_audio(source, _RATE, seconds=LONGEST), _RATE)
        if audio_info(source).seconds > LONGEST:
            found.pop("end", None)
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}
