"""Validation of a data set before training: counts, lengths, formats, and everything that is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stable_audio_lite.audio.io import AudioSource, audio_blocks, audio_info
from stable_audio_lite.bundle import CONFIG_FILE, TOKENIZER_FILE, read_config, resolve
from stable_audio_lite.clap.config import MAX_TOKENS
from stable_audio_lite.data.manifest import Item, read_items
from stable_audio_lite.errors import UserError

CLIPPED_SAMPLES = 3
"""Neighbouring samples at the file's highest level, full scale or close to it, that count as clipping."""

_SILENCE_DB, _FULL_SCALE = -80.0, 0.999
_LISTED = 10  # files named for each kind of fault


@dataclass(frozen=True)
class FileReport:
    """One file: its format and faults; `error` says why it can't be read, else it is None."""

    path: AudioSource
    seconds: float = 0.0
    sample_rate: int = 0
    channels: int = 0
    silent: bool = False
    clipped: bool = False
    captioned: bool = False
    error: str | None = None


@dataclass
class DatasetReport:
    """Statistics of a data set.

    Attributes:
        files, seconds: number of files and length of the readable ones.
        rates, channels: numbers of readable files by sample rate and by number of channels.
        shortest, longest: seconds.
        faults: files by what is wrong: "broken", "silent", "clipped", "without caption", "caption cut".
        errors: why the broken ones can't be read.
        unread: ends of captions that a text encoder doesn't read, one for each file with such.
    """

    files: int = 0
    seconds: float = 0.0
    shortest: float = float("inf")
    longest: float = 0.0
    rates: Counter[int] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)
    faults: dict[str, list[AudioSource]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def cut(self, items: Iterable[Item], unread: Callable[[Sequence[str]], list[str]]) -> None:
        """Note captions whose ends `unread` returns, since a text encoder doesn't read them."""
        for item in items:
            if end := next(filter(None, unread(item.captions)), ""):
                self.faults.setdefault("caption cut", []).append(item.path)
                self.unread.append(end)

    def add(self, file: FileReport) -> None:
        """Count one file."""
        self.files += 1
        found = {
            "broken": file.error is not None,
            "silent": file.silent,
            "clipped": file.clipped,
            "without caption": not file.captioned,
        }
        for fault, is_so in found.items():
            if is_so:
                self.faults.setdefault(fault, []).append(file.path)
        if file.error is not None:
            self.errors.append(file.error)
            return
        self.seconds += file.seconds
        self.shortest, self.longest = min(self.shortest, file.seconds), max(self.longest, file.seconds)
        self.rates[file.sample_rate] += 1
        self.channels[file.channels] += 1

    def as_json(self) -> dict[str, Any]:
        """All statistics and every faulty file as plain values."""
        readable = bool(self.rates)
        return {
            "files": self.files,
            "hours": self.seconds / 3600,
            "shortest_seconds": self.shortest if readable else None,
            "longest_seconds": self.longest if readable else None,
            "sample_rates": {str(k): v for k, v in sorted(self.rates.items())},
            "channels": {str(k): v for k, v in sorted(self.channels.items())},
            "faults": {fault: [str(p) for p in paths] for fault, paths in self.faults.items()},
            "errors": self.errors,
            "unread": self.unread,
        }

    def in_short(self) -> str:
        """Five lines at most: what there is, and how much has which fault, with an example."""
        length = f", {self.shortest:.1f} to {self.longest:.1f} s each" if self.rates else ""
        rates = ", ".join(f"{rate} Hz" for rate in sorted(self.rates))
        lines = [f"{self.files} files, {self.seconds / 3600:.2f} h{length}{rates and f', {rates}'}"]
        for fault in ("broken", "silent", "clipped", "caption cut"):
            if paths := self.faults.get(fault):
                shown = self.errors[0] if fault == "broken" else str(paths[0])
                shown += f": not read: {self.unread[0]}" if fault == "caption cut" else ""
                lines.append(f"{len(paths)} {fault}{', such as' if len(paths) > 1 else ':'} {shown}")
        return "\n".join(lines)

    def as_text(self) -> str:
        """A summary that names the first files of each fault."""
        lines = [f"files            {self.files}", f"hours            {self.seconds / 3600:.2f}"]
        if self.rates:
            lines.append(f"seconds per file {self.shortest:.1f} to {self.longest:.1f}")
        for name, counts, unit in (("sample rates", self.rates, " Hz"), ("channels", self.channels, "")):
            lines.append(f"{name:16} " + ", ".join(f"{value}{unit}: {n}" for value, n in sorted(counts.items())))
        for fault in ("broken", "silent", "clipped", "without caption", "caption cut"):
            paths = self.faults.get(fault, [])
            lines.append(f"{fault:16} {len(paths)}")
            shown = self.errors if fault == "broken" else [str(p) for p in paths]
            if fault == "caption cut":
                shown = [f"{p}: not read: {end}" for p, end in zip(shown, self.unread, strict=True)]
            lines += [f"  {text}" for text in shown[:_LISTED]]
            if len(paths) > _LISTED:
                lines.append(f"  and {len(paths) - _LISTED} more (all are in the report as JSON)")
        return "\n".join(lines)


def validate(path: str | Path, workers: int = 4, model: str | None = None) -> DatasetReport:
    """Read every file of a data set from beginning to end, and captions as the text encoder of the bundle `model` does.

    Raises:
        UserError: there is no data set at `path`, or no bundle `model`.
    """
    return validate_items(read_items(path), workers, model)


def validate_items(items: Sequence[Item], workers: int = 4, model: str | None = None) -> DatasetReport:
    """Read every file of a data set, and its captions, as `validate` does."""
    from tqdm import tqdm

    report = DatasetReport()
    with ThreadPoolExecutor(workers) as pool:
        for file in tqdm(pool.map(inspect, items), total=len(items), unit="file", leave=False):
            report.add(file)
    if model is not None and (unread := _reader(model)):
        report.cut(items, unread)
    return report


def _reader(model: str) -> Callable[[Sequence[str]], list[str]] | None:
    """Make a function that finds the ends of texts that a bundle's text encoder doesn't read; None if it has none."""
    from stable_audio_lite.clap.tokenizer import load_tokenizer, unread_parts

    folder = resolve(model)
    clap = read_config(folder)[1].get("clap")
    if not isinstance(clap, dict) or not (folder / TOKENIZER_FILE).is_file():
        return None
    most = clap.get("max_tokens", MAX_TOKENS)
    if not isinstance(most, int):
        raise UserError(f"{folder / CONFIG_FILE}: key 'clap.max_tokens' must be a whole number, got {most!r}")
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
    return lambda texts: unread_parts(tokenizer, texts, most)


def inspect(item: Item) -> FileReport:
    """Read all of one file, in blocks."""
    captioned = any(caption.strip() for caption in item.captions)
    try:
        info = audio_info(item.path)
        peak, clipped = _levels(audio_blocks(item.path))
    except UserError as error:
        return FileReport(item.path, captioned=captioned, error=str(error))
    return FileReport(
        item.path,
        seconds=info.seconds,
        sample_rate=info.sample_rate,
        channels=info.channels,
        silent=peak < 10 ** (_SILENCE_DB / 20),
        clipped=clipped,
        captioned=captioned,
    )


def _levels(blocks: Iterable[np.ndarray]) -> tuple[float, bool]:
    """Find the highest level of the (C, T) blocks, and whether neighbouring samples are at full scale."""
    peak, clipped = 0.0, False
    for left, block in _with_tail(blocks):
        peak = max(peak, float(np.abs(block).max(initial=0.0)))
        loud = np.abs(np.concatenate((left, block), axis=1)) >= _FULL_SCALE
        runs = loud[:, CLIPPED_SAMPLES - 1 :]
        for back in range(1, CLIPPED_SAMPLES):
            runs = runs & loud[:, CLIPPED_SAMPLES - 1 - back : loud.shape[1] - back]
        clipped = clipped or bool(runs.any())
    return peak, clipped


def _with_tail(blocks: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each block with the last samples of the one before it, for runs that straddle the boundary."""
    tail: np.ndarray | None = None
    for block in blocks:
        yield (block[:, :0] if tail is None else tail), block
        tail = block[:, -(CLIPPED_SAMPLES - 1) :]
