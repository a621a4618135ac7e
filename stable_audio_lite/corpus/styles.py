"""The styles of the corpus, as data: tempo, chords, and rhythm, bass, drum and melody patterns.

A pattern is one bar of sixteenths (16 in 4/4, 12 in 3/4). In melody and chord patterns `X` starts a strong note, `x` a
plain one, `-` holds it and `.` is silence. In bass patterns the start names the tone: `1` root, `3` third, `5` fifth,
`8` octave, `a` a step towards the next chord's root. Progressions are scale degrees, one a bar.
"""

from __future__ import annotations

from dataclasses import dataclass

KICK, STICK, SNARE, CLAP, HAT, PEDAL, OPEN_HAT = 36, 37, 38, 39, 42, 44, 46
TOM_LOW, TOM_HIGH, CRASH, RIDE, TAMBOURINE, SHAKER, CONGA = 45, 50, 49, 51, 54, 70, 64


@dataclass(frozen=True, kw_only=True)
class Style:
    """One style. `tempo` is an inclusive bpm range, `swing` delays off-beat eighths (fraction of a beat).

    `sevenths` adds the seventh to chords ("none", "diatonic" or, for the blues, "dominant"), `calm` means a slowing
    end and softer playing. `lead`, `chords` and `bass` name typical instruments.
    """

    name: str
    words: tuple[str, ...]
    tempo: tuple[int, int]
    beats: int = 4
    swing: float = 0.0
    drums_chance: float = 0.6
    sevenths: str = "none"
    calm: bool = False
    major: tuple[tuple[int, ...], ...]
    minor: tuple[tuple[int, ...], ...]
    melody: tuple[str, ...]
    comp: tuple[str, ...]
    bassline: tuple[str, ...]
    drums: tuple[dict[int, str], ...]
    lead: tuple[str, ...]
    chords: tuple[str, ...]
    bass: tuple[str, ...]


