"""The instruments of the corpus: General-MIDI program, range, roles, and the names that people use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Instrument:
    """One General-MIDI instrument.

    `low` and `high` are MIDI pitches (both playable). `roles` are the parts it takes: lead, chords, pad, arpeggio,
    bass. `solo` says how it plays alone: "keys" (melody over its own accompaniment), "chorale" (held chords under a
    melody), "line" (one note at a time) or "bass". `decay` is "held" (sounds until released), "long" or "short" (dies
    away; a final "short" note is rolled). `loudness` is measured: that of the same phrase on each in FluidR3_GM, in dB
    against -29 dBFS RMS, so that parts can be balanced. `names` are the caption words, the canonical one first.
    """

    name: str
    program: int
    family: str
    low: int
    high: int
    roles: tuple[str, ...]
    solo: str
    decay: str
    loudness: float
    names: tuple[str, ...]


# names, program, family, lowest and highest pitch, roles, solo, decay, loudness
_ROWS = (
    ("piano/grand piano/acoustic piano", 0, "piano", 36, 96, "lead chords arpeggio", "keys", "long", -1.5),
    ("electric piano/rhodes/e-piano", 4, "piano", 36, 91, "lead chords arpeggio", "keys", "long", 4.8),
    ("harpsichord/baroque harpsichord", 6, "piano", 36, 86, "lead chords arpeggio", "keys", "long", 1.7),
    ("glockenspiel/orchestra bells", 9, "mallets", 76, 103, "lead arpeggio", "line", "long", 0.0),
    ("music box/musical box", 10, "mallets", 67, 100, "lead arpeggio", "keys", "long", 1.7),
    ("vibraphone/vibes/vibraharp", 11, "mallets", 53, 89, "lead chords arpeggio", "keys", "long", -0.9),
    ("marimba/wooden marimba", 12, "mallets", 48, 91, "lead chords arpeggio", "keys", "short", 2.5),
    ("hammond organ/electric organ/drawbar organ", 16, "organ", 43, 91, "lead chords pad", "chorale", "held", 1.8),
    ("church organ/pipe organ", 19, "organ", 36, 88, "lead chords pad", "chorale", "held", 1.7),
    ("accordion/squeezebox", 21, "organ", 53, 86, "lead chords pad", "chorale", "held", -0.9),
    ("acoustic guitar/nylon guitar/spanish guitar", 24, "guitar", 40, 79, "lead chords arpeggio", "keys", "long", 3.3),
    ("electric guitar/clean electric guitar", 27, "guitar", 40, 81, "lead chords arpeggio", "keys", "long", -0.2),
    ("distorted guitar/distortion guitar/overdriven guitar", 30, "guitar", 40, 79, "lead chords", "line", "held", 5.7),
    ("banjo/five-string banjo", 105, "guitar", 48, 79, "lead chords arpeggio", "keys", "short", 0.5),
    ("double bass/upright bass/acoustic bass", 32, "bass", 28, 55, "bass", "bass", "long", 4.6),
    ("electric bass/bass guitar/fingered bass", 33, "bass", 28, 55, "bass", "bass", "long", 4.3),
    ("synth bass/synthesizer bass", 38, "bass", 28, 55, "bass", "bass", "held", 3.0),
    ("violin/fiddle", 40, "strings", 55, 93, "lead", "line", "held", 2.1),
    ("cello/violoncello", 42, "strings", 36, 69, "lead bass", "line", "held", 1.2),
    (
        "string ensemble/strings/string section/orchestral strings",
        48,
        "strings",
        43,
        88,
        "lead pad chords",
        "chorale",
        "held",
        1.1,
    ),
    ("harp/concert harp", 46, "strings", 36, 91, "lead arpeggio chords", "keys", "long", 3.1),
    ("choir/choir voices/vocal choir", 52, "voice", 48, 79, "lead pad", "chorale", "held", 0.3),
    ("trumpet/brass trumpet", 56, "brass", 55, 82, "lead", "line", "held", 0.6),
    ("trombone/slide trombone", 57, "brass", 40, 70, "lead", "line", "held", 5.4),
    ("french horn/orchestral horn", 60, "brass", 43, 74, "lead pad", "line", "held", 4.2),
    ("saxophone/sax/tenor sax/tenor saxophone", 66, "woodwind", 44, 75, "lead", "line", "held", 4.5),
    ("oboe/orchestral oboe", 68, "woodwind", 58, 88, "lead", "line", "held", 3.9),
    ("clarinet/wooden clarinet", 71, "woodwind", 50, 86, "lead", "line", "held", 4.7),
    ("flute/concert flute/transverse flute", 73, "woodwind", 60, 93, "lead", "line", "held", 5.9),
    ("pan flute/panpipes/pan pipes", 75, "woodwind", 60, 88, "lead", "line", "held", 3.7),
    ("synth lead/lead synth/sawtooth synth/saw lead", 81, "synth", 48, 88, "lead arpeggio", "line", "held", 1.3),
    ("synth pad/soft synth pad/pad synth", 89, "synth", 43, 84, "pad", "chorale", "held", -2.1),
)

INSTRUMENTS: dict[str, Instrument] = {
    names.split("/")[0]: Instrument(
        name=names.split("/")[0],
        program=program,
        family=family,
        low=low,
        high=high,
        roles=tuple(roles.split()),
        solo=solo,
        decay=decay,
        loudness=loudness,
        names=tuple(names.split("/")),
    )
    for names, program, family, low, high, roles, solo, decay, loudness in _ROWS
}

# Words that stand for several instruments; true whenever one of them plays.
GENERIC: dict[str, tuple[str, ...]] = {
    "guitar": ("acoustic guitar", "electric guitar", "distorted guitar"),
    "organ": ("hammond organ", "church organ"),
    "bass": ("double bass", "electric bass", "synth bass"),
    "synth": ("synth lead", "synth pad", "synth bass"),
    "synthesizer": ("synth lead", "synth pad", "synth bass"),
    "horn": ("french horn",),
}


def balanced(name: str, volume: int) -> int:
    """MIDI volume at which instrument `name` is about as loud as the others are at `volume`."""
    # General MIDI's volume controller attenuates by 40 log10(volume / 127) dB.
    return min(127, round(volume * 10 ** (-INSTRUMENTS[name].loudness / 40)))


def caption_names(name: str) -> tuple[str, ...]:
    """Every word that captions may use for instrument `name`, the canonical one first."""
    return INSTRUMENTS[name].names + tuple(word for word, owners in GENERIC.items() if name in owners)


def playing(role: str) -> tuple[str, ...]:
    """Names of the instruments that can take `role`; all can play solo."""
    return tuple(name for name, instrument in INSTRUMENTS.items() if role == "solo" or role in instrument.roles)
