"""Composition of one piece: a pure function of the seed, the split and the item's number.

The length is drawn first; the tempo and the number of bars are then chosen so that the last chord, a held tonic,
fills what is left and everything has died away when the recording ends. Anything shorter than `SHORTEST_WHOLE` is the
beginning of such a piece.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from stable_audio_lite.corpus import parts as play
from stable_audio_lite.corpus.harmony import KEYS, Chord, chord_at, nearest_pitch, progression, voicing
from stable_audio_lite.corpus.instruments import INSTRUMENTS, Instrument, balanced, playing
from stable_audio_lite.corpus.parts import Event, Score
from stable_audio_lite.corpus.piece import DRUMS, ChordSpan, Note, Part, Piece
from stable_audio_lite.corpus.styles import STYLES, Style
from stable_audio_lite.errors import UserError

LEAD_IN = 0.03
"""Seconds of silence before the first note."""
TAIL = 0.5
"""Seconds left after the last note for its release and the room."""
SHORTEST_HOLD, LONGEST_HOLD = 1.0, 3.2
SHORTEST_WHOLE = 4.0
"""Seconds in which a bar and a last chord fit, in the faster styles."""
PART_COUNTS = ((1, 0.4), (2, 0.25), (3, 0.2), (4, 0.15))
MAX_PARTS = len(PART_COUNTS)
SOLO_DRUMS = 0.25
_LINE_UPS: dict[int, list[tuple[str, ...]]] = {
    1: [("solo",)],
    2: [("lead", "chords"), ("lead", "chords"), ("lead", "bass"), ("lead", "arpeggio"), ("lead", "pad")],
    3: [
        ("lead", "chords", "bass"),
        ("lead", "chords", "bass"),
        ("lead", "pad", "bass"),
        ("lead", "arpeggio", "bass"),
        ("lead", "arpeggio", "pad"),
    ],
    4: [("lead", "chords", "pad", "bass"), ("lead", "chords", "arpeggio", "bass"), ("lead", "arpeggio", "pad", "bass")],
}
"""Roles by how many play; those that are listed twice are drawn twice as often."""


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Contents of a corpus, checked on construction.

    Attributes:
        items, held_out: numbers of training pieces and of held-out ones.
        min_seconds, max_seconds: range of their lengths, within 2 to 60.
        max_parts: largest number of instruments in a piece, not counting drums.
        tempo_step: tempos are multiples of it, in beats per minute, where the style allows one.
        instruments, styles: names to draw from.
        drums: allow drums.

    Raises:
        UserError: a value is out of range.
    """

    items: int
    held_out: int
    seed: int = 0
    min_seconds: float = 4.0
    max_seconds: float = 30.0
    max_parts: int = MAX_PARTS
    tempo_step: int = 1
    instruments: tuple[str, ...] = tuple(INSTRUMENTS)
    styles: tuple[str, ...] = tuple(STYLES)
    drums: bool = True
    audio_format: Literal["flac", "wav"] = "flac"

    def __post_init__(self) -> None:
        if self.items < 1:
            raise UserError(f"items must be at least 1, got {self.items}")
        if self.held_out < 0:
            raise UserError(f"held_out can't be negative, got {self.held_out}")
        for name, seconds in (("min_seconds", self.min_seconds), ("max_seconds", self.max_seconds)):
            if not 2 <= seconds <= 60:
                raise UserError(f"{name} must lie in 2..60, got {seconds:g}")
        if self.min_seconds > self.max_seconds:
            raise UserError(f"min_seconds ({self.min_seconds:g}) is more than max_seconds ({self.max_seconds:g})")
        if not 1 <= self.max_parts <= MAX_PARTS:
            raise UserError(f"max_parts must lie in 1..{MAX_PARTS}, got {self.max_parts}")
        if not 1 <= self.tempo_step <= 30:
            raise UserError(f"tempo_step must lie in 1..30, got {self.tempo_step}")
        for name, known in (("instruments", INSTRUMENTS), ("styles", STYLES)):
            chosen = getattr(self, name)
            if not chosen or len(set(chosen)) < len(chosen):
                raise UserError(f"{name} must name one or several, each once, got {', '.join(chosen) or 'none'}")
            if unknown := next((word for word in chosen if word not in known), None):
                raise UserError(f"{name}: {unknown!r} is not known; choose from {', '.join(known)}")
        if self.audio_format not in ("flac", "wav"):
            raise UserError(f"audio_format must be flac or wav, got {self.audio_format!r}")


