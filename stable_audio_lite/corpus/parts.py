"""The parts by role: melody, chords, pad, arpeggio, bass and drums as `Event`s in beats."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from stable_audio_lite.corpus import styles as kit
from stable_audio_lite.corpus.harmony import Chord, nearest_pitch, voicing
from stable_audio_lite.corpus.instruments import Instrument
from stable_audio_lite.corpus.styles import Style

STEP = 0.25
"""A pattern's step in beats (a sixteenth)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """A note in musical time: MIDI pitch, start and length in beats, velocity from 0 to 1."""

    pitch: int
    beat: float
    length: float
    velocity: float


@dataclass(frozen=True, kw_only=True)
class Score:
    """The plan that all parts share: style, tempo, bars, the tune's entry, chords up to the last one, and that one.

    `form` names each bar's section ("A" or "B"); bars of one section share patterns and motifs.
    """

    style: Style
    bpm: int
    bars: int
    entry: int
    form: tuple[str, ...]
    chords: tuple[Chord, ...]
    final: Chord

    def chord_on(self, beat: float) -> Chord:
        """The chord that sounds at `beat`."""
        return next((c for c in reversed(self.chords) if c.start <= beat + 1e-6), self.chords[0])


def strokes(pattern: str) -> Iterator[tuple[float, str, float]]:
    """(beat, mark, length in beats) of each note in a pattern."""
    for step, mark in enumerate(pattern):
        if mark in "-.":
            continue
        held = len(pattern[step + 1 :]) - len(pattern[step + 1 :].lstrip("-"))
        yield step * STEP, mark, (1 + held) * STEP


def melody(rng: random.Random, score: Score, instrument: Instrument, center: float) -> list[Event]:
    """A tune of repeated motifs: strong notes are chord tones, the others move by step within an octave and a half."""
    low, high = max(instrument.low, round(center) - 9), min(instrument.high, round(center) + 10)
    motifs = {letter: [_motif(rng, score.style) for _ in range(3)] for letter in "AB"}
    events: list[Event] = []
    pitch = float(center)
    for bar in range(score.entry, score.bars):
        pattern, moves = motifs[score.form[bar]][(0, 1, 0, 2)[bar % 4]]
        for (offset, mark, length), move in zip(strokes(pattern), moves, strict=True):
            beat = bar * score.style.beats + offset
            step = move if rng.random() < 0.85 else rng.choice((-2, -1, 1, 2))
            pitch = _next_pitch(score.chord_on(beat), pitch, step, mark == "X", low, high)
            loud = 0.86 if mark == "X" else 0.74
            events.append(Event(pitch=int(pitch), beat=beat, length=length * 0.96, velocity=loud))
    return events


def _motif(rng: random.Random, style: Style) -> tuple[str, list[int]]:
    pattern = rng.choice(style.melody)
    count = sum(1 for _ in strokes(pattern))
    drift = rng.choice((-1, 1))
    return pattern, [rng.choice((drift, drift, -drift, 2 * drift, -2 * drift, 0, 3 * drift)) for _ in range(count)]


def _next_pitch(chord: Chord, pitch: float, step: int, strong: bool, low: int, high: int) -> int:
    ladder = [p for p in range(low, high + 1) if p % 12 in chord.scale]
    here = min(range(len(ladder)), key=lambda i: abs(ladder[i] - pitch))
    # A tune that would leave the range turns back rather than sticking to the edge.
    there = here + step if 0 <= here + step < len(ladder) else here - step
    target = ladder[max(0, min(len(ladder) - 1, there))]
    if not strong:
        return target
    return min((p for p in range(low, high + 1) if p % 12 in chord.tones), key=lambda p: abs(p - target))


def comping(rng: random.Random, score: Score, instrument: Instrument, center: float) -> list[Event]:
    """Chords in the style's rhythm."""
    patterns = {letter: rng.choice(score.style.comp) for letter in "AB"}
    strum = 0.02 if instrument.family in ("guitar", "strings") else 0.004
    events = []
    for bar in range(score.bars):
        for offset, mark, length in strokes(patterns[score.form[bar]]):
            beat = bar * score.style.beats + offset
            tones = tones_for(instrument, score.chord_on(beat))
            pitches = voicing(tones, center, instrument.low, instrument.high)
            loud = 0.68 if mark == "X" else 0.56
            events += [
                Event(pitch=p, beat=beat + i * strum, length=length * 0.9, velocity=loud) for i, p in enumerate(pitches)
            ]
    return events


def tones_for(instrument: Instrument, chord: Chord) -> tuple[int, ...]:
    """The chord's tones; a distorted guitar leaves out all but root and fifth, as thirds turn to mud."""
    return (chord.tones[0], chord.tones[2]) if instrument.name == "distorted guitar" else chord.tones


def pad(score: Score, instrument: Instrument, center: float) -> list[Event]:
    """Held chords, each as long as its harmony."""
    return [
        Event(pitch=pitch, beat=chord.start, length=chord.length * 0.98, velocity=0.6)
        for chord in score.chords
        for pitch in voicing(chord.tones, center, instrument.low, instrument.high)
    ]


