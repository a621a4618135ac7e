"""WebDataset shards: tar files in which `KEY.flac`, `KEY.json` and `KEY.txt` belong together.

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

from stable_audio_lite.audio.io import Stored
from stable_audio_lite.data.item import SUFFIXES, Item, captions_of
from stable_audio_lite.errors import UserError


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
        UserError: a shard is missing or no tar file, or a text is malformed.
    """
    return [item for address in addresses for item in _read_shard(address)]


def _read_shard(address: str) -> list[Item]:
    audio: dict[str, tarfile.TarInfo] = {}
    rows: dict[str, dict[str, Any]] = {}
    try:
        with _open(address) as file, tarfile.open(fileobj=file) as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                key = member.name[: len(member.name) - len(name.name)] + name.name.split(".")[0]
                if not member.isfile():
                    continue
                if name.suffix.lower() in SUFFIXES:
                    audio[key] = member
                elif name.suffix in (".json", ".txt"):
                    text = cast(BinaryIO, tar.extractfile(member)).read().decode("utf-8")
                    row = json.loads(text) if name.suffix == ".json" else {"text": text.strip()}
                    if not isinstance(row, dict):
                        raise UserError(f"{address}/{member.name}: is no JSON object")
                    rows.setdefault(key, {}).update(row)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{address}: no shard that can be read ({' '.join(str(error).split())[:120]})") from error
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
    return io.BufferedReader(_Window(_open(address), offset, size))


class _Window(io.RawIOBase):
    """Bytes offset..offset + size of a file, as a file of their own."""

    def __init__(self, file: BinaryIO, offset: int, size: int):
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        data = self._file.read(max(min(len(buffer), self._size - self._at), 0))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
