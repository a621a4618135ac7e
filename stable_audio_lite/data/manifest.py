"""Data sets as lists of items: folders, with or without a manifest, WebDataset shards, Hugging Face data sets."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stable_audio_lite.data import hub, shards
from stable_audio_lite.data.captions import Sidecars
from stable_audio_lite.data.item import SUFFIXES, Item, captions_of, is_hidden, read_text, say_left_out
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import expand_home


def read_items(source: str | Path) -> list[Item]:
    """The items of a data set.

    `source` is a folder in the Hugging Face AudioFolder convention, in the order of its `metadata.jsonl` or
    `metadata.csv`, or any folder of audio, by name, with a `.txt` or `.json` beside each file; such a list itself, or a
    `.txt` with a file on each line, whose names count from the list's folder; WebDataset shards
    (`data/{000..011}.tar`, `s3://bucket/a.tar`, or a folder of them); or a Hugging Face data set (`hf:owner/name`,
    `hf:owner/name:split`, or what `save_to_disk` wrote).
    A listed file that is missing or broken is found when it is read. Hidden files are no audio; how many files of a
    folder or shard are left out is printed.

    Raises:
        UserError: the source is missing, a row is malformed, a file is listed twice, or nothing is found.
    """
    name = expand_home(str(source))
    folder = Path(name)
    if name.startswith(hub.PREFIX) or any((folder / file).is_file() for file in hub.SAVED):
        items = hub.read_hub_items(name)
    elif name.endswith(".tar"):
        items = shards.read_shard_items(shards.expand(name))
    elif folder.suffix in _LISTS and folder.is_file():
        items = _items(folder.parent, _LISTS[folder.suffix](folder))
    elif folder.is_file():
        raise UserError(f"{name}: is a file; give its folder, or a list of files ({', '.join(_LISTS)})")
    elif not folder.is_dir():
        raise UserError(f"{name}: no such folder; give one with audio files (stable-audio-lite corpus makes one)")
    else:
        items = _folder_items(folder)
    if not items:
        raise UserError(f"{name}: holds no audio ({', '.join(sorted(SUFFIXES))})")
    return items


def _folder_items(folder: Path) -> list[Item]:
    """The items of a folder, by its manifest, its shards or its files."""
    files, audio = _audio_files(folder)
    for name, rows in _FOLDER_LISTS.items():
        if (listing := folder / name).exists():
            items = _items(folder, rows(listing))
            listed = {os.path.normpath(str(item.path)) for item in items}
            say_left_out(str(folder), [f for f in audio if str(f) not in listed], f"not listed in {name}")
            return items
    if tars := [file for file in files if file.parent == folder and file.suffix == ".tar" and not is_hidden(file)]:
        say_left_out(str(folder), audio, "beside shards")
        return shards.read_shard_items([str(tar) for tar in tars])
    return _captioned(folder, files, audio)


def unlisted_items(folder: Path) -> list[Item]:
    """The items of a folder by its files and the captions beside them, whatever lists it holds.

    Raises:
        UserError: there is no such folder, it holds no audio, or a caption is malformed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one with audio files")
    files, audio = _audio_files(folder)
    if not audio:
        raise UserError(f"{folder}: holds no audio ({', '.join(sorted(SUFFIXES))})")
    return _captioned(folder, [file for file in files if file.name not in _FOLDER_LISTS], audio)


def _audio_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """All files of a folder, and those of them that are audio."""
    files = sorted(_files(folder))
    return files, [f for f in files if f.suffix.lower() in SUFFIXES and not is_hidden(f.relative_to(folder))]


def _captioned(folder: Path, files: list[Path], audio: list[Path]) -> list[Item]:
    """The items of these files of audio, with the captions beside them; counts all files that are passed over."""
    sidecars = Sidecars(files)
    used = {file for path in audio for file in (path, *sidecars.beside(path))}
    say_left_out(str(folder), [file.relative_to(folder) for file in files if file not in used])
    return [sidecars.item(path) for path in audio]


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, also behind symbolic links, each folder once."""

    def say(error: OSError) -> None:
        print(f"{error.filename}: can't be listed ({error.strerror}), so what is in it is left out", file=sys.stderr)

    seen = set()
    for place, folders, names in os.walk(folder, onerror=say, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(place) / name for name in names)


def _json_rows(listing: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) pairs; a row may be anything that JSON can hold."""
    for number, line in enumerate(read_text(listing).split("\n"), 1):
        if line.strip():
            where = f"{listing}: line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not a JSON object with 'file_name'") from error


def _csv_rows(listing: Path) -> Iterator[tuple[str, Any]]:
    reader = csv.reader(io.StringIO(read_text(listing), newline=""), strict=True)
    try:
        columns = next(reader, [])
        if "file_name" not in columns:
            raise UserError(f"{listing}: has no column 'file_name'; its first line names the columns")
        if twice := [name for name in columns if columns.count(name) > 1]:
            raise UserError(f"{listing}: has two columns '{twice[0]}'; rename or remove one")
        for row in filter(None, reader):
            where = f"{listing}: line {reader.line_num}"
            if len(row) != len(columns):
                hint = "put a text that holds commas or line breaks between double quotes"
                raise UserError(f"{where} has {len(row)} fields, the first line names {len(columns)} columns; {hint}")
            yield where, dict(zip(columns, row, strict=True))
    except csv.Error as error:
        hint = 'a double quote within a quoted text is written twice, ""'
        raise UserError(f"{listing}: line {reader.line_num} is no CSV ({error}); {hint}") from error


def _text_rows(listing: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(read_text(listing).split("\n"), 1):
        if line.strip():
            yield f"{listing}: line {number}", {"file_name": line.strip()}


_FOLDER_LISTS = {"metadata.jsonl": _json_rows, "metadata.csv": _csv_rows}
_LISTS = {".jsonl": _json_rows, ".csv": _csv_rows, ".txt": _text_rows}


def _items(folder: Path, rows: Iterable[tuple[str, Any]]) -> list[Item]:
    items, lines = [], dict[str, str]()
    for where, row in rows:
        items.append(_item(folder, where, row))
        if (first := lines.setdefault(os.path.normpath(str(items[-1].path)), where)) != where:
            raise UserError(f"{where} lists {items[-1].name} again, after {first}; give its texts as 'captions'")
    return items


def _item(folder: Path, where: str, row: Any) -> Item:
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not row["file_name"]:
        raise UserError(f"{where} is not an object with 'file_name'")
    path = folder / expand_home(row["file_name"])
    if not path.exists():  # macOS spells accents in two characters, most others in one
        spelled = (folder / expand_home(unicodedata.normalize(form, row["file_name"])) for form in ("NFC", "NFD"))
        path = next((other for other in spelled if other.exists()), path)
    return Item(path=path, captions=captions_of(row, where), metadata=row)
