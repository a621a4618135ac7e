"""Facts that a prompt states, looked for in sounds: what is found in a sound, and which of it is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from evaluation.metrics.levels import END_TOLERANCE, WIDTH_TOLERANCE_DB, sound_end, valley_db, width_db
from evaluation.metrics.music import TEMPO_TOLERANCE, key, tempo
from evaluation.tagger import Tagger, Tags, r_precision
from stable_audio_lite.clap.model import Clap
from stable_audio_lite.corpus.captions import facts_told
from stable_audio_lite.data.manifest import Item

FACTS = ("families", "instruments", "drums", "style", "tempo", "tempo octave", "key", "mode", "end", "width")
OCTAVES = (1 / 3, 1 / 2, 2.0, 3.0)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A held-out piece, the words for it, and the length in seconds that a sound is asked to have."""

    item: Item
    prompt: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Facts found in one sound; None where it is silent, or has no such thing.

    Attributes:
        seconds: the length that it should have, up to which all but its end is looked for.
        end: seconds at which the sound ends.
        width, valley: in dB, as `evaluation.metrics.levels` defines them.
        embedding: of a CLAP, (1, D).
    """

    seconds: float
    tags: Tags | None
    tempo: float | None
    tonic: str | None
    mode: str | None
    end: float
    width: float
    valley: float
    embedding: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Everything that looks for facts in sounds at `sample_rate` Hz."""

    tagger: Tagger
    sample_rate: int
    clap: Clap | None = None

    def analyse(self, audio: Tensor, seconds: float | None = None) -> Analysis:
        """Look for facts in (2, T) audio that should last `seconds`; None: all of it."""
        rate = self.sample_rate
        length = audio.shape[1] / rate if seconds is None else seconds
        asked = audio[:, : round(length * rate)]
        silent = not bool(asked.any())
        found = None if silent else key(asked, rate)
        return Analysis(
            seconds=length,
            tags=None if silent else self.tagger.tag(asked, rate),
            tempo=None if silent else tempo(asked, rate),
            tonic=found.tonic if found else None,
            mode=found.mode if found else None,
            end=sound_end(audio, rate),
            width=width_db(asked),
            valley=valley_db(asked, rate),
            embedding=self.clap.embed_audio(asked[None], rate) if self.clap else None,
        )


def right_facts(
    found: Analysis, metadata: dict[str, Any], prompt: str, seconds: float, width: float
) -> dict[str, float]:
    """1 for each of `FACTS` that is right, 0 for what is wrong, of those that apply to the prompt.

    Args:
        found: in a sound.
        metadata: of the piece that the prompt describes.
        prompt: its words.
        seconds: where the sound should end.
        width: of the piece's recording, in dB.
    """
    tags, bpm = found.tags, found.tempo or 0.0
    right: dict[str, float] = {
        "families": r_precision(tags.families, metadata["families"]) if tags else 0.0,
        "instruments": r_precision(tags.instruments, metadata["instruments"]) if tags else 0.0,
        "drums": bool(tags and (tags.drums > 0.5) == metadata["drums"]),
        "style": bool(tags and tags.style == metadata["style"]),
        "tempo": _near(bpm, metadata["bpm"]),
        "tempo octave": any(_near(bpm, share * metadata["bpm"]) for share in OCTAVES),
        "key": (found.tonic, found.mode) == (metadata["key"], metadata["mode"]),
        "mode": found.mode == metadata["mode"],
        "end": abs(found.end - seconds) <= END_TOLERANCE,
        "width": abs(found.width - width) <= WIDTH_TOLERANCE_DB,
    }
    told = facts_told(prompt, metadata)
    unsaid = {"tempo", "tempo octave", "key", "mode", "style", "drums"} - told
    unsaid -= {"tempo octave"} if "tempo" in told else set()
    return {name: float(value) for name, value in right.items() if name not in unsaid}


def _near(bpm: float, wanted: float) -> bool:
    return abs(bpm - wanted) <= TEMPO_TOLERANCE * wanted
