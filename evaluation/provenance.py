"""Names of what metrics depend on: sets of sounds, code, versions."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import stable_audio_lite

_PACKAGES = ("torch", "torchaudio", "transformers", "hear21passt", "soxr", "soundfile", "numpy", "pyloudnorm")


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
