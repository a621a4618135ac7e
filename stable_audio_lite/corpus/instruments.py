"""The instruments of the corpus: General-MIDI program, range, roles, and the names that people use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Instrument:
    """One General-MIDI instrument.

    `low` and `high` are MIDI pitches (both playable). `roles` are the parts it takes: lead, chords, pad, arpeggio,
    bass. `solo` says how it plays alone: "keys" (melody over its own accompaniment), "chorale" (held chords under a
    melody), "line" (one note at a time) or "bass". `decay` is "held" (sounds until released), "long" or "short" (dies
    away; a final "short" note is rolled). `names` are the caption words, the canonical one first.
    """

    name: str
    program: int
    family: str
    low: int
    high: int
    roles: tuple[str, ...]
    solo: str
    decay: str
    names: tuple[str, ...]


def _make(
    names: str, program: int, family: str, span: tuple[int, int], roles: str, solo: str, decay: str = "held"
) -> Instrument:
    words = tuple(names.split("/"))
    return Instrument(
        name=words[0],
        program=program,
        family=family,
        low=span[0],
        high=span[1],
        roles=tuple(roles.split()),
        solo=solo,
        decay=decay,
        names=words,
    )


_ALL = (
    _make("piano/grand piano/acoustic piano", 0, "piano", (36, 96), "lead chords arpeggio", "keys", "long"),
    _make("electric piano/rhodes/e-piano", 4, "piano", (36, 91), "lead chords arpeggio", "keys", "long"),
    _make("harpsichord/baroque harpsichord", 6, "piano", (36, 86), "lead chords arpeggio", "keys", "long"),
    _make("glockenspiel/orchestra bells", 9, "mallets", (76, 103), "lead arpeggio", "line", "long"),
    _make("music box/musical box", 10, "mallets", (67, 100), "lead arpeggio", "keys", "long"),
    _make("vibraphone/vibes/vibraharp", 11, "mallets", (53, 89), "lead chords arpeggio", "keys", "long"),
    _make("marimba/wooden marimba", 12, "mallets", (48, 91), "lead chords arpeggio", "keys", "short"),
    _make("hammond organ/electric organ/drawbar organ", 16, "organ", (43, 91), "lead chords pad", "chorale"),
    _make("church organ/pipe organ", 19, "organ", (36, 88), "lead chords pad", "chorale"),
    _make("accordion/squeezebox", 21, "organ", (53, 86), "lead chords pad", "chorale"),
    _make(
        "acoustic guitar/nylon guitar/spanish guitar",
        24,
        "guitar",
        (40, 79),
        "lead chords arpeggio",
        "keys",
        "long",
    ),
    _make(
        "electric guitar/clean electric guitar",
        27,
        "guitar",
        (40, 81),
        "lead chords arpeggio",
        "keys",
        "long",
    ),
    _make("distorted guitar/distortion guitar/overdriven guitar", 30, "guitar", (40, 79), "lead chords", "line"),
    _make("banjo/five-string banjo", 105, "guitar", (48, 79), "lead chords arpeggio", "keys", "short"),
    _make("double bass/upright bass/acoustic bass", 32, "bass", (28, 55), "bass", "bass", "long"),
    _make("electric bass/bass guitar/fingered bass", 33, "bass", (28, 55), "bass", "bass", "long"),
    _make("synth bass/synthesizer bass", 38, "bass", (28, 55), "bass", "bass"),
    _make("violin/fiddle", 40, "strings", (55, 93), "lead", "line"),
    _make("cello/violoncello", 42, "strings", (36, 69), "lead bass", "line"),
    _make(
        "string ensemble/strings/string section/orchestral strings",
        48,
        "strings",
        (43, 88),
        "lead pad chords",
        "chorale",
    ),
    _make("harp/concert harp", 46, "strings", (36, 91), "lead arpeggio chords", "keys", "long"),
    _make("choir/choir voices/vocal choir", 52, "voice", (48, 79), "lead pad", "chorale"),
    _make("trumpet/brass trumpet", 56, "brass", (55, 82), "lead", "line"),
    _make("trombone/slide trombone", 57, "brass", (40, 70), "lead", "line"),
    _make("french horn/orchestral horn", 60, "brass", (43, 74), "lead pad", "line"),
    _make("saxophone/sax/tenor sax/tenor saxophone", 66, "woodwind", (44, 75), "lead", "line"),
    _make("oboe/orchestral oboe", 68, "woodwind", (58, 88), "lead", "line"),
    _make("clarinet/wooden clarinet", 71, "woodwind", (50, 86), "lead", "line"),
    _make("flute/concert flute/transverse flute", 73, "woodwind", (60, 93), "lead", "line"),
    _make("pan flute/panpipes/pan pipes", 75, "woodwind", (60, 88), "lead", "line"),
    _make("synth lead/lead synth/sawtooth synth/saw lead", 81, "synth", (48, 88), "lead arpeggio", "line"),
    _make("synth pad/soft synth pad/pad synth", 89, "synth", (43, 84), "pad", "chorale"),
)

INSTRUMENTS: dict[str, Instrument] = {instrument.name: instrument for instrument in _ALL}

# Words that stand for several instruments; true whenever one of them plays.
GENERIC: dict[str, tuple[str, ...]] = {
    "guitar": ("acoustic guitar", "electric guitar", "distorted guitar"),
    "organ": ("hammond organ", "church organ"),
    "bass": ("double bass", "electric bass", "synth bass"),
    "synth": ("synth lead", "synth pad", "synth bass"),
    "synthesizer": ("synth lead", "synth pad", "synth bass"),
    "horn": ("french horn",),
}


# Measured loudness of the same phrase on each in FluidR3_GM (dB against -29 dBFS RMS), so that parts can be balanced.
_LOUDNESS = {
    "synth pad": -2.1,
    "piano": -1.5,
    "vibraphone": -0.9,
    "accordion": -0.9,
    "electric guitar": -0.2,
    "glockenspiel": 0.0,
    "choir": 0.3,
    "banjo": 0.5,
    "trumpet": 0.6,
    "string ensemble": 1.1,
    "cello": 1.2,
    "synth lead": 1.3,
    "harpsichord": 1.7,
    "music box": 1.7,
    "church organ": 1.7,
    "hammond organ": 1.8,
    "violin": 2.1,
    "marimba": 2.5,
    "synth bass": 3.0,
    "harp": 3.1,
    "acoustic guitar": 3.3,
    "pan flute": 3.7,
    "oboe": 3.9,
    "french horn": 4.2,
    "electric bass": 4.3,
    "saxophone": 4.5,
    "double bass": 4.6,
    "clarinet": 4.7,
    "electric piano": 4.8,
    "trombone": 5.4,
    "distorted guitar": 5.7,
    "flute": 5.9,
}


def balanced(name: str, volume: int) -> int:
    """MIDI volume at which instrument `name` is about as loud as the others are at `volume`."""
    # General MIDI's volume controller attenuates by 40 log10(volume / 127) dB.
    return min(127, round(volume * 10 ** (-_LOUDNESS[name] / 40)))


def caption_names(name: str) -> tuple[str, ...]:
    """Every word that captions may use for instrument `name`, the canonical one first."""
    return INSTRUMENTS[name].names + tuple(word for word, owners in GENERIC.items() if name in owners)


def playing(role: str) -> tuple[str, ...]:
    """Names of the instruments that can take `role`; all can play solo."""
    return tuple(name for name, instrument in INSTRUMENTS.items() if role == "solo" or role in instrument.roles)
