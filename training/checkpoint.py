"""Checkpoints: safetensors and one JSON file, written whole or not at all.

A checkpoint is a folder `step_00001000` with one safetensors file per module, per averaged copy and per optimizer, and
`state.json`. Nothing is pickled, so a checkpoint from a stranger can be read safely.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from stable_audio_lite.errors import UserError
from stable_audio_lite.files import check_utf8, replacing_folder
from training.shard import sharded_like, whole

_NAME = re.compile(r"step_(\d{8})")


@dataclass(frozen=True)
class Resumable:
    """Everything that a resumed run needs besides its configuration; optimizers go by the module that they update."""

    modules: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    averages: dict[str, dict[str, Tensor]]


def save_checkpoint(folder: Path, step: int, state: Resumable, info: dict[str, Any], main: bool = True) -> Path:
    """Write checkpoint `step` under `folder` and return its path.

    Where weights are sharded, all processes take part and the `main` one writes; what is written is the same.

    Raises:
        UserError: the folder can't be written or the disk is full.
    """
    path = folder / f"step_{step:08d}"
    with replacing_folder(path) if main else nullcontext(path) as temporary:
        try:
            for name, tensors in _files(state):
                kept = whole(tensors, keep=main)
                if main:
                    _save(kept, temporary / f"{name}.safetensors")
            if main:
                (temporary / "state.json").write_text(json.dumps({"step": step, **info}))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: the checkpoint can't be written ({error}); free some space") from error
    return path


def load_checkpoint(path: Path, state: Resumable) -> dict[str, Any]:
    """Load `path` into `state` in place and return what `info` was, with `step`.

    Raises:
        UserError: a file is missing or damaged, or, in other words, its tensors don't fit.
    """
    info = read_info(path)
    with _fitting(path, "the checkpoint is whole, but of other settings: set them back, or choose another run.output"):
        for name, module in state.modules.items():
            _load_module(module, _read(path, name))
        for name, average in state.averages.items():
            for key, value in _read(path, f"ema_{name}").items():
                average[key].copy_(sharded_like(value, average[key]))
        for name, optimizer in state.optimizers.items():
            _load_optimizer(optimizer, state.modules[name], _read(path, f"optimizer_{name}"))
    return info


def read_info(path: Path) -> dict[str, Any]:
    """Read what `info` was when checkpoint `path` was saved, with `step`.

    Raises:
        UserError: it is damaged.
    """
    try:
        info = json.loads((path / "state.json").read_text())
        return info | {"step": int(info["step"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path / "state.json", error) from error


def warm_start(run: Path, state: Resumable, modules: Collection[str]) -> None:
    """Load `modules` and the state of all optimizers from the newest checkpoint of another run, in place.

    An optimizer may have fewer parameters than in that run: a later phase freezes some.

    Raises:
        UserError: the run has no checkpoint, or its tensors don't fit.
    """
    done = checkpoints(run / "checkpoints")
    if not done:
        raise UserError(f"{run}: holds no checkpoint to continue from; give the `output` of an earlier run")
    with _fitting(done[-1], "continue a run of the same networks and optimizers"):
        for name in modules:
            _load_module(state.modules[name], _read(done[-1], name))
        for name, optimizer in state.optimizers.items():
            _load_optimizer(optimizer, state.modules[name], _read(done[-1], f"optimizer_{name}"))


@contextmanager
def _fitting(path: Path, advice: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{path}: does not fit ({_reason(error)}); {advice}") from error


def _read(path: Path, name: str) -> dict[str, Tensor]:
    file = path / f"{name}.safetensors"
    if not file.exists():
        raise UserError(
            f"{file}: missing; set back what was changed in the config, or, if the file was lost, remove {path} to "
            f"{_back(path)}"
        )
    check_utf8(file)
    try:
        return load_file(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(f"{file}: damaged ({_reason(error)}); remove {file.parent} to {_back(file.parent)}")


def _back(path: Path) -> str:
    earlier = [other for other in checkpoints(path.parent) if other < path]
    return f"go on from {earlier[-1].name}" if earlier else "start anew"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints under `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / "state.json").exists())


def prune(folder: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints."""
    for path in checkpoints(folder)[:-keep_last]:
        shutil.rmtree(path)


def tidy(folder: Path) -> None:
    """Remove the partial checkpoints that killed runs left under `folder`."""
    for path in folder.glob(".step_*"):
        shutil.rmtree(path)


def _files(state: Resumable) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Name and tensors of each file."""
    for name, module in state.modules.items():
        yield name, module.state_dict()
    for name, average in state.averages.items():
        yield f"ema_{name}", average
    for name, optimizer in state.optimizers.items():
        yield f"optimizer_{name}", _optimizer_tensors(optimizer, state.modules[name])


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path)


def _load_module(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = module.state_dict()
    module.load_state_dict({k: sharded_like(v, own.get(k)) for k, v in tensors.items()})


def _optimizer_tensors(optimizer: Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """State as `parameter/name` tensors; learning rates are functions of the step and need no saving."""
    state, names = optimizer.state_dict()["state"], _parameters(optimizer, module)
    return {f"{names[i]}/{k}": torch.as_tensor(v) for i, entry in state.items() for k, v in entry.items()}


def _load_optimizer(optimizer: Optimizer, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load the saved state of those parameters that the optimizer has."""
    own, entries = module.state_dict(), dict[str, dict[str, Tensor]]()
    for key, value in tensors.items():
        parameter, name = key.rsplit("/", 1)
        entries.setdefault(parameter, {})[name] = sharded_like(value, own.get(parameter)) if value.ndim else value
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
