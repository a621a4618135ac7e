"""A folder of audio with `metadata.jsonl` or `.csv` (Hugging Face AudioFolder convention) as a list of items."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stable_audio_lite.errors import UserError

_SUFFIXES = {".wav", ".flac", ".ogg", ".mp3", ".aiff"}


@dataclass(frozen=True, kw_only=True)
class Item:
    """One audio file.

    Attributes:
        captions: texts that describe it, the first one the main one; may be empty.
        truth: the whole metadata row.
    """

    path: Path
    captions: tuple[str, ...] = ()
    truth: dict[str, Any] = field(default_factory=dict)


def read_items(folder: str | Path) -> list[Item]:
    """Items of a folder, in the order of its `metadata.jsonl` or `metadata.csv`, or by name where it has neither.

    A listed file that is missing or broken is found when it is read.

    Raises:
        UserError: the folder is missing, a row is not as it should be, or nothing is found.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one with audio files (stable-audio-lite corpus makes one)")
    if (folder / "metadata.jsonl").exists():
        items = [_item(folder, *row) for row in _json_rows(folder / "metadata.jsonl")]
    elif (folder / "metadata.csv").exists():
        items = [_item(folder, *row) for row in _csv_rows(folder / "metadata.csv")]
    else:
        items = [Item(path=p) for p in sorted(folder.rglob("*")) if p.suffix.lower() in _SUFFIXES]
    if not items:
        raise UserError(f"{folder}: holds no audio ({', '.join(sorted(_SUFFIXES))})")
    return items


def _json_rows(listing: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) pairs; a row may be anything that JSON can hold."""
    for number, line in enumerate(_text(listing).splitlines(), 1):
        if line.strip():
            where = f"{listing}: line {number}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where} is not a JSON object with 'file_name'") from error


def _csv_rows(listing: Path) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(_text(listing), newline=""))
    if "file_name" not in (reader.fieldnames or []):
        raise UserError(f"{listing}: has no column 'file_name'; its first line names the columns")
    for row in reader:
        yield f"{listing}: line {reader.line_num}", row


def _text(listing: Path) -> str:
    try:
        return listing.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{listing}: can't be read as UTF-8 text ({error})") from error


def _item(folder: Path, where: str, row: Any) -> Item:
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not row["file_name"]:
        raise UserError(f"{where} is not an object with 'file_name'")
    captions = row.get("captions") or ([row["text"]] if row.get("text") else [])
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise UserError(f"{where}: 'text' should be a text and 'captions' a list of texts")
    return Item(path=folder / row["file_name"], captions=tuple(captions), truth=row)
