"""A folder of audio with `metadata.jsonl` (Hugging Face AudioFolder convention) as a list of items."""

from __future__ import annotations

import json
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
    """Items of a folder, in the order of its `metadata.jsonl`, or by name where it has none.

    Raises:
        UserError: the folder or a listed file is missing, a line is not JSON, or nothing is found.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one with audio files (stable-audio-lite corpus makes one)")
    listing = folder / "metadata.jsonl"
    if listing.exists():
        items = [_item(folder, listing, n, line) for n, line in enumerate(listing.read_text().splitlines(), 1) if line]
    else:
        items = [Item(path=p) for p in sorted(folder.rglob("*")) if p.suffix.lower() in _SUFFIXES]
    if not items:
        raise UserError(f"{folder}: holds no audio ({', '.join(sorted(_SUFFIXES))})")
    return items


def _item(folder: Path, listing: Path, number: int, line: str) -> Item:
    try:
        row = json.loads(line)
        path = folder / row["file_name"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{listing}: line {number} is not a JSON object with 'file_name'") from error
    if not path.exists():
        raise UserError(f"{listing}: line {number} names {row['file_name']}, which is missing")
    captions = tuple(row.get("captions") or ([row["text"]] if row.get("text") else []))
    return Item(path=path, captions=captions, truth=row)
