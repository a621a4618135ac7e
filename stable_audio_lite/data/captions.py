"""Captions without a list: texts beside the files, or a template over the files' tags and the folders' names."""

from __future__ import annotations

import itertools
import json
import re
import string
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stable_audio_lite.data.item import Item, captions_of, read_text
from stable_audio_lite.errors import UserError

TEMPLATE = "{genre}, {folder}, {title}, {bpm} bpm, {key}"
"""The default template."""

_TAGS = {  # ID3, Vorbis and APE, MP4, ASF
    "title": ("TIT2", "title", "\xa9nam", "Title"),
    "artist": ("TPE1", "artist", "\xa9ART", "Author"),
    "album": ("TALB", "album", "\xa9alb", "WM/AlbumTitle"),
    "genre": ("TCON", "genre", "\xa9gen", "WM/Genre"),
    "bpm": ("TBPM", "bpm", "tempo", "tmpo", "WM/BeatsPerMinute"),
    "key": ("TKEY", "initialkey", "key", "----:com.apple.iTunes:initialkey", "WM/InitialKey"),
}
FIELDS = (*_TAGS, "folder", "name")
"""Fields of a template: tags, the folders' names, and the file's name."""

_PLACEHOLDER = re.compile(r"(unknown.*|other|untitled.*|(audio )?track ?\d*)", re.IGNORECASE)
_KEY = re.compile(r"([A-Ga-g])([#b♯♭]?) ?(m|min|minor|maj|major)?")


class Sidecars:
    """The `.txt` and `.json` files of a folder, by which the audio beside them is captioned.

    A `.txt` is one caption; a `.json` is an object like a line of `metadata.jsonl`, such as {"prompt": "slow piano"}.
    Names may differ in the case of the suffix and in how their accents are encoded.
    """

    def __init__(self, files: Iterable[Path]):
        self._files: dict[tuple[Path, str], list[Path]] = {}
        for file in files:
            if file.suffix.lower() in (".json", ".txt"):
                self._files.setdefault(_place(file), []).append(file)

    def beside(self, audio: Path) -> list[Path]:
        """The files that caption `audio`."""
        return self._files.get(_place(audio), [])

    def item(self, audio: Path) -> Item:
        """The item of a file of audio; a text in its `.json` counts before its `.txt`.

        Raises:
            UserError: a file is not UTF-8, not a JSON object, or its caption is no text.
        """
        row: dict[str, Any] = {}
        for file in sorted(self.beside(audio), key=lambda f: f.suffix.lower()):  # .json first
            if file.suffix.lower() == ".txt":
                found = {} if captions_of(row, str(file)) else {"text": " ".join(read_text(file).split())}
            else:
                found = _json_object(file)
                captions_of(found, str(file))
            row |= found
        return Item(path=audio, captions=captions_of(row, str(audio)), metadata=row)


def _place(file: Path) -> tuple[Path, str]:
    return file.parent, unicodedata.normalize("NFC", file.stem)


def _json_object(file: Path) -> dict[str, Any]:
    try:
        row = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is no JSON ({' '.join(str(error).split())[:80]}); mend or remove it") from error
    if not isinstance(row, dict):
        raise UserError(f'{file}: is no JSON object; write one like {{"text": "slow piano"}}')
    return row


class CaptionTemplate:
    """A text with fields in braces, such as "{genre}, {bpm} bpm".

    A part between two commas is left out where a field in it is unknown, or where it says the same as an earlier part.

    Raises:
        UserError: the text has no field, an unknown one, or a brace too many.
    """

    def __init__(self, text: str):
        known = f"the fields are {', '.join(FIELDS)}"
        self.parts = [part.strip() for part in text.split(",") if part.strip()]
        try:
            found = [[rest for _, *rest in string.Formatter().parse(p) if rest[0] is not None] for p in self.parts]
        except ValueError as error:
            raise UserError(f"template: {text!r} is not right ({error}); {known}") from error
        for name, *how in itertools.chain(*found):
            if name not in FIELDS or any(how):
                raise UserError(f"template: {text!r} has a field {name!r} that is no name in braces alone; {known}")
        self.fields = [[str(name) for name, *_ in fields] for fields in found]
        if not any(self.fields):
            raise UserError(f"template: {text!r} says the same of every file; {known}")

    def caption(self, values: Mapping[str, str]) -> str:
        """Fill in the values of the known fields; "" where none is known."""
        said: dict[str, str] = {}
        some = False
        for part, names in zip(self.parts, self.fields, strict=True):
            if all(values.get(name) for name in names):
                text = part.format_map(values)
                said.setdefault(text.casefold(), text)
                some = some or bool(names)
        return ", ".join(said.values()) if some else ""


