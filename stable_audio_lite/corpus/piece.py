"""A composed `Piece`: its ground truth, its parts and every note, with times in seconds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from stable_audio_lite.corpus.instruments import INSTRUMENTS

DRUMS = -1
"""The part number of the drum kit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """One note: `part` indexes `Piece.parts` (or is `DRUMS`), `pitch` and `velocity` are MIDI, times are seconds."""

    part: int
    pitch: int
    start: float
    duration: float
    velocity: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One instrument of a piece; `pan` runs from -1 (left) to 1 (right), `volume` is MIDI volume."""

    instrument: str
    role: str
    pan: float
    volume: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ChordSpan:
    """The chord that sounds from `start` for `duration` seconds; `tones` are pitch classes, the root first."""

    start: float
    duration: float
    tones: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A composed piece. `seconds` is the exact length of its recording; `parts` has the lead first, drums apart."""

    seed: int
    split: str
    index: int
    seconds: float
    style: str
    key: str
    mode: str
    bpm: int
    drums: bool
    parts: tuple[Part, ...]
    chords: tuple[ChordSpan, ...]
    notes: tuple[Note, ...]

    @property
    def instruments(self) -> list[str]:
        """Names of the instruments, lead first, without drums."""
        return [part.instrument for part in self.parts]

    @property
    def families(self) -> list[str]:
        """The family of each instrument, in the same order."""
        return [INSTRUMENTS[name].family for name in self.instruments]

    def events(self) -> dict[str, Any]:
        """Parts, chords and notes as plain JSON; a note is [part, pitch, start, duration, velocity]."""
        return {
            "parts": [dataclasses.asdict(part) for part in self.parts],
            "chords": [[span.start, span.duration, list(span.tones)] for span in self.chords],
            "notes": [[n.part, n.pitch, n.start, n.duration, n.velocity] for n in self.notes],
        }
