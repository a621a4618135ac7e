"""Keys, scales and chords: pitch classes are 0 (C) to 11 (B), degrees 1 to 7, times in beats."""

from __future__ import annotations

from dataclasses import dataclass

KEYS = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
_SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}


@dataclass(frozen=True, kw_only=True)
class Chord:
    """A chord that sounds from `start` for `length` (beats); `tones` are pitch classes, the root first."""

    start: float
    length: float
    tones: tuple[int, ...]
    scale: tuple[int, ...]


def chord_at(tonic: int, mode: str, degree: int, sevenths: str, start: float, length: float) -> Chord:
    """The chord on a scale degree, stacked in thirds; `sevenths` as in `styles.Style`.

    Over a minor key's dominant the leading tone is raised (harmonic minor).
    """
    steps = list(_SCALES[mode])
    if mode == "minor" and degree == 5:
        steps[6] = 11
    scale = tuple((tonic + step) % 12 for step in steps)
    tones = [scale[(degree - 1 + step) % 7] for step in (0, 2, 4)]
    if sevenths == "diatonic":
        tones.append(scale[(degree + 5) % 7])
    elif sevenths == "dominant":
        tones.append((tones[0] + 10) % 12)
    return Chord(start=start, length=length, tones=tuple(tones), scale=scale)


def progression(degrees: tuple[int, ...], bars: int, mode: str) -> list[int]:
    """Degrees for `bars` bars that start as the pattern does and end on a chord that leads home (5, or 7 or 4)."""
    found = [degrees[bar % len(degrees)] for bar in range(bars)]
    if found[-1] not in (5, 7) or (mode == "major" and found[-1] == 7):
        found[-1] = 5
    if bars >= 4 and found[-2] in (5, 7):
        found[-2] = 4
    return found


def nearest_pitch(pitch_class: int, target: float, low: int, high: int) -> int:
    """The pitch of a class that is nearest to `target` within low..high (a range of at least an octave)."""
    candidates = [pitch for pitch in range(low, high + 1) if pitch % 12 == pitch_class]
    return min(candidates, key=lambda pitch: (abs(pitch - target), pitch))


def voicing(tones: tuple[int, ...], center: float, low: int, high: int) -> list[int]:
    """A close voicing round `center`: one pitch per tone, ascending, within low..high."""
    return sorted({nearest_pitch(tone, center, low, high) for tone in tones})