_ALL = (
    Style(
        name="pop",
        words=("pop", "catchy pop", "mainstream pop", "radio pop"),
        tempo=(88, 132),
        drums_chance=0.7,
        major=((1, 5, 6, 4), (1, 6, 4, 5), (6, 4, 1, 5), (1, 4, 6, 5)),
        minor=((1, 6, 3, 7), (1, 4, 6, 5), (1, 7, 6, 7)),
        melody=("X-x-x---x-x-x---", "X---x-x---x-x---", "X-x-x-x-x---....", "..x-x-x-X---x---", "X--x--x-X---x-x-"),
        comp=("X---x---X---x---", "X-----x---x-x---", "X--x--x-X--x--x-"),
        bassline=("1---1-1-1---1-1-", "1-----1-1---5---", "1-1-1-1-1-1-1-a-"),
        drums=(
            {KICK: "X.......X.x.....", SNARE: "....X.......X...", HAT: "x.x.x.x.x.x.x.x."},
            {KICK: "X.....x.X.......", SNARE: "....X.......X..x", HAT: "X.x.X.x.X.x.X.x."},
        ),
        lead=("piano", "synth lead", "electric guitar", "violin", "saxophone"),
        chords=("piano", "electric piano", "acoustic guitar", "electric guitar", "synth pad"),
        bass=("electric bass", "synth bass"),
    ),
    Style(
        name="rock",
        words=("rock", "driving rock", "classic rock", "straight rock"),
        tempo=(104, 168),
        drums_chance=0.85,
        major=((1, 4, 5, 4), (1, 5, 4, 4), (1, 4, 1, 5)),
        minor=((1, 7, 6, 7), (1, 3, 7, 4), (1, 6, 7, 1)),
        melody=("X-x-x-x-X-x-x---", "X---X-x-x-x-X---", "X-x---x-X-x-x-x-", "X--x--x-X--x--x-"),
        comp=("X-x-x-x-X-x-x-x-", "X---x-x-X---x-x-", "X-----x-X-----x-"),
        bassline=("1-1-1-1-1-1-1-1-", "1-1-1-1-1-1-5-a-", "1---1-1-1-1-5-8-"),
        drums=(
            {KICK: "X.......X.X.....", SNARE: "....X.......X...", HAT: "X.x.X.x.X.x.X.x."},
            {KICK: "X..x....X..x....", SNARE: "....X.......X.x.", RIDE: "X...x...X...x..."},
        ),
        lead=("distorted guitar", "electric guitar", "hammond organ", "synth lead"),
        chords=("distorted guitar", "electric guitar", "hammond organ", "piano"),
        bass=("electric bass",),
    ),
    Style(
        name="jazz",
        words=("jazz", "jazzy", "swing jazz", "swinging jazz"),
        tempo=(96, 180),
        swing=0.16,
        drums_chance=0.6,
        sevenths="diatonic",
        major=((2, 5, 1, 6), (1, 6, 2, 5), (3, 6, 2, 5)),
        minor=((1, 4, 2, 5), (2, 5, 1, 6), (1, 6, 2, 5)),
        melody=("X-x-x-x-x-x-x---", "..x-x-x-X---..x-", "X---..x-x-x-x-x-", "x-x-x-X-----x-x-", "X-x-..x---x-x---"),
        comp=("X-....x-........", "..x-......X-....", "X-.....x--....x-", "....X-........x-"),
        bassline=("1---3---5---a---", "1---5---3---a---", "8---5---3---a---"),
        drums=(
            {RIDE: "X...x.x.X...x.x.", PEDAL: "....x.......x...", KICK: "x...............", STICK: "..............x."},
            {RIDE: "X...x.x.X...x.x.", PEDAL: "....x.......x...", SNARE: "......x........."},
        ),
        lead=("saxophone", "trumpet", "piano", "clarinet", "vibraphone", "trombone"),
        chords=("piano", "electric piano", "electric guitar", "vibraphone"),
        bass=("double bass",),
    ),
    Style(
        name="blues",
        words=("blues", "bluesy", "blues shuffle", "shuffling blues"),
        tempo=(64, 126),
        swing=0.17,
        drums_chance=0.6,
        sevenths="dominant",
        major=((1, 4, 1, 1), (1, 1, 4, 1), (1, 4, 1, 5)),
        minor=((1, 4, 1, 1), (1, 1, 4, 5), (1, 4, 1, 5)),
        melody=("X-x-x---..x-x---", "..x-x-x-X-------", "X---x-x-x---....", "x-X-----x-x-x---"),
        comp=("X---x-x-X---x-x-", "X-x-X-x-X-x-X-x-", "..x-..x-..x-..x-"),
        bassline=("1-1-3-3-5-5-a-a-", "1---3---5---a---", "1-1-5-5-8-8-5-5-"),
        drums=(
            {KICK: "X.......X.......", SNARE: "....X.......X...", HAT: "X.x.X.x.X.x.X.x."},
            {KICK: "X.....x.X.......", SNARE: "....X.......X...", RIDE: "X.x.X.x.X.x.X.x."},
        ),
        lead=("electric guitar", "saxophone", "piano", "hammond organ", "distorted guitar"),
        chords=("piano", "hammond organ", "electric guitar", "acoustic guitar"),
        bass=("electric bass", "double bass"),
    ),
    Style(
        name="classical",
        words=("classical", "classical-style", "concert hall classical"),
        tempo=(66, 138),
        drums_chance=0.0,
        calm=True,
        major=((1, 4, 5, 1), (1, 5, 6, 4), (1, 2, 5, 1), (1, 6, 4, 5)),
        minor=((1, 4, 5, 1), (1, 6, 4, 5), (1, 5, 1, 4)),
        melody=("X---x-x-x---x---", "X-x-x-x-X---x---", "X-----x-X-x-x-x-", "XxxxX-x-x-x-X---", "X-------x---x---"),
        comp=("x-x-x-x-x-x-x-x-", "X---x---x---x---", "X-------x-------"),
        bassline=("1-------5-------", "1---5---1---5---", "1---3---5---3---"),
        drums=({},),
        lead=("violin", "flute", "oboe", "piano", "harpsichord", "clarinet", "cello", "church organ"),
        chords=("piano", "harpsichord", "harp", "string ensemble"),
        bass=("cello", "double bass"),
    ),
    Style(
        name="waltz",
        words=("waltz", "3/4 waltz", "waltz-time", "dance waltz"),
        tempo=(84, 176),
        beats=3,
        drums_chance=0.25,
        calm=True,
        major=((1, 5, 5, 1), (1, 4, 5, 1), (1, 6, 2, 5)),
        minor=((1, 5, 5, 1), (1, 4, 5, 1), (1, 6, 4, 5)),
        melody=("X-------x---", "X---x---x---", "X-----x-x-x-", "X-x-x-x-x---", "X-----------"),
        comp=("....x-..x-..", "....X---x---"),
        bassline=("1---........", "1-------5---"),
        drums=({KICK: "X...........", HAT: "....x...x...", SNARE: "........x..."},),
        lead=("violin", "accordion", "clarinet", "flute", "piano", "music box"),
        chords=("piano", "accordion", "string ensemble", "acoustic guitar", "harp"),
        bass=("double bass", "cello"),
    ),
    Style(
        name="folk",
        words=("folk", "folk dance", "traditional folk", "folksy"),
        tempo=(84, 150),
        drums_chance=0.15,
        major=((1, 4, 1, 5), (1, 5, 4, 1), (1, 1, 4, 5)),
        minor=((1, 7, 1, 7), (1, 4, 7, 1), (1, 7, 6, 5)),
        melody=("X-x-x-x-X-x-x-x-", "X---x-x-X-x-x---", "X-xxx-x-X---x---", "X--xx-x-X--xx---"),
        comp=("X---x-x-X---x-x-", "X-x-x-xxX-x-x-xx", "..x-..x-..x-..x-"),
        bassline=("1-------5-------", "1---..5-1---..5-", "1---....5---a---"),
        drums=({TAMBOURINE: "..x...x...x...x.", KICK: "X.......X......."},),
        lead=("violin", "flute", "accordion", "banjo", "acoustic guitar", "pan flute"),
        chords=("acoustic guitar", "banjo", "accordion", "harp"),
        bass=("double bass",),
    ),
    Style(
        name="ambient",
        words=("ambient", "atmospheric ambient", "ambient soundscape"),
        tempo=(60, 84),
        drums_chance=0.0,
        calm=True,
        sevenths="diatonic",
        major=((1, 4, 1, 4), (1, 3, 6, 4), (1, 6, 4, 1)),
        minor=((1, 6, 1, 6), (1, 6, 4, 1), (1, 3, 7, 6)),
        melody=("X---------------", "X-------x-------", "....X-----x-----", "X-----x---------"),
        comp=("X---------------", "X-------x-------"),
        bassline=("1---------------", "1-------5-------"),
        drums=({},),
        lead=("flute", "pan flute", "piano", "electric piano", "choir", "vibraphone", "cello", "harp"),
        chords=("synth pad", "string ensemble", "choir", "electric piano"),
        bass=("synth bass", "double bass"),
    ),
    Style(
        name="bossa nova",
        words=("bossa nova", "bossa", "brazilian bossa nova", "latin bossa nova"),
        tempo=(108, 152),
        drums_chance=0.6,
        sevenths="diatonic",
        major=((1, 6, 2, 5), (1, 2, 5, 1), (1, 4, 2, 5)),
        minor=((1, 4, 2, 5), (1, 6, 2, 5), (1, 2, 5, 1)),
        melody=("X--x--x---x--x--", "X-----x--x--x---", "..x--x--X--x----", "X--x--x-x-------"),
        comp=("X--x--x---x--x--", "X-----x--x--x---"),
        bassline=("1-----5-5-----1-", "1-----1-5-----a-"),
        drums=(
            {KICK: "X..x..x.X..x..x.", STICK: "X..x..x...x..x..", HAT: "xxxxxxxxxxxxxxxx"},
            {KICK: "X.....x.X.....x.", STICK: "X..x..x...x..x..", SHAKER: "x.x.x.x.x.x.x.x."},
        ),
        lead=("flute", "saxophone", "acoustic guitar", "vibraphone", "piano"),
        chords=("acoustic guitar", "electric piano", "piano"),
        bass=("double bass", "electric bass"),
    ),
    Style(
        name="reggae",
        words=("reggae", "roots reggae", "offbeat reggae"),
        tempo=(66, 96),
        drums_chance=0.75,
        major=((1, 4, 1, 5), (1, 5, 4, 1), (1, 2, 5, 1)),
        minor=((1, 4, 1, 4), (1, 7, 1, 7), (1, 6, 7, 1)),
        melody=("..x-x-x-X---....", "X-x-..x-x---x-x-", "....x-x-X-x-x---", "X---x-x---x-x---"),
        comp=("....X-......X-..", "..x...x...x...x.", "....X-x-....X-x-"),
        bassline=("1---..3-5---....", "..1-1---3-5---..", "1--1--3-5-----a-"),
        drums=(
            {KICK: "........X.......", STICK: "........X.......", HAT: "x.x.x.x.x.x.x.x."},
            {KICK: "X...X...X...X...", STICK: "........X.......", HAT: "..x...x...x...x."},
        ),
        lead=("trombone", "hammond organ", "electric guitar", "saxophone", "trumpet"),
        chords=("hammond organ", "electric guitar", "piano"),
        bass=("electric bass",),
    ),
    Style(
        name="funk",
        words=("funk", "funky", "syncopated funk"),
        tempo=(90, 122),
        drums_chance=0.85,
        sevenths="diatonic",
        major=((1, 1, 4, 4), (1, 4, 1, 5), (2, 5, 2, 5)),
        minor=((1, 1, 4, 4), (1, 4, 1, 4), (1, 7, 4, 1)),
        melody=("X..xx.x-..x-x-..", "..x-.xx-X-..x.x-", "x.x.X--x.x--....", "X-.x.-x-X-.xx-.."),
        comp=("X..x..x...x.x...", "..x.x..x..x..x..", "x..X..x.x..X..x."),
        bassline=("1..1..8.1.5.8.a.", "1-..1.8...1.5.a.", "1.1...8.5..5..a."),
        drums=(
            {KICK: "X..x..X...x.....", SNARE: "....X..x.x..X..x", HAT: "xxxxxxxxxxxxxxxx"},
            {
                KICK: "X.x.......x..x..",
                SNARE: "....X..x....X...",
                HAT: "x.xxx.xxx.xxx.x.",
                OPEN_HAT: "...............x",
            },
        ),
        lead=("saxophone", "trumpet", "electric guitar", "hammond organ", "synth lead", "electric piano"),
        chords=("electric piano", "electric guitar", "hammond organ"),
        bass=("electric bass", "synth bass"),
    ),
    Style(
        name="house",
        words=("house", "electronic house", "club house", "dance-floor house"),
        tempo=(116, 132),
        drums_chance=0.9,
        major=((1, 5, 6, 4), (6, 4, 1, 5), (1, 3, 4, 4)),
        minor=((1, 6, 3, 7), (1, 6, 4, 7), (1, 4, 1, 7)),
        melody=("X--x--x-X--x--x-", "X-x-..x-X-x-..x-", "x.x.x.x.X.x.x.x.", "X--x--x---x-x---"),
        comp=("..X-..X-..X-..X-", "X--x--X--x--X---", "..x--x--..x--x--"),
        bassline=("..1-..1-..1-..1-", "1.11..1.1.11..8.", "..8-..1-..5-..1-"),
        drums=(
            {KICK: "X...X...X...X...", CLAP: "....X.......X...", OPEN_HAT: "..x...x...x...x."},
            {KICK: "X...X...X...X...", CLAP: "....X.......X...", HAT: "xxx.xxx.xxx.xxx.", OPEN_HAT: "..x...x...x...x."},
        ),
        lead=("synth lead", "piano", "vibraphone", "electric piano"),
        chords=("synth pad", "piano", "electric piano", "string ensemble"),
        bass=("synth bass",),
    ),
    Style(
        name="march",
        words=("march", "marching", "military march", "parade march"),
        tempo=(104, 128),
        drums_chance=0.6,
        major=((1, 5, 1, 5), (1, 4, 5, 1), (1, 6, 2, 5)),
        minor=((1, 5, 1, 5), (1, 4, 5, 1), (1, 6, 5, 1)),
        melody=("X--xX---X--xX---", "X---X---X-x-x-x-", "X--xx--xX---x---", "X-x-X-x-X---X---"),
        comp=("..x...x...x...x.", "X...x...X...x...", "X.xxX.x.X.xxX.x."),
        bassline=("1...5...1...5...", "1---5---1---a---"),
        drums=(
            {KICK: "X.......X.......", SNARE: "X..xX.x.X..xX.xx"},
            {KICK: "X...X...X...X...", SNARE: "..x...x.x.xxX..."},
        ),
        lead=("trumpet", "french horn", "trombone", "clarinet", "glockenspiel", "flute"),
        chords=("french horn", "string ensemble", "piano", "accordion"),
        bass=("double bass",),
    ),
)

STYLES: dict[str, Style] = {style.name: style for style in _ALL}