def describe_files(items: Sequence[Item], folder: Path, template: CaptionTemplate) -> list[str]:
    """A caption for each file below `folder`: its own where it has one, else by the template; "" where that is empty.

    Raises:
        UserError: mutagen, which reads tags, is not installed.
    """
    captions = []
    for item in items:
        assert isinstance(item.path, Path)
        captions.append(item.captions[0] if item.captions else template.caption(_values(item.path, folder)))
    return captions


def _values(path: Path, folder: Path) -> dict[str, str]:
    """Every known field of a file."""
    name = _words(re.sub(r"^\d{1,3}[ ._-]+(?=\S)", "", path.stem))
    between = path.relative_to(folder).parent.parts or (folder.resolve().name,)
    values = {"name": name, "folder": ", ".join(filter(None, map(_words, between)))} | read_tags(path)
    return values | {"title": values.get("title") or name}


def _words(name: str) -> str:
    """The words of a file's or folder's name."""
    return " ".join(_plain(re.sub(r"[_]|(?<=\w)-(?=\w)", " ", name)).split())


def _plain(text: str) -> str:
    """A text on one line, without what can't be written as UTF-8, and with accents as most systems write them."""
    return unicodedata.normalize("NFC", " ".join(text.encode("utf-8", "ignore").decode().replace("\0", " ").split()))


def read_tags(path: Path) -> dict[str, str]:
    """The tags of a file by their names in `FIELDS`; {} for one without tags or that can't be read.

    Raises:
        UserError: mutagen is not installed.
    """
    try:
        import mutagen
    except ModuleNotFoundError as error:
        raise UserError("tags need mutagen: pip install 'stable-audio-lite[train]'") from error
    try:
        tags = getattr(mutagen.File(path) if path.is_file() else None, "tags", None) or {}  # a pipe has none
        found = {field: _value(tags, names) for field, names in _TAGS.items()}
    except Exception:  # a damaged file: mutagen raises errors of many kinds; reading its audio will name what is wrong
        return {}
    values = {field: text for field, text in found.items() if text and not _PLACEHOLDER.fullmatch(text)}
    if "bpm" in values:
        values["bpm"] = _tempo(values["bpm"])
    if (match := _KEY.fullmatch(values.get("key", ""))) is not None:
        note, accidental, mode = match.groups()
        values["key"] = f"{note.upper()}{accidental} {'minor' if mode and mode[:2] in ('m', 'mi') else 'major'}"
    return {field: text for field, text in values.items() if text}


def _value(tags: Any, names: Iterable[str]) -> str:
    """The first tag that is there, of several values all; numbered genres by name."""
    for name in names:
        try:
            tag = tags.get(name)
        except ValueError:  # not a name in this kind of file
            continue
        if tag is not None:
            values = tag.genres if name == "TCON" else getattr(tag, "text", tag)
            values = values if isinstance(values, list) else [values]
            texts = [_plain(v.decode("utf-8", "ignore") if isinstance(v, bytes) else str(v)) for v in values]
            if any(texts):
                return ", ".join(dict.fromkeys(filter(None, texts)))
    return ""


def _tempo(text: str) -> str:
    """Beats per minute as a whole number; "" where it is none."""
    try:
        bpm = round(float(text.replace(",", ".")))
    except (ValueError, OverflowError):
        return ""
    return str(bpm) if bpm > 0 else ""
