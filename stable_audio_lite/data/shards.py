"""WebDataset shards: tar files in which `KEY.flac`, `KEY.json` and `KEY.txt` belong together; a KEY may have dots.

Audio is read by seeking in the tar, which may be on disk or at any address that fsspec opens (s3://, gs://, https://).
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from stable_audio_lite.audio.decoding import FileWindow, Stored
from stable_audio_lite.data.item import SUFFIXES, Item, captions_of, is_hidden, say_left_out
from stable_audio_lite.errors import UserError

_TEXTS = (".json", ".txt")


def expand(pattern: str) -> list[str]:
    """Expand `a{00..11}.tar` to `a00.tar` ... `a11.tar`; a name without braces stays as it is."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    numbers = range(int(first), int(last) + 1)
    return [
        name
        for n in numbers
        for name in expand(pattern[: match.start()] + str(n).zfill(len(first)) + pattern[match.end() :])
    ]


def read_shard_items(addresses: list[str]) -> list[Item]:
    """List the items of shards, in order; the texts are in `KEY.json` ("text", "captions") or `KEY.txt`.

    Raises:
        UserError: a shard is missing or no tar file, a text is malformed, or two files have one key.
    """
    return [item for address in addresses for item in _read_shard(address)]


def _read_shard(address: str) -> list[Item]:
    audio: dict[str, tarfile.TarInfo] = {}
    rows: dict[str, dict[str, Any]] = {}
    taken: dict[tuple[str, str], str] = {}
    left_out: list[PurePosixPath] = []
    try:
        with _open(address) as file, tarfile.open(fileobj=file, mode="r:") as tar:  # seeking wants it uncompressed
            for member in tar:
                name = PurePosixPath(member.name)
                key, kind = str(name.with_suffix("")), "audio" if name.suffix.lower() in SUFFIXES else name.suffix
                if member.isdir():
                    continue
                if not member.isfile() or member.issparse() or is_hidden(name) or kind not in ("audio", *_TEXTS):
                    left_out.append(name)
                    continue
                if (other := taken.setdefault((key, kind), member.name)) is not member.name:
                    raise UserError(f"{address}: {other} and {member.name} have one key; rename one")
                if kind == "audio":
                    audio[key] = member
                    continue
                text = cast(BinaryIO, tar.extractfile(member)).read().decode("utf-8-sig")
                row = json.loads(text) if kind == ".json" else {"text": text.strip()}
                if not isinstance(row, dict):
                    raise UserError(f"{address}/{member.name}: is no JSON object")
                rows.setdefault(key, {}).update(row)
    except UserError:
        raise
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{address}: no shard that can be read ({' '.join(str(error).split())[:120]})") from error
    say_left_out(address, left_out)
    say_left_out(address, [PurePosixPath(n) for (key, _), n in taken.items() if key not in audio], "no audio beside")
    items = []
    for key, member in audio.items():
        where, row = f"{address}/{member.name}", rows.get(key, {})
        source = Stored(where, partial(_open_member, address, member.offset_data, member.size))
        items.append(Item(path=source, captions=captions_of(row, where), metadata=row))
    return items


def _open(address: str) -> BinaryIO:
    if "://" not in address:
        return Path(address).open("rb")
    import fsspec

    try:
        return fsspec.open(address, "rb").open()
    except Exception as error:  # each kind of storage has errors of its own
        raise UserError(f"{address}: can't be opened ({' '.join(str(error).split())[:160]})") from error


def _open_member(address: str, offset: int, size: int) -> BinaryIO:
    return io.BufferedReader(FileWindow(_open(address), offset, size))
