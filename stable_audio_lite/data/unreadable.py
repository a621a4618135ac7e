"""Files of a data set that can't be read: skipped, counted and listed, up to an allowed share."""

from __future__ import annotations

import json
from pathlib import Path

from stable_audio_lite.audio.io import AudioSource
from stable_audio_lite.errors import UserError

REPORT = "unreadable.jsonl"


class Unreadable:
    """The files that couldn't be read so far, and why.

    Args:
        total: files in the data set.
        allowed: share of them that may be unreadable.
        folder: where `unreadable.jsonl` lists them, one row per file, for all processes and after a restart; None keeps
            the list in memory.

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
        self._read()

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
                with self.report.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"file": str(path), "error": str(error)}) + "\n")
        if len(self) > self.allowed * self.total:
            listing = f"{self.report} lists them" if self.report else "stable-audio-lite validate-dataset lists them"
            raise UserError(
                f"{error} ({len(self)} of {self.total} files can't be read, max_unreadable allows {self.allowed:.2%}; "
                f"{listing})"
            ) from error

    def _read(self) -> None:
        if not self.report or not self.report.is_file():
            return
        for line in self.report.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                self.reasons.setdefault(row["file"], row["error"])
            except (ValueError, KeyError, TypeError):
                continue  # a row cut short when a process was killed
