"""Files of a data set that can't be read: skipped, counted and listed, up to an allowed share."""

from __future__ import annotations

import json
from pathlib import Path

from stable_audio_lite.audio.io import AudioSource, audio_hash
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import append_line, replacing

REPORT = "unreadable.jsonl"


class Unreadable:
    """The files that couldn't be read so far, and why.

    Args:
        total: files in the data set.
        allowed: share of them that may be unreadable.
        folder: where `unreadable.jsonl` lists them, one row per file, for all processes and after a restart, until the
            file changes; None keeps the list in memory.

    Attributes:
        reasons: messages by file.

    Raises:
        UserError: `allowed` is not in 0..1.
    """

    def __init__(self, total: int, allowed: float, folder: str | Path | None = None):
        if not 0 <= allowed <= 1:
            raise UserError(f"max_unreadable must lie in 0..1, got {allowed}")
        self.total, self.allowed = total, allowed
        self.report = None if folder is None else Path(folder) / REPORT
        self.reasons: dict[str, str] = {}
        self._read(forget_changed=True)

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, path: AudioSource, error: UserError) -> None:
        """Record that `path` can't be read.

        Raises:
            UserError: more than the allowed share of the files can't be read.
        """
        self._read()  # what other processes have recorded
        if str(path) not in self.reasons:
            self.reasons[str(path)] = str(error)
            if self.report:
                self.report.parent.mkdir(parents=True, exist_ok=True)
                row = {"file": str(path), "error": str(error), "sha256": content_hash(path)}
                append_line(self.report, json.dumps(row))
        if len(self) > self.allowed * self.total:
            listing = f"{self.report} lists them" if self.report else "stable-audio-lite validate-dataset lists them"
            raise UserError(
                f"{error} ({len(self)} of {self.total} files can't be read, max_unreadable allows {self.allowed:.2%}; "
                f"{listing})"
            ) from error

    def _read(self, forget_changed: bool = False) -> None:
        if not self.report or not self.report.is_file():
            return
        kept, lines = [], self.report.read_text(encoding="utf-8").splitlines()
        for line in lines:
            try:
                row = json.loads(line)
                file, error = row["file"], row["error"]
            except (ValueError, KeyError, TypeError):
                continue  # a row cut short when a process was killed
            if not forget_changed or row.get("sha256") == content_hash(file):
                self.reasons.setdefault(file, error)
                kept.append(line)
        if forget_changed and kept != lines:
            with replacing(self.report) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def content_hash(path: AudioSource) -> str:
    """SHA-256 of a file's bytes in hexadecimal digits, "" where they can't be read."""
    try:
        return audio_hash(path)
    except OSError:
        return ""
