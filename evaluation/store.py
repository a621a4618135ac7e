"""Embeddings on disk, under the hash of all that they depend on, and the work of filling the store.

What is on disk is not computed again, so a killed evaluation goes on where it stopped, and the next one with the same
recordings begins with them. Files are split over processes and, within one, over threads; each goes through the
networks by itself, so what it gives depends on nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

import stable_audio_lite
from evaluation.sounds import Clip
from stable_audio_lite.audio.io import AudioSource
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import replacing, save_tensors

_FORMAT = 1
"""Version of what is stored; one more where the code changes what extractors give."""

_PACKAGES = ("torch", "torchaudio", "transformers", "hear21passt", "soxr", "soundfile", "numpy", "pyloudnorm")
_A = TypeVar("_A")
_B = TypeVar("_B")


@cache
def versions() -> dict[str, str]:
    """Versions of this package, and of those whose code embeddings come from."""
    found = {"stable-audio-lite": stable_audio_lite.__version__}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package).partition("+")[0]  # without what torch was built for
    return found


def set_hash(keys: Iterable[str]) -> dict[str, Any]:
    """The number of "sounds", and a "hash" of their keys in whatever order they come."""
    ordered = sorted(keys)
    return {"sounds": len(ordered), "hash": _short("\n".join(ordered).encode("utf-8", "surrogatepass"))}


def code_hash(*modules: ModuleType) -> str:
    """A name of what modules compute, by their source."""
    return _short(b"".join(Path(str(module.__file__)).read_bytes() for module in modules))


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


class FeatureExtractor(Protocol):
    """Anything that makes named tensors of a file; `settings` hold whatever changes them."""

    name: str
    settings: dict[str, Any]

    def embed(self, source: AudioSource) -> dict[str, Tensor]:
        """Named tensors of a file, on the CPU.

        Raises:
            UserError: the file can't be read.
        """
        ...


class Embedder(FeatureExtractor, Protocol):
    """A network whose tensors hold an "embedding" (windows, D), of which metrics are taken.

    Attributes:
        unit: "windows" where a sound has several embeddings, or "".
    """

    unit: str


@dataclass(frozen=True)
class Store:
    """Named tensors in `folder`, one safetensors file for a sound, an extractor and the versions of packages."""

    folder: Path

    def path(self, clip: Clip, extractor: FeatureExtractor) -> Path:
        """The file of these tensors, whether or not it is there."""
        told = json.dumps([_FORMAT, clip.key, extractor.name, extractor.settings, versions()], sort_keys=True)
        key = hashlib.sha256(told.encode()).hexdigest()
        return self.folder / extractor.name / key[:2] / f"{key}.safetensors"

    def read(self, clip: Clip, extractor: FeatureExtractor) -> dict[str, Tensor] | None:
        """Stored tensors; None for nothing, or a damaged file."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return load(self.path(clip, extractor).read_bytes())
        except (OSError, SafetensorError):
            return None

    def write(self, clip: Clip, extractor: FeatureExtractor, tensors: dict[str, Tensor]) -> None:
        """Store tensors.

        Raises:
            UserError: the disk is full, or the place can't be written.
        """
        with replacing(self.path(clip, extractor)) as temporary:
            save_tensors(temporary, tensors, {"format": "pt"})


def in_parallel(function: Callable[[_A], _B], items: Sequence[_A], workers: int) -> list[_B]:
    """Call `function` on every item, by all processes and `workers` threads in each; returns results in order."""
    from tqdm import tqdm

    state = PartialState()
    mine = items[state.process_index :: state.num_processes]
    with ThreadPoolExecutor(workers) as pool:
        try:
            coming = pool.map(function, mine)
            found = list(tqdm(coming, total=len(mine), unit="sound", disable=not state.is_main_process, leave=False))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if state.num_processes == 1:
        return found
    parts: list[list[_B]] = gather_object([found])
    return [parts[number % len(parts)][number // len(parts)] for number in range(len(items))]


def embed_all(wanted: Iterable[tuple[Clip, Sequence[FeatureExtractor]]], store: Store, workers: int) -> dict[str, str]:
    """Fill the store with what each extractor gives for each clip; returns reasons by path for those that fail.

    Raises:
        UserError: the store can't be written.
    """
    jobs: dict[str, tuple[Clip, dict[str, FeatureExtractor]]] = {}
    paths: dict[str, set[str]] = {}  # of one key, as a file may be there twice
    for clip, extractors in wanted:
        jobs.setdefault(clip.key, (clip, {}))[1].update({extractor.name: extractor for extractor in extractors})
        paths.setdefault(clip.key, set()).add(clip.record.path)

    def embed(job: tuple[Clip, dict[str, FeatureExtractor]]) -> str:
        clip, extractors = job
        todo = [extractor for extractor in extractors.values() if store.read(clip, extractor) is None]
        if not todo:
            return ""
        try:
            with clip.file() as source:
                found = [extractor.embed(source) for extractor in todo]
        except UserError as error:
            return str(error)
        for extractor, tensors in zip(todo, found, strict=True):
            store.write(clip, extractor, tensors)
        return ""

    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        reasons = in_parallel(embed, list(jobs.values()), workers)
    return {path: reason for key, reason in zip(jobs, reasons, strict=True) if reason for path in paths[key]}
