"""One piece of audio of a data set, with the texts that describe it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from stable_audio_lite.audio.io import AudioSource
from stable_audio_lite.errors import UserError

SUFFIXES = {".wav", ".flac", ".ogg", ".mp3", ".aiff"}


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


def captions_of(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """The texts of a metadata row: its "captions", a list, or its "text".

    Raises:
        UserError: they are something else; the message begins with `where`.
    """
    captions = row.get("captions") or ([row["text"]] if row.get("text") else [])
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise UserError(f"{where}: 'text' should be a text and 'captions' a list of texts")
    return tuple(captions)
