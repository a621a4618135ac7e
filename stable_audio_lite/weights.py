"""Weights: read from safetensors and from files that `torch.save` wrote, fetched from the hub, checked and hashed.

No code in a file is ever run: of a pickle, tensors and plain values alone are read.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stable_audio_lite.errors import UserError
from stable_audio_lite.files import check_utf8

# LAION's CLAP files hold learning rates as NumPy scalars, which NumPy 1 and 2 name differently.
_scalar = np.float64().__reduce__()[0]
_NUMPY_SCALARS: list[Any] = [
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64")),
]
_SHOWN = 3  # mismatching tensors that a message spells out


def read_safetensors(path: str | Path, names: Sequence[str] = ()) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a file on the CPU, or those of `names` that it has, and its metadata.

    Raises:
        UserError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    check_utf8(path)
    try:
        with safe_open(path, framework="pt") as file:
            wanted = [name for name in file.keys() if not names or name in names]
            return {name: file.get_tensor(name) for name in wanted}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: damaged, or no safetensors file ({reason}); fetch or make it again") from error


def read_pickle(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `torch.save` wrote: the tensors of its "state_dict", or of all of it, and all of it.

    Raises:
        UserError: the file is missing or damaged, or holds code, or no tensors by name.
    """
    try:
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"  # as torch writes since 1.6: what is never used is never read
        # torch warns of what it then refuses.
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(_NUMPY_SCALARS):
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except Exception as error:  # torch raises several kinds for broken files and for code in pickles
        raise UserError(
            f"{path}: damaged, or holds more than weights, and is not loaded; fetch it again, or save its state_dict "
            "alone"
        ) from error
    state = data.get("state_dict", data) if isinstance(data, Mapping) else None
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, Mapping) else {}
    if not tensors:
        raise UserError(f"{path}: holds no tensors by name; fetch it again")
    return tensors, dict(data)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a `.safetensors` or of any other file as `read_pickle` does.

    Raises:
        UserError: as `read_safetensors` or `read_pickle`.
    """
    return (read_safetensors if path.suffix == ".safetensors" else read_pickle)(path)[0]


def fetch_from_hub(repository: str, files: Sequence[str]) -> Path:
    """Download those of `files`, perhaps patterns, that a Hugging Face repository has; returns their folder.

    Raises:
        UserError: there is no such repository, no access, or no connection.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(files)))
    except Exception as error:  # the hub client has many, none of which the user can tell apart
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{repository}: neither a folder nor a hub id that could be fetched ({reason})") from error


def check_tensors(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str, what: str) -> None:
    """Check names and shapes.

    Raises:
        UserError: tensors are missing, unexpected or of other shapes; names them, and `what` they should fit.
    """
    found = [
        f"'{k}' has shape {tuple(state[k].shape)}, {what} gives {tuple(v.shape)}"
        for k, v in expected.items()
        if k in state and state[k].shape != v.shape
    ]
    found += [f"'{k}' {tuple(v.shape)} is missing" for k, v in expected.items() if k not in state]
    found += [f"'{k}' {tuple(v.shape)} is unexpected" for k, v in state.items() if k not in expected]
    if found:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise UserError(f"{where}: weights don't fit {what}: {'; '.join(found[:_SHOWN])}{more}")


def load_state(module: nn.Module, state: Mapping[str, Tensor], where: str, what: str, assign: bool = False) -> None:
    """Load `state` into `module`; with `assign` the module adopts the tensors, their type included, without a copy.

    Raises:
        UserError: as `check_tensors`.
    """
    check_tensors(state, module.state_dict(), where, what)
    module.load_state_dict(state, assign=assign)


def state_hash(state: Mapping[str, Tensor]) -> str:
    """Hexadecimal SHA-256 of weights by name, whatever file they came from, and in however many bits it stored them."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        value = value.float() + 0.0 if value.is_floating_point() else value  # which makes -0.0 one with 0.0
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