@dataclass(frozen=True, kw_only=True)
class _TempoMap:
    """Time in seconds of each beat: swing within the beat, a slowing last bar, a steady pulse elsewhere."""

    spb: float
    swing: float
    slow_from: float
    slow_beats: float
    slowing: float

    def seconds(self, beat: float) -> float:
        within = beat % 1
        beat += self.swing * (within / 0.5 if within < 0.5 else (1 - within) / 0.5)
        late = min(max(beat - self.slow_from, 0.0), self.slow_beats)
        return LEAD_IN + self.spb * (beat + self.slowing * late * late / self.slow_beats)


def compose(config: CorpusConfig, split: str, index: int) -> Piece:
    """Compose item `index` of `split`, independently of all other items and of how many there are."""
    rng = random.Random(f"{config.seed}/{split}/{index}")
    wanted = round(rng.uniform(config.min_seconds, config.max_seconds), 1)
    wanted = min(max(wanted, config.min_seconds), config.max_seconds)
    seconds = max(wanted, SHORTEST_WHOLE)
    line_ups = {
        count: [roles for roles in _LINE_UPS[count] if _castable(roles, config.instruments)]
        for count in range(1, config.max_parts + 1)
    }
    counts = [(n, weight) for n, weight in PART_COUNTS[: config.max_parts] if line_ups[n]]
    count = rng.choices([n for n, _ in counts], [w for _, w in counts])[0]
    fitting = [name for name in config.styles if _shortest(STYLES[name]) <= seconds]
    style = STYLES[rng.choice(fitting or [min(config.styles, key=lambda name: _shortest(STYLES[name]))])]
    parts = _cast(rng, style, line_ups[count], config.instruments)
    drummed = (
        config.drums and style.drums_chance > 0 and rng.random() < (style.drums_chance if count > 1 else SOLO_DRUMS)
    )
    slowing = rng.uniform(0.04, 0.12) if style.calm else rng.choice((0.0, 0.0, 0.05))
    bpm, bars = _tempo(rng, style, seconds, slowing, config.tempo_step)
    tonic, mode = rng.randrange(12), rng.choice(("major", "minor"))
    tempo_map = _TempoMap(
        spb=60 / bpm, swing=style.swing, slow_from=(bars - 1) * style.beats, slow_beats=style.beats, slowing=slowing
    )
    hold = (seconds - TAIL - tempo_map.seconds(bars * style.beats)) / tempo_map.spb
    score = _score(rng, style, bpm, bars, tonic, mode, hold, drummed or count > 1)
    notes = []
    for number, part in enumerate(parts):
        events = _written(rng, score, INSTRUMENTS[part.instrument], part.role)
        notes += _humanise(rng, score, events, number, tempo_map, seconds)
    if drummed:
        notes += _humanise(rng, score, play.drumming(rng, score, alone=count == 1), DRUMS, tempo_map, seconds)
    piece = Piece(
        seed=config.seed,
        split=split,
        index=index,
        seconds=seconds,
        style=style.name,
        key=KEYS[tonic],
        mode=mode,
        bpm=bpm,
        drums=drummed,
        parts=tuple(parts),
        chords=_spans(score, tempo_map, seconds),
        notes=tuple(sorted(notes, key=lambda n: (n.start, n.part, n.pitch))),
    )
    return piece if wanted == seconds else _beginning(piece, wanted)


def _beginning(piece: Piece, seconds: float) -> Piece:
    """Keep the first `seconds` of a piece: notes stop `TAIL` before the end, parts that begin later are left out."""
    end = seconds - TAIL
    notes = [replace(n, duration=round(min(n.duration, end - n.start), 3)) for n in piece.notes if n.start < end - 0.05]
    playing = sorted({note.part for note in notes} - {DRUMS})
    number = {part: place for place, part in enumerate(playing)} | {DRUMS: DRUMS}
    return replace(
        piece,
        seconds=seconds,
        drums=any(note.part == DRUMS for note in notes),
        parts=tuple(piece.parts[part] for part in playing),
        chords=tuple(replace(c, duration=min(c.duration, end - c.start)) for c in piece.chords if c.start < end),
        notes=tuple(replace(note, part=number[note.part]) for note in notes),
    )


