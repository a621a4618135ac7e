"""Write a corpus to disk: sound, metadata in the Hugging Face AudioFolder convention, and every item's notes.

    OUT/corpus.json               the settings; another run must match them
    OUT/train/000000.flac         stereo, 44.1 kHz, 16 bits
    OUT/train/metadata.jsonl      one row per item, in order
    OUT/train/notes/000000.json   parts, chords and notes
    OUT/held_out/...              the same, of pieces that the other split never sees

Items are pure functions of (seed, split, index): a larger corpus starts with the smaller one, and a run that was
interrupted resumes where it stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stable_audio_lite.corpus.captions import captions
from stable_audio_lite.corpus.compose import MAX_PARTS, compose
from stable_audio_lite.corpus.instruments import INSTRUMENTS
from stable_audio_lite.corpus.piece import Piece
from stable_audio_lite.corpus.render import CORPUS_SAMPLE_RATE, find_soundfont, find_synth, render
from stable_audio_lite.corpus.styles import STYLES
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import replacing

MIN_SECONDS, MAX_SECONDS = 2.0, 60.0
"""Range of lengths, in seconds."""
_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class CorpusReport:
    """Result of a run: items rendered now, items kept from before, and seconds of sound in the whole corpus."""

    rendered: int
    kept: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Contents of a corpus, checked on construction.

    Attributes:
        items, held_out: numbers of training pieces and of held-out ones.
        min_seconds, max_seconds: range of their lengths.
        max_parts: largest number of instruments in a piece, not counting drums.
        instruments, styles: names to draw from.
        drums: allow drums.

    Raises:
        UserError: a value is out of range.
    """

    items: int
    held_out: int
    seed: int = 0
    min_seconds: float = 4.0
    max_seconds: float = 30.0
    max_parts: int = MAX_PARTS
    instruments: tuple[str, ...] = tuple(INSTRUMENTS)
    styles: tuple[str, ...] = tuple(STYLES)
    drums: bool = True
    audio_format: Literal["flac", "wav"] = "flac"

    def __post_init__(self) -> None:
        if self.items < 1:
            raise UserError(f"items must be at least 1, got {self.items}")
        if self.held_out < 0:
            raise UserError(f"held_out can't be negative, got {self.held_out}")
        if not MIN_SECONDS <= self.min_seconds <= MAX_SECONDS:
            raise UserError(f"min_seconds must lie in {MIN_SECONDS:g}..{MAX_SECONDS:g}, got {self.min_seconds:g}")
        if not MIN_SECONDS <= self.max_seconds <= MAX_SECONDS:
            raise UserError(f"max_seconds must lie in {MIN_SECONDS:g}..{MAX_SECONDS:g}, got {self.max_seconds:g}")
        if self.min_seconds > self.max_seconds:
            raise UserError(f"min_seconds ({self.min_seconds:g}) is more than max_seconds ({self.max_seconds:g})")
        if not 1 <= self.max_parts <= MAX_PARTS:
            raise UserError(f"max_parts must lie in 1..{MAX_PARTS}, got {self.max_parts}")
        for name, known in (("instruments", INSTRUMENTS), ("styles", STYLES)):
            chosen = getattr(self, name)
            if not chosen or len(set(chosen)) < len(chosen):
                raise UserError(f"{name} must name one or several, each once, got {', '.join(chosen) or 'none'}")
            if unknown := next((word for word in chosen if word not in known), None):
                raise UserError(f"{name}: {unknown!r} is not known; choose from {', '.join(known)}")
        if self.audio_format not in ("flac", "wav"):
            raise UserError(f"audio_format must be flac or wav, got {self.audio_format!r}")


