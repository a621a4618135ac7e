"""Checkpoints: safetensors and one JSON file, written whole or not at all.

A checkpoint is a folder `step_00001000` with one safetensors file per module, per averaged copy and per optimizer, and
`state.json`. Nothing is pickled, so a checkpoint from a stranger can be read safely.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
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
    """All that a resumed run needs besides its configuration; each optimizer has the name of the module it updates."""

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
                _save(_optimizer_tensors(optimizer, state.modules[name]), temporary / f"optimizer_{name}.safetensors")
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
    with _refusing(path, "remove this folder to go back one checkpoint"):
        info = json.loads((path / "state.json").read_text())
        for name, module in state.modules.items():
            module.load_state_dict(load_file(path / f"{name}.safetensors"))
        for name, average in state.averages.items():
            for key, value in load_file(path / f"ema_{name}.safetensors").items():
                average[key].copy_(value)
        for name, optimizer in state.optimizers.items():
            _load_optimizer(optimizer, state.modules[name], load_file(path / f"optimizer_{name}.safetensors"))
        for key, value in load_file(path / "tensors.safetensors").items() if state.tensors else ():
            state.tensors[key].copy_(value)
    return info


def take_over(run: Path, state: Resumable, modules: Collection[str]) -> None:
    """Load `modules` and all optimizers' state from the newest checkpoint of another run, in place.

    An optimizer may have fewer parameters than it had there: a later phase freezes some.

    Raises:
        UserError: the run has no checkpoint, or its tensors don't fit.
    """
    done = checkpoints(run / "checkpoints")
    if not done:
        raise UserError(f"{run}: holds no checkpoint to continue from; give the `output` of an earlier run")
    with _refusing(done[-1], "continue a run of the same networks and optimizers"):
        for name in modules:
            state.modules[name].load_state_dict(load_file(done[-1] / f"{name}.safetensors"))
        for name, optimizer in state.optimizers.items():
            _load_optimizer(optimizer, state.modules[name], load_file(done[-1] / f"optimizer_{name}.safetensors"))


@contextmanager
def _refusing(path: Path, advice: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: can't be loaded ({reason}); {advice}") from error


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints under `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / "state.json").exists())


def prune(folder: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints."""
    for path in checkpoints(folder)[:-keep_last]:
        shutil.rmtree(path)


def tidy(folder: Path) -> None:
    """Remove what killed runs began to write under `folder`."""
    for path in folder.glob(".step_*"):
        shutil.rmtree(path)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)


def _optimizer_tensors(optimizer: Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """State as `parameter/name` tensors; learning rates are functions of the step and need no saving."""
    state, names = optimizer.state_dict()["state"], _parameters(optimizer, module)
    return {f"{names[i]}/{k}": torch.as_tensor(v) for i, entry in state.items() for k, v in entry.items()}


def _load_optimizer(optimizer: Optimizer, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Take what is there of the parameters that the optimizer has."""
    entries: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        parameter, name = key.rsplit("/", 1)
        entries.setdefault(parameter, {})[name] = value
    names = _parameters(optimizer, module)
    state = {i: entries[name] for i, name in enumerate(names) if name in entries}
    first = 0
    for group in optimizer.param_groups:
        wanted = "momentum" if group.get("muon") else "exp_avg"
        for i in range(first, first + len(group["params"])):
            if i in state and wanted not in state[i]:
                raise ValueError(f"{names[i]}: no '{wanted}', another optimizer's state")
        first += len(group["params"])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameters(optimizer: Optimizer, module: nn.Module) -> list[str]:
    """Names of the optimizer's parameters in its own order."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
