"""One piece of audio of a data set, with the texts that describe it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from stable_audio_lite.audio.io import AudioSource
from stable_audio_lite.errors import UserError

SUFFIXES = {".wav", ".rf64", ".w64", ".aif", ".aifc", ".aiff", ".caf", ".au", ".snd", ".flac", ".ogg", ".oga", ".opus"}
SUFFIXES |= {".mp2", ".mp3", ".m4a", ".m4b", ".aac", ".ac3", ".eac3", ".wma", ".ape", ".wv", ".tta", ".mka"}
"""Ends of the names that are taken for audio; those that libsndfile doesn't read need ffmpeg."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One piece of audio.

    Attributes:
        path: where it is read from.
        captions: texts that describe it, the first one the main one; may be empty.
        metadata: the whole row of the data set.
    """

    path: AudioSource
    captions: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The file's name, without its folder."""
        return PurePath(str(self.path)).name


_TEXTS = ("text", "prompt", "caption", "description")


def captions_of(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """The texts of a metadata row: its "captions", a list, or its "text"; blank ones are none.

    Where others say "prompt", "caption" or "description" for "text", that will do.

    Raises:
        UserError: they are something else; the message begins with `where`.
    """
    captions = row.get("captions") or [row[key] for key in _TEXTS if row.get(key) not in (None, "")][:1]
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise UserError(f"{where}: 'text' should be a text and 'captions' a list of texts")
    try:
        "".join(captions).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: a text is not valid Unicode ({error.reason}); write it again") from error
    return tuple(caption for caption in captions if caption.strip())


def read_text(file: Path) -> str:
    """Read a text file in UTF-8, with or without a byte-order mark.

    Raises:
        UserError: it can't be read, or is something else.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: can't be read as UTF-8 text ({error})") from error


def is_hidden(name: PurePath) -> bool:
    """Recognise files and folders whose names begin with a dot, such as the `._song.wav` of AppleDouble."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.parts)


def say_left_out(source: str, names: Iterable[PurePath], why: str = "no audio by their names") -> None:
    """Print how many files of a data set are passed over, by the ends of their names."""
    kinds = Counter("hidden" if is_hidden(name) else name.suffix.lower() or "without suffix" for name in names)
    if kinds:
        counts = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
        print(f"{source}: {kinds.total()} files left out, {why}: {counts}", file=sys.stderr)
