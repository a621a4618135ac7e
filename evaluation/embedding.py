"""Runs embedders over sounds and keeps what they give on disk, by file's hash, embedder's settings and versions.

What is on disk is not computed again, so a killed evaluation goes on where it stopped, and the next one with the same
recordings begins with them. Files are split over processes and, within one, over threads; each goes through the
networks by itself, so what it gives depends on nothing else.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from evaluation.frechet import Gaussian
from evaluation.manifest import code_hash, versions
from evaluation.sounds import Clip
from evaluation.streams import LONGEST
from stable_audio_lite.audio.io import AudioSource, audio_info, read_audio
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import replacing, save_tensors

FORMAT = 1
"""Of what is kept; one more where the code changes what embedders give."""

_BLOCK = 1 << 20  # numbers of an embedding file that are in memory at once
_RATE = 44100  # at which sounds are described

_A = TypeVar("_A")
_B = TypeVar("_B")


class Listener(Protocol):
    """An `Embedder`, or whatever else makes named tensors of a file."""

    name: str
    settings: dict[str, Any]

    def embed(self, source: AudioSource) -> dict[str, Tensor]:
        """Named tensors, on the CPU."""
        ...


class Describer:
    """`evaluation.listening.describe`: numbers by name; of a file over `LONGEST`, its beginning's, without its end."""

    name = "listening"

    def __init__(self) -> None:
        from evaluation import listening, music, obedience

        self._describe = listening.describe
        self.settings = {"code": code_hash(listening, music, obedience)}

    def embed(self, source: AudioSource) -> dict[str, Tensor]:
        """A scalar for each measurement."""
        heard = self._describe(read_audio(source, _RATE, seconds=LONGEST), _RATE)
        if audio_info(source).seconds > LONGEST:
            heard.pop("end", None)
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in heard.items()}


@dataclass(frozen=True)
class Store:
    """Named tensors in `folder`, one safetensors file for a sound, a listener and the versions of packages."""

    folder: Path

    def path(self, clip: Clip, listener: Listener) -> Path:
        """Where they lie, or would."""
        told = json.dumps([FORMAT, clip.key, listener.name, listener.settings, versions()], sort_keys=True)
        key = hashlib.sha256(told.encode()).hexdigest()
        return self.folder / listener.name / key[:2] / f"{key}.safetensors"

    def read(self, clip: Clip, listener: Listener) -> dict[str, Tensor] | None:
        """What is kept; None for nothing, or a damaged file."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return load(self.path(clip, listener).read_bytes())
        except (OSError, SafetensorError):
            return None

    def write(self, clip: Clip, listener: Listener, tensors: dict[str, Tensor]) -> None:
        """Keep them.

        Raises:
            UserError: the disk is full, or the place can't be written.
        """
        with replacing(self.path(clip, listener)) as temporary:
            save_tensors(temporary, tensors, {"format": "pt"})


def in_parallel(function: Callable[[_A], _B], items: Sequence[_A], workers: int) -> list[_B]:
    """`function` of every item, in order, by all processes and `workers` threads in each."""
    from tqdm import tqdm

    state = PartialState()
    mine = items[state.process_index :: state.num_processes]
    with ThreadPoolExecutor(workers) as pool:
        try:
            coming = pool.map(function, mine)
            bar = tqdm(coming, total=len(mine), unit="sound", disable=not state.is_main_process, leave=False)
            found = list(bar)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if state.num_processes == 1:
        return found
    parts: list[list[_B]] = gather_object([found])
    return [parts[number % len(parts)][number // len(parts)] for number in range(len(items))]


def embed_all(wanted: Iterable[tuple[Clip, Sequence[Listener]]], store: Store, workers: int) -> dict[str, str]:
    """Fill the store with what each listener gives for each clip; returns reasons by path for those that fail.

    Raises:
        UserError: the store can't be written.
    """
    jobs: dict[str, tuple[Clip, dict[str, Listener]]] = {}
    paths: dict[str, set[str]] = {}  # of one key, as a file may be there twice
    for clip, listeners in wanted:
        jobs.setdefault(clip.key, (clip, {}))[1].update({listener.name: listener for listener in listeners})
        paths.setdefault(clip.key, set()).add(clip.sound.path)

    def hear(job: tuple[Clip, dict[str, Listener]]) -> str:
        clip, listeners = job
        todo = [listener for listener in listeners.values() if store.read(clip, listener) is None]
        if not todo:
            return ""
        try:
            with clip.file() as source:
                heard = [listener.embed(source) for listener in todo]
        except UserError as error:
            return str(error)
        for listener, tensors in zip(todo, heard, strict=True):
            store.write(clip, listener, tensors)
        return ""

    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        reasons = in_parallel(hear, list(jobs.values()), workers)
    return {path: reason for key, reason in zip(jobs, reasons, strict=True) if reason for path in paths[key]}


class Rows:
    """Embeddings of sounds, several rows each, in a temporary file, so that memory doesn't grow with them.

    Attributes:
        counts: rows of each sound.
        width: of a row.
    """

    def __init__(self, embeddings: Iterable[Tensor]):
        self.counts: list[int] = []
        self.width = 0
        self._file = tempfile.TemporaryFile()
        for rows in embeddings:
            self.counts.append(len(rows))
            self.width = rows.shape[1]
            self._file.write(rows.float().contiguous().numpy().tobytes())

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def blocks(self) -> Iterator[Tensor]:
        """All rows, some thousand at once, (n, width) float64."""
        size = max(1, _BLOCK // self.width)
        self._file.seek(0)
        while data := self._file.read(4 * size * self.width):
            yield torch.from_numpy(np.frombuffer(data, np.float32).reshape(-1, self.width).astype(np.float64))

    def gaussian(self, weights: Tensor | None = None) -> Gaussian:
        """Mean and covariance, each sound counted `weights` (sounds,) times, by default once.

        Raises:
            ValueError: fewer than two rows count.
        """
        times = torch.ones(len(self.counts)) if weights is None else weights
        each = times.double().repeat_interleave(torch.tensor(self.counts))
        total = float(each.sum())
        if total < 2:
            raise ValueError(f"expected at least 2 embeddings, got {total:g}")
        first, sums = 0, torch.zeros(self.width, dtype=torch.float64)
        products = torch.zeros(self.width, self.width, dtype=torch.float64)
        shift: Tensor | None = None  # keeps what is summed small beside what it varies by
        for block in self.blocks():
            shift = block[0] if shift is None else shift
            block = block - shift
            weighted = block * each[first : first + len(block), None]
            sums += weighted.sum(0)
            products += weighted.T @ block
            first += len(block)
        assert shift is not None
        mean = sums / total
        covariance = (products - total * mean.outer(mean)) / (total - 1)
        return Gaussian(mean + shift, (covariance + covariance.T) / 2)
