"""Data sets as lists of items: folders, with or without a manifest, WebDataset shards, Hugging Face data sets."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stable_audio_lite.data import hub, shards
from stable_audio_lite.data.item import SUFFIXES, Item, captions_of, is_hidden, say_left_out
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import expand_home


def read_items(source: str | Path) -> list[Item]:
    """The items of a data set.

    `source` is a folder in the Hugging Face AudioFolder convention, in the order of its `metadata.jsonl` or
    `metadata.csv`, or any folder of audio, by name; such a list itself, or a `.txt` with a file on each line, whose
    names count from the list's folder; WebDataset shards (`data/{000..011}.tar`, `s3://bucket/a.tar`, or a folder of
    them); or a Hugging Face data set (`hf:owner/name`, `hf:owner/name:split`, or what `save_to_disk` wrote).
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
    files = sorted(_files(folder))
    audio = [file for file in files if file.suffix.lower() in SUFFIXES and not is_hidden(file.relative_to(folder))]
    for name, rows in (("metadata.jsonl", _json_rows), ("metadata.csv", _csv_rows)):
        if (listing := folder / name).exists():
            items = _items(folder, rows(listing))
            listed = {os.path.normpath(str(item.path)) for item in items}
            say_left_out(str(folder), [f for f in audio if str(f) not in listed], f"not listed in {name}")
            return items
    if tars := [file for file in files if file.parent == folder and file.suffix == ".tar" and not is_hidden(file)]:
        say_left_out(str(folder), audio, "beside shards")
        return shards.read_shard_items([str(tar) for tar in tars])
    say_left_out(str(folder), [file.relative_to(folder) for file in sorted(set(files) - set(audio))])
    return [Item(path=file) for file in audio]


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
    for number, line in enumerate(_text(listing).split("\n"), 1):
        if line.strip():
            where = f"{listing}: line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not a JSON object with 'file_name'") from error


def _csv_rows(listing: Path) -> Iterator[tuple[str, Any]]:
    reader = csv.reader(io.StringIO(_text(listing), newline=""), strict=True)
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
    for number, line in enumerate(_text(listing).split("\n"), 1):
        if line.strip():
            yield f"{listing}: line {number}", {"file_name": line.strip()}


_LISTS = {".jsonl": _json_rows, ".csv": _csv_rows, ".txt": _text_rows}


def _text(listing: Path) -> str:
    try:
        return listing.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{listing}: can't be read as UTF-8 text ({error})") from error


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
    return Item(path=folder / expand_home(row["file_name"]), captions=captions_of(row, where), metadata=row)
