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

import json
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stable_audio_lite.config import to_dict
from stable_audio_lite.corpus.captions import captions
from stable_audio_lite.corpus.compose import CorpusConfig, compose
from stable_audio_lite.corpus.piece import Piece
from stable_audio_lite.corpus.render import CORPUS_SAMPLE_RATE, find_soundfont, find_synth, render
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import replacing

_VERSION = 2
_SETTINGS = "corpus.json"


@dataclass(frozen=True, kw_only=True)
class CorpusReport:
    """Result of a run: items rendered now, items kept from before, and seconds of sound in the whole corpus."""

    rendered: int
    kept: int
    seconds: float


def build_corpus(
    out: Path, *, workers: int | None = None, soundfont: str | None = None, progress: bool = True, **settings: Any
) -> CorpusReport:
    """Compose and render the corpus of a `CorpusConfig` into folder `out`; keep files already there.

    `workers` synthesizers run at once, by default one per core. `settings` are a `CorpusConfig`, None its default.

    Raises:
        UserError: a setting is out of range, `out` can't be written or holds a corpus with other settings, or
            FluidSynth or its soundfont is missing.
    """
    config = CorpusConfig(**{name: value for name, value in settings.items() if value is not None})
    if workers is not None and workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")
    find_synth()
    font = find_soundfont(soundfont)
    new = _claim(out, config)
    splits = {"train": config.items, "held_out": config.held_out}
    try:
        pieces = [compose(config, split, index) for split, count in splits.items() for index in range(count)]
        missing = [piece for piece in pieces if not _audio_path(out, config, piece).exists()]
        _render_all(out, config, missing, len(pieces), font, workers or os.cpu_count() or 1, progress)
    except BaseException:
        if new and {path.name for path in out.iterdir()} == {_SETTINGS}:  # not even one piece was made
            (out / _SETTINGS).unlink()
            with suppress(OSError):
                out.rmdir()
        raise
    for split in splits:
        rows = [json.dumps(metadata_row(piece, config.audio_format)) for piece in pieces if piece.split == split]
        with replacing(out / split / "metadata.jsonl") as temporary:
            temporary.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    total = sum(piece.seconds for piece in pieces)
    return CorpusReport(rendered=len(missing), kept=len(pieces) - len(missing), seconds=total)


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


def _audio_path(out: Path, config: CorpusConfig, piece: Piece) -> Path:
    return out / piece.split / f"{piece.index:06d}.{config.audio_format}"


def _claim(out: Path, config: CorpusConfig) -> bool:
    """Record the settings in the folder and return True, or check them against those of the corpus already there."""
    path = out / _SETTINGS
    settings = {"version": _VERSION, **to_dict(config)}
    del settings["items"], settings["held_out"]
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"{out}: holds other files, no corpus; choose an empty folder") from None
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return True
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read; choose an empty folder") from error
    found = {"tempo_step": 1} | found if isinstance(found, dict) else {}  # older corpora don't say
    differing = [key for key in settings if found.get(key) != settings[key]]
    if differing:
        raise UserError(f"{path}: this corpus has another {', '.join(differing)}; choose an empty folder")
    return False


def _render_all(
    out: Path, config: CorpusConfig, pieces: list[Piece], total: int, font: Path, workers: int, progress: bool
) -> None:
    from tqdm import tqdm

    bar = tqdm(total=total, initial=total - len(pieces), unit="piece", disable=not progress)
    pool = ThreadPoolExecutor(workers)  # threads suffice: each waits for a synthesizer process of its own
    try:
        for job in as_completed([pool.submit(_write_item, out, config, piece, font) for piece in pieces]):
            job.result()
            bar.update()
    finally:
        pool.shutdown(cancel_futures=True)  # jobs not yet begun, where one failed or the user interrupts
        bar.close()


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