def arpeggio(rng: random.Random, score: Score, instrument: Instrument, center: float) -> list[Event]:
    """Broken chords in eighths, or in sixteenths where the tempo leaves room."""
    pace = rng.choice((0.25, 0.5)) if score.bpm < 104 else 0.5
    shape = rng.choice(((0, 1, 2, 3), (0, 2, 1, 2), (3, 2, 1, 0), (0, 1, 2, 3, 2, 1)))
    events = []
    for index in range(round(score.bars * score.style.beats / pace)):
        beat = index * pace
        tones = score.chord_on(beat).tones[:3]
        close = voicing(tones, center, instrument.low, instrument.high)
        ladder = [*close, close[0] + 12 if close[0] + 12 <= instrument.high else close[-1]]
        loud = 0.72 if beat % 1 == 0 else 0.6
        pitch = ladder[shape[index % len(shape)]]
        events.append(Event(pitch=pitch, beat=beat, length=pace * 1.4, velocity=loud))
    return events


def bassline(rng: random.Random, score: Score, instrument: Instrument) -> list[Event]:
    """The style's bass figure on each chord's root."""
    patterns = {letter: rng.choice(score.style.bassline) for letter in "AB"}
    center = instrument.low + 10
    events = []
    for bar in range(score.bars):
        for offset, mark, length in strokes(patterns[score.form[bar]]):
            beat = bar * score.style.beats + offset
            pitch = _bass_pitch(rng, score, beat, mark, center, instrument)
            loud = 0.84 if offset == 0 else 0.74
            events.append(Event(pitch=pitch, beat=beat, length=length * 0.92, velocity=loud))
    return events


def _bass_pitch(rng: random.Random, score: Score, beat: float, mark: str, center: float, instrument: Instrument) -> int:
    tones = score.chord_on(beat).tones
    root = nearest_pitch(tones[0], center, instrument.low, instrument.high)
    if mark == "a":
        bar_end = (int(beat // score.style.beats) + 1) * score.style.beats
        last = bar_end >= score.bars * score.style.beats
        coming = score.final if last else score.chord_on(bar_end)
        goal = nearest_pitch(coming.tones[0], center, instrument.low, instrument.high)
        pitch = goal + rng.choice((-1, 1, 2))
    elif mark == "3":
        pitch = root + (tones[1] - tones[0]) % 12
    elif mark == "5":
        pitch = root + (tones[2] - tones[0]) % 12
    else:
        pitch = root + (12 if mark == "8" else 0)
    return max(instrument.low, pitch) if pitch <= instrument.high else pitch - 12


def drumming(rng: random.Random, score: Score, alone: bool) -> list[Event]:
    """The style's beat with a crash on the downbeat, fills before each fourth bar and a last stroke with the chord.

    `alone` means that nobody else plays an opening bar.
    """
    grooves = {letter: rng.choice(score.style.drums) for letter in "AB"}
    silent = rng.random() < 0.4 and not alone
    events: list[Event] = []
    for bar in range(score.bars):
        start = bar * score.style.beats
        fill = bar == score.entry - 1 or (bar % 4 == 3 and rng.random() < 0.6)
        until = score.style.beats - 1 if fill else score.style.beats
        if bar >= score.entry or not silent:
            events += _groove(grooves[score.form[bar]], start, until)
        if fill:
            events += _fill(rng, start + until)
    if score.style.beats == 4 and not score.style.calm:
        events.append(Event(pitch=kit.CRASH, beat=score.entry * 4, length=1, velocity=0.7))
    end = score.final.start
    events.append(Event(pitch=kit.KICK, beat=end, length=0.5, velocity=0.85))
    events.append(Event(pitch=kit.RIDE if score.style.calm else kit.CRASH, beat=end, length=1, velocity=0.75))
    return events


def _groove(groove: dict[int, str], start: float, until: float) -> list[Event]:
    quiet = (kit.HAT, kit.SHAKER, kit.PEDAL, kit.OPEN_HAT, kit.RIDE)
    return [
        Event(
            pitch=pitch,
            beat=start + offset,
            length=STEP,
            velocity=(0.9 if mark == "X" else 0.66) * (0.75 if pitch in quiet else 1.0),
        )
        for pitch, pattern in groove.items()
        for offset, mark, _ in strokes(pattern)
        if offset < until
    ]


def _fill(rng: random.Random, start: float) -> list[Event]:
    figure = rng.choice(((0, 1, 2, 3), (0, 2, 3), (0, 1, 2)))
    drums = rng.choice(((kit.SNARE,) * 4, (kit.SNARE, kit.TOM_HIGH, kit.TOM_HIGH, kit.TOM_LOW)))
    return [Event(pitch=drums[s], beat=start + s * STEP, length=STEP, velocity=0.66 + 0.06 * s) for s in figure]


def closing(score: Score, instrument: Instrument, pitches: list[int], roll: float) -> list[Event]:
    """The last chord, rolled from the bottom by `roll` beats a note; a "short" instrument keeps striking it softly."""
    chord = score.final
    if instrument.decay != "short":
        return [
            Event(pitch=p, beat=chord.start + i * roll, length=chord.length - i * roll, velocity=0.78)
            for i, p in enumerate(pitches)
        ]
    count = max(1, int(chord.length / STEP))
    return [
        Event(pitch=p, beat=chord.start + i * STEP, length=STEP * 0.9, velocity=0.8 - 0.4 * i / count)
        for i in range(count)
        for p in ([pitches[i % len(pitches)]] if i else pitches)
    ]
