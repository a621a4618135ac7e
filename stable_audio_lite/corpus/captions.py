"""Captions of a piece as people write them: tags or sentences, with omissions and synonyms, but never untrue."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

from stable_audio_lite.corpus.instruments import caption_names
from stable_audio_lite.corpus.piece import Piece
from stable_audio_lite.corpus.styles import STYLES

SLOW_UP_TO, FAST_FROM = 84, 126
"""Tempos (bpm) up to which captions say "slow" and from which they say "fast"."""

SPEEDS = {
    "slow": ("slow", "slow-paced", "unhurried", "slow tempo"),
    "medium": ("mid-tempo", "medium tempo", "moderate", "moderately paced"),
    "fast": ("fast", "quick", "fast-paced", "up-tempo"),
}
MOODS = {
    "major": ("happy", "bright", "cheerful", "sunny", "uplifting", "joyful"),
    "minor": ("sad", "dark", "melancholic", "moody", "wistful", "sombre"),
}
WITH_DRUMS = ("drums", "a drum kit", "drum kit", "a drum beat", "percussion")
NO_DRUMS = ("no drums", "without drums", "drumless", "no percussion")
SHARPS_AS_FLATS = {"C#": "Db", "D#": "Eb", "F#": "Gb", "G#": "Ab", "A#": "Bb"}

# {a} is an adjective phrase with its article, {i} the instruments, {k} and {t} optional key and tempo phrases.
SENTENCES = (
    "{a} piece for {i}{k}{t}",
    "{a} track with {i}{k}{t}",
    "{a} tune played by {i}{k}{t}",
    "{a} song featuring {i}{k}{t}",
    "{a} melody on {i}{k}{t}",
    "{a} instrumental with {i}{k}{t}",
    "{a} recording of {i}{k}{t}",
    "{a} composition for {i}{k}{t}",
    "{I} playing {a} piece{k}{t}",
    "{I} playing {a} tune{t}{k}",
    "{I} in {a} piece{k}{t}",
    "{I}, {a} track{k}{t}",
    "This is {a} piece played by {i}{k}{t}",
    "This is {a} track with {i}{t}{k}",
    "You hear {i} in {a} tune{k}{t}",
    "We hear {i} playing {a} melody{t}",
    "Music for {i}: {a} piece{k}{t}",
    "An instrumental with {i}, {a} tune{k}{t}",
    "The sound of {i} in {a} track{k}{t}",
    "Someone plays {a} tune on {i}{k}{t}",
)
BARE_SENTENCES = (
    "{a} piece{k}{t}",
    "{a} track{k}{t}{d}",
    "This is {a} instrumental{k}{t}{d}",
    "Some music: {a} tune{t}{k}",
)


def captions(piece: Piece, count: int = 6) -> list[str]:
    """Write `count` distinct captions of a piece, the first naming every instrument; the same for the same piece."""
    rng = random.Random(f"{piece.seed}/{piece.split}/{piece.index}/captions")
    found: list[str] = []
    while len(found) < count:
        caption = _caption(rng, piece, everything=not found)
        if caption not in found:
            found.append(caption)
    return found


def speed_of(bpm: int) -> str:
    """Name the tempo in a word: slow, medium or fast."""
    return "slow" if bpm <= SLOW_UP_TO else "fast" if bpm >= FAST_FROM else "medium"


def facts_told(caption: str, metadata: Mapping[str, Any]) -> frozenset[str]:
    """Find out which of "tempo" (as a number), "key", "mode", "style" and "drums" a piece's caption states.

    `metadata` is the piece's row of metadata.jsonl.
    """
    low, mode, tonic = caption.lower(), metadata["mode"], metadata["key"]
    names = "|".join((tonic, SHARPS_AS_FLATS.get(tonic, tonic)))
    key = re.search(rf"(?<!\w)({names}) {mode}\b", caption) is not None  # "in a minor key" names no A
    told = {
        "tempo": re.search(rf"\b{metadata['bpm']}(?!\d)", low) is not None,
        "key": key,
        "mode": key or re.search(rf"\b({mode}|{'|'.join(MOODS[mode])})\b", low) is not None,
        "style": any(word.lower() in low for word in STYLES[metadata["style"]].words),
        "drums": "drum" in low or "percussion" in low,
    }
    return frozenset(name for name, said in told.items() if said)


def _caption(rng: random.Random, piece: Piece, everything: bool) -> str:
    kind = rng.random()
    if kind < 0.5:
        return _tags(rng, piece, everything)
    if kind < 0.95 or everything:
        return _sentence(rng, piece, everything)
    return _finish(rng, _fill(rng, rng.choice(BARE_SENTENCES), piece, ""))


def _tags(rng: random.Random, piece: Piece, everything: bool) -> str:
    names = _names(rng, piece, everything)
    if len(names) == 1 and len(piece.parts) == 1 and not piece.drums and rng.random() < 0.4:
        names = [f"solo {names[0]}"]
    rest = [tag for tag, chance in _facts(rng, piece) if rng.random() < chance]
    rng.shuffle(rest)
    grouped = [_listed(rng, names)] if rng.random() < 0.3 else names
    tags = [*rest[:1], *grouped, *rest[1:]] if rng.random() < 0.2 else [*grouped, *rest]
    if not everything and rng.random() < 0.05 and rest:
        tags = rest
    joiner = rng.choices((", ", " ", " | ", "; "), (0.85, 0.05, 0.05, 0.05))[0]
    text = joiner.join(tags)
    return text[0].upper() + text[1:] if rng.random() < 0.25 else text


def _facts(rng: random.Random, piece: Piece) -> list[tuple[str, float]]:
    """List tags other than instruments, each with the probability that someone would write it."""
    drums = rng.choice(("drums", "drum kit", "with drums")) if piece.drums else rng.choice(_absent(piece))
    bpm = rng.choice((f"{piece.bpm} bpm", f"{piece.bpm} BPM", f"{piece.bpm}bpm", f"tempo {piece.bpm}"))
    mode = f"{piece.mode} key" if rng.random() < 0.5 else piece.mode
    return [
        (rng.choice(STYLES[piece.style].words), 0.75),
        (bpm if rng.random() < 0.75 else rng.choice(SPEEDS[speed_of(piece.bpm)]), 0.75),
        (_key(rng, piece) if rng.random() < 0.8 else mode, 0.6),
        (rng.choice(MOODS[piece.mode]), 0.25),
        (drums, 0.75 if piece.drums else 0.15),
    ]


def _absent(piece: Piece) -> tuple[str, ...]:
    """Ways to say that there are no drums; mallets are percussion, so with them that word is left out."""
    return NO_DRUMS[:-1] if "mallets" in piece.families else NO_DRUMS


def _key(rng: random.Random, piece: Piece) -> str:
    name = SHARPS_AS_FLATS[piece.key] if piece.key in SHARPS_AS_FLATS and rng.random() < 0.5 else piece.key
    return rng.choice((f"{name} {piece.mode}", f"{name} {piece.mode}", f"key of {name} {piece.mode}"))


def _sentence(rng: random.Random, piece: Piece, everything: bool) -> str:
    names = []
    for name in _names(rng, piece, everything):
        plural = name.endswith("s") and not name.endswith(("ss", "rhodes"))
        names.append(name if plural or rng.random() < 0.5 else f"{_article(name)} {name}")
    drums = piece.drums and rng.random() < 0.75
    listed = _listed(rng, [*names, rng.choice(WITH_DRUMS)] if drums else names)
    if len(names) == 1 and len(piece.parts) == 1 and not piece.drums and rng.random() < 0.3:
        listed = f"{names[0]} alone" if rng.random() < 0.5 else f"just {names[0]}"
    if not piece.drums and rng.random() < 0.1:
        listed = f"{listed} and no drums" if rng.random() < 0.5 else f"{listed} without drums"
    return _finish(rng, _fill(rng, rng.choice(SENTENCES), piece, listed))


def _fill(rng: random.Random, template: str, piece: Piece, listed: str) -> str:
    key = rng.choice((" in {}", " in the key of {}", ", {}")).format(_key(rng, piece).removeprefix("key of "))
    if rng.random() < 0.2:
        key = f" in a {piece.mode} key"
    tempo = rng.choice((" at {} bpm", " at {} BPM", ", {} bpm", " around {} bpm", ", about {} beats per minute"))
    drums = rng.choice((" with drums", " with a drum kit")) if piece.drums else " without drums"
    return template.format(
        a=_adjectives(rng, piece),
        i=listed,
        I=listed,
        k=key if rng.random() < 0.55 else "",
        t=tempo.format(piece.bpm) if rng.random() < 0.55 else "",
        d=drums if rng.random() < 0.5 else "",
    )


def _adjectives(rng: random.Random, piece: Piece) -> str:
    """Write a phrase such as "a slow sad jazz": nearly always the style, sometimes speed and mood."""
    speed = rng.choice(SPEEDS[speed_of(piece.bpm)][:3]) if rng.random() < 0.35 else ""
    mood = rng.choice(MOODS[piece.mode]) if rng.random() < 0.3 else ""
    style = rng.choice(STYLES[piece.style].words) if rng.random() < 0.85 or not (speed or mood) else ""
    words = rng.sample([speed, mood], 2)
    phrase = " ".join(word for word in (*words, style) if word)
    return f"{_article(phrase)} {phrase}"


def _names(rng: random.Random, piece: Piece, everything: bool) -> list[str]:
    """Choose words for the instruments, lead first; sometimes a part or two goes unmentioned."""
    found = list(piece.instruments)
    if not everything and len(found) > 1 and rng.random() < 0.2:
        found = found[: rng.randint(1, len(found) - 1)]
    words = [name if rng.random() < 0.65 else rng.choice(caption_names(name)) for name in found]
    # Two guitars may both come out as "guitar": then say which.
    return words if len(set(words)) == len(words) else found


def _listed(rng: random.Random, names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    if len(names) == 2:
        return names[0] + rng.choice((" and ", " with ", " and ", " accompanied by ", " plus ")) + names[1]
    return ", ".join(names[:-1]) + rng.choice((" and ", ", and ")) + names[-1]


def _article(phrase: str) -> str:
    return "an" if phrase[0].lower() in "aeiou" else "a"


def _finish(rng: random.Random, text: str) -> str:
    if rng.random() < 0.75:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.5 else text