def _shortest(style: Style) -> float:
    """Duration of a bar and a last chord, in seconds."""
    return style.beats * 60 / style.tempo[1] * 1.12 + LEAD_IN + TAIL + SHORTEST_HOLD


def _tempo(rng: random.Random, style: Style, seconds: float, slowing: float, step: int) -> tuple[int, int]:
    """Draw a tempo whose bars leave a last chord of agreeable length, and the number of bars before that chord."""
    room = seconds - LEAD_IN - TAIL
    slowest, fastest = style.tempo
    tempos = [bpm for bpm in range(slowest, fastest + 1) if bpm % step == 0] or [fastest]
    best = (math.inf, tempos[-1], 1)
    for _ in range(24):
        bpm = rng.choice(tempos)
        bar = style.beats * 60 / bpm
        bars = math.floor((room - SHORTEST_HOLD) / bar - slowing)
        hold = room - bar * (bars + slowing)
        if bars >= 1 and hold <= LONGEST_HOLD:
            return bpm, bars
        if bars >= 1:
            best = min(best, (hold, bpm, bars))
    return best[1], best[2]


def _castable(roles: Sequence[str], free: Sequence[str]) -> bool:
    """Check that each role finds an instrument of its own among `free`."""
    if not roles:
        return True
    able = playing(roles[0])
    return any(_castable(roles[1:], [n for n in free if n != name]) for name in free if name in able)


def _cast(rng: random.Random, style: Style, line_ups: list[tuple[str, ...]], instruments: Sequence[str]) -> list[Part]:
    """Draw the instruments. Solo pieces take any of them, in every style; groups lean on the style's own."""
    roles = rng.choice(line_ups)
    if roles == ("solo",):
        name = rng.choice(list(instruments))
        return [Part(instrument=name, role="solo", pan=round(rng.uniform(-0.2, 0.2), 2), volume=balanced(name, 110))]
    taken: list[str] = []
    for number, role in enumerate(roles):
        free = [n for n in instruments if n not in taken]
        able = [n for n in playing(role) if n in free and _castable(roles[number + 1 :], [o for o in free if o != n])]
        typical = {"lead": style.lead, "chords": style.chords, "bass": style.bass}.get(role, ())
        pool = [n for n in able if n in typical] if typical and rng.random() < 0.5 else able
        taken.append(rng.choice(pool or able))
    side = rng.choice((-1, 1))
    places = {"lead": 0.15, "chords": -0.5, "pad": 0.35, "arpeggio": 0.6, "bass": 0.0}
    volumes = {"lead": 115, "chords": 88, "pad": 80, "arpeggio": 88, "bass": 104}
    return [
        Part(
            instrument=name,
            role=role,
            pan=round(places[role] * side + rng.uniform(-0.15, 0.15), 2),
            volume=balanced(name, volumes[role] + rng.randint(-5, 5)),
        )
        for name, role in zip(taken, roles, strict=True)
    ]


