"""Data sets as lists of items: folders, with or without a manifest, WebDataset shards, Hugging Face data sets."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stable_audio_lite.data import hub, shards
from stable_audio_lite.data.item import SUFFIXES, Item, captions_of
from stable_audio_lite.errors import UserError


def read_items(source: str | Path) -> list[Item]:
    """The items of a data set.

    `source` is a folder in the Hugging Face AudioFolder convention, in the order of its `metadata.jsonl` or
    `metadata.csv`, or any folder of audio, by name; such a list itself, or a `.txt` with a file on each line, whose
    names count from the list's folder; WebDataset shards (`data/{000..011}.tar`, `s3://bucket/a.tar`, or a folder of
    them); or a Hugging Face data set (`hf:owner/name`, `hf:owner/name:split`, or what `save_to_disk` wrote).
    A listed file that is missing or broken is found when it is read.

    Raises:
        UserError: the source is missing, a row is malformed, or nothing is found.
    """
    name = str(source)
    folder = Path(source)
    if name.startswith(hub.PREFIX) or (folder / "dataset_info.json").is_file():
        items = hub.read_hub_items(name)
    elif name.endswith(".tar"):
        items = shards.read_shard_items(shards.expand(name))
    elif folder.suffix in _LISTS and folder.is_file():
        items = [_item(folder.parent, *row) for row in _LISTS[folder.suffix](folder)]
    elif not folder.is_dir():
        raise UserError(f"{name}: no such folder; give one with audio files (stable-audio-lite corpus makes one)")
    elif (folder / "metadata.jsonl").exists():
        items = [_item(folder, *row) for row in _json_rows(folder / "metadata.jsonl")]
    elif (folder / "metadata.csv").exists():
        items = [_item(folder, *row) for row in _csv_rows(folder / "metadata.csv")]
    elif tars := sorted(folder.glob("*.tar")):
        items = shards.read_shard_items([str(tar) for tar in tars])
    else:
        items = [Item(path=p) for p in sorted(folder.rglob("*")) if p.suffix.lower() in SUFFIXES]
    if not items:
        raise UserError(f"{name}: holds no audio ({', '.join(sorted(SUFFIXES))})")
    return items


def _json_rows(listing: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) pairs; a row may be anything that JSON can hold."""
    for number, line in enumerate(_text(listing).split("\n"), 1):
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


def _item(folder: Path, where: str, row: Any) -> Item:
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not row["file_name"]:
        raise UserError(f"{where} is not an object with 'file_name'")
    return Item(path=folder / row["file_name"], captions=captions_of(row, where), metadata=row)