def build_corpus(
    out: Path,
    items: int,
    held_out: int,
    seed: int = 0,
    workers: int | None = None,
    min_seconds: float = 4.0,
    max_seconds: float = 30.0,
    max_parts: int = MAX_PARTS,
    instruments: Sequence[str] | None = None,
    styles: Sequence[str] | None = None,
    drums: bool = True,
    audio_format: Literal["flac", "wav"] = "flac",
    soundfont: str | None = None,
    progress: bool = True,
) -> CorpusReport:
    """Compose and render `items` training pieces and `held_out` others into folder `out`; keep files already there.

    `workers` synthesizers run at once (one per core by default). The other settings are those of `CorpusConfig`; None
    stands for all instruments or styles.

    Raises:
        UserError: an argument is out of range, `out` can't be written or holds a corpus with other settings, or
            FluidSynth or its soundfont is missing.
    """
    config = CorpusConfig(
        items=items,
        held_out=held_out,
        seed=seed,
        min_seconds=float(min_seconds),
        max_seconds=float(max_seconds),
        max_parts=max_parts,
        instruments=tuple(INSTRUMENTS if instruments is None else instruments),
        styles=tuple(STYLES if styles is None else styles),
        drums=drums,
        audio_format=audio_format,
    )
    if workers is not None and workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")
    find_synth()
    font = find_soundfont(soundfont)
    out = Path(out)
    _claim(out, config)
    pieces = [compose_item(config, split, i) for split, n in _splits(config) for i in range(n)]
    missing = [piece for piece in pieces if not _audio_path(out, config, piece).exists()]
    _render_all(out, config, missing, len(pieces), font, workers or os.cpu_count() or 1, progress)
    for split, _ in _splits(config):
        rows = [json.dumps(metadata_row(piece, audio_format)) for piece in pieces if piece.split == split]
        with replacing(out / split / "metadata.jsonl") as temporary:
            temporary.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    total = sum(piece.seconds for piece in pieces)
    return CorpusReport(rendered=len(missing), kept=len(pieces) - len(missing), seconds=total)


def compose_item(config: CorpusConfig, split: str, index: int) -> Piece:
    """Compose item `index` of a split, which does not depend on the number of items."""
    return compose(
        config.seed,
        split,
        index,
        config.min_seconds,
        config.max_seconds,
        config.max_parts,
        config.instruments,
        config.styles,
        config.drums,
    )


def metadata_row(piece: Piece, audio_format: str) -> dict[str, Any]:
    """Return the piece's row of metadata.jsonl: captions and labels (`instruments`: lead first, without drums)."""
    texts = captions(piece)
    return {
        "file_name": f"{piece.index:06d}.{audio_format}",
        "text": texts[0],
        "captions": texts,
        "seconds": piece.seconds,
        "instruments": piece.instruments,
        "families": piece.families,
        "style": piece.style,
        "key": piece.key,
        "mode": piece.mode,
        "bpm": piece.bpm,
        "drums": piece.drums,
        "seed": piece.seed,
        "notes": f"notes/{piece.index:06d}.json",
    }


def _splits(config: CorpusConfig) -> list[tuple[str, int]]:
    return [("train", config.items), ("held_out", config.held_out)]


def _audio_path(out: Path, config: CorpusConfig, piece: Piece) -> Path:
    return out / piece.split / f"{piece.index:06d}.{config.audio_format}"


def _claim(out: Path, config: CorpusConfig) -> None:
    """Record the settings in the folder, or check them against those of the corpus already there."""
    path = out / "corpus.json"
    settings = {
        "version": _VERSION,
        "seed": config.seed,
        "min_seconds": config.min_seconds,
        "max_seconds": config.max_seconds,
        "max_parts": config.max_parts,
        "instruments": list(config.instruments),
        "styles": list(config.styles),
        "drums": config.drums,
        "audio_format": config.audio_format,
    }
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"{out}: holds other files, no corpus; choose an empty folder") from None
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read; choose an empty folder") from error
    differing = [key for key in settings if not isinstance(found, dict) or found.get(key) != settings[key]]
    if differing:
        raise UserError(f"{path}: this corpus has another {', '.join(differing)}; choose an empty folder")


def _render_all(
    out: Path, config: CorpusConfig, pieces: list[Piece], total: int, font: Path, workers: int, progress: bool
) -> None:
    from tqdm import tqdm

    # Threads suffice: each waits for a synthesizer process of its own.
    with (
        tqdm(total=total, initial=total - len(pieces), unit="piece", disable=not progress) as bar,
        _pool(workers) as pool,
    ):
        jobs = [pool.submit(_write_item, out, config, piece, font) for piece in pieces]
        for job in as_completed(jobs):
            job.result()
            bar.update()


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool that drops jobs not yet begun when something fails or the user interrupts."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _write_item(out: Path, config: CorpusConfig, piece: Piece, font: Path) -> None:
    import soundfile

    sound = render(piece, font)
    # The sound is written last: once it is there, the item is complete.
    with replacing(out / piece.split / "notes" / f"{piece.index:06d}.json") as temporary:
        temporary.write_text(json.dumps(piece.events(), separators=(",", ":")), encoding="utf-8")
    path = _audio_path(out, config, piece)
    with replacing(path) as temporary:
        try:
            soundfile.write(temporary, sound, CORPUS_SAMPLE_RATE, subtype="PCM_16")
        except soundfile.LibsndfileError as error:
            raise UserError(f"{path}: can't be written ({error}); is the disk full?") from error