def _score(
    rng: random.Random, style: Style, bpm: int, bars: int, tonic: int, mode: str, hold: float, accompanied: bool
) -> Score:
    plans = style.major if mode == "major" else style.minor
    sections = {letter: rng.choice(plans) for letter in "AB"}
    form = tuple("AABA"[bar // 4 % 4] for bar in range(bars))
    degrees = progression(tuple(sections[form[bar]][bar % 4] for bar in range(bars)), bars, mode)
    chords: list[Chord] = []
    for bar, degree in enumerate(degrees):
        split = (1, degree) if bars == 1 else (degree,)
        length = style.beats / len(split)
        for half, each in enumerate(split):
            start = bar * style.beats + half * length
            chords.append(chord_at(tonic, mode, each, style.sevenths, start, length))
    # An opening bar without the tune, where there is room for one and someone to play it.
    opening = accompanied and bars >= 4 and style.beats * 60 / bpm <= 3 and rng.random() < 0.5
    final = chord_at(tonic, mode, 1, "none", bars * style.beats, hold)
    return Score(style=style, bpm=bpm, bars=bars, entry=int(opening), form=form, chords=tuple(chords), final=final)


def _written(rng: random.Random, score: Score, instrument: Instrument, role: str) -> list[Event]:
    """Write everything that one part plays, its last chord included."""
    low, high = instrument.low, instrument.high
    middle = min(max(57, low + 7), high - 7)
    roll = 0.06 if instrument.family in ("guitar", "strings", "piano") and instrument.decay == "long" else 0.0
    triad = voicing(play.tones_for(instrument, score.final), middle, low, high)
    if role == "bass" or (role == "solo" and instrument.solo == "bass"):
        root = nearest_pitch(score.final.tones[0], low + 10, low, high)
        return play.bassline(rng, score, instrument) + play.closing(score, instrument, [root], 0)
    if role == "chords":
        return play.comping(rng, score, instrument, middle) + play.closing(score, instrument, triad, roll)
    if role == "pad":
        return play.pad(score, instrument, middle) + play.closing(score, instrument, triad, 0)
    if role == "arpeggio":
        middle = min(max(64, low + 7), high - 9)
        triad = voicing(score.final.tones, middle, low, high)
        return play.arpeggio(rng, score, instrument, middle) + play.closing(score, instrument, triad, 0.12)
    return _tune(rng, score, instrument, role == "solo", roll)


def _tune(rng: random.Random, score: Score, instrument: Instrument, alone: bool, roll: float) -> list[Event]:
    """Write a lead; an instrument that plays alone also accompanies itself if it can."""
    low, high = instrument.low, instrument.high
    center = min(low + 0.58 * (high - low), 76) if high - low > 30 else (low + high) / 2
    center = max(center, low + 9)
    below = max(low + 6.0, center - 17)
    solo = instrument.solo if alone else "line"
    events = play.melody(rng, score, instrument, center)
    last = nearest_pitch(score.final.tones[0], events[-1].pitch if events else center, low, high)
    pitches, accompaniment = [last], []
    if solo == "keys":
        accompany = rng.choice((play.comping, play.arpeggio))
        accompaniment = accompany(rng, score, instrument, below)
    elif solo == "chorale":
        accompaniment = play.pad(score, instrument, below)
    if solo != "line":
        root = nearest_pitch(score.final.tones[0], below - 6, low, high)
        pitches = sorted({root, *voicing(score.final.tones, below, low, high), last})
    events += [replace(event, velocity=event.velocity * 0.85) for event in accompaniment]
    return events + play.closing(score, instrument, pitches, roll)


def _humanise(
    rng: random.Random, score: Score, events: list[Event], part: int, tempo_map: _TempoMap, seconds: float
) -> list[Note]:
    """Give events seconds and MIDI velocities that breathe, and keep a pitch from overlapping itself."""
    lag, loose = rng.gauss(0, 0.004), 0.004 if part == DRUMS else 0.007
    base = rng.uniform(104, 118) * (0.88 if score.style.calm else 1.0)
    phrase = score.style.beats * 4
    end = seconds - TAIL
    notes: dict[int, list[Note]] = defaultdict(list)
    for event in sorted(events, key=lambda e: (e.beat, e.pitch, -e.velocity)):
        shift = min(max(lag + rng.gauss(0, loose), -0.02), 0.02)
        start = min(max(tempo_map.seconds(event.beat) + shift, 0.0), end - 0.05)
        stop = min(max(tempo_map.seconds(event.beat + event.length), start + 0.04), end)
        swell = 1 + 0.06 * math.sin(2 * math.pi * event.beat / phrase) + rng.gauss(0, 0.03)
        velocity = min(max(round(base * event.velocity * swell), 20), 127)
        start, stop = round(start, 3), round(stop, 3)
        row = notes[event.pitch]
        if row and start - row[-1].start < 0.03:
            continue
        if row and row[-1].start + row[-1].duration > start - 0.01:
            row[-1] = replace(row[-1], duration=round(max(start - 0.01 - row[-1].start, 0.01), 3))
        row.append(Note(part=part, pitch=event.pitch, start=start, duration=round(stop - start, 3), velocity=velocity))
    return [note for row in notes.values() for note in row]


def _spans(score: Score, tempo_map: _TempoMap, seconds: float) -> tuple[ChordSpan, ...]:
    chords = (*score.chords, score.final)
    bounds = [*(round(tempo_map.seconds(chord.start), 3) for chord in chords), round(seconds - TAIL, 3)]
    return tuple(
        ChordSpan(start=start, duration=round(stop - start, 3), tones=chord.tones)
        for chord, (start, stop) in zip(chords, pairwise(bounds), strict=True)
    )
