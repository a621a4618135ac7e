"""Checkpoints: safetensors and one JSON file, written whole or not at all.

A checkpoint is a folder `step_00001000` with one safetensors file per module, per averaged copy and per optimizer, and
`state.json`. Nothing is pickled, so a checkpoint from a stranger can be read safely.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from stable_audio_lite.errors import UserError
from stable_audio_lite.files import replacing_folder

_NAME = re.compile(r"step_(\d{8})")


@dataclass(frozen=True)
class Resumable:
    """All that a resumed run needs besides its configuration, registered in one place."""

    modules: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    averages: dict[str, dict[str, Tensor]]
    tensors: dict[str, Tensor] = field(default_factory=dict)


def save_checkpoint(folder: Path, step: int, state: Resumable, info: dict[str, Any]) -> Path:
    """Write checkpoint `step` under `folder` and return its path.

    Raises:
        UserError: the folder can't be written or the disk is full.
    """
    path = folder / f"step_{step:08d}"
    with replacing_folder(path) as temporary:
        try:
            for name, module in state.modules.items():
                _save(module.state_dict(), temporary / f"{name}.safetensors")
            for name, average in state.averages.items():
                _save(average, temporary / f"ema_{name}.safetensors")
            for name, optimizer in state.optimizers.items():
                _save(_optimizer_tensors(optimizer), temporary / f"optimizer_{name}.safetensors")
            if state.tensors:
                _save(state.tensors, temporary / "tensors.safetensors")
            (temporary / "state.json").write_text(json.dumps({"step": step, **info}))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: the checkpoint can't be written ({error}); free some space") from error
    return path


def load_checkpoint(path: Path, state: Resumable) -> dict[str, Any]:
    """Load `path` into `state` in place and return what `info` was, with `step`.

    Raises:
        UserError: a file is missing or damaged, or its tensors don't fit.
    """
    try:
        info = json.loads((path / "state.json").read_text())
        for name, module in state.modules.items():
            module.load_state_dict(load_file(path / f"{name}.safetensors"))
        for name, average in state.averages.items():
            for key, value in load_file(path / f"ema_{name}.safetensors").items():
                average[key].copy_(value)
        for name, optimizer in state.optimizers.items():
            _load_optimizer(optimizer, load_file(path / f"optimizer_{name}.safetensors"))
        for key, value in load_file(path / "tensors.safetensors").items() if state.tensors else ():
            state.tensors[key].copy_(value)
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: can't be resumed ({reason}); remove this folder to go back one checkpoint") from error
    return info


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints under `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / "state.json").exists())


def prune(folder: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints."""
    for path in checkpoints(folder)[:-keep_last]:
        shutil.rmtree(path)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)


def _optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """State as `index/name` tensors; learning rates are functions of the step and need no saving."""
    state = optimizer.state_dict()["state"]
    return {f"{i}/{k}": torch.as_tensor(v) for i, entry in state.items() for k, v in entry.items()}


def _load_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split("/", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
