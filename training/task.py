"""The interface from a trainer to the loop: run and optimizer settings, and a task with networks, data and losses."""

from __future__ import annotations

import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.optim import Optimizer

from stable_audio_lite.clap.tokenizer import unread_parts
from stable_audio_lite.devices import choose_device, choose_dtype
from training.muon import Muon
from training.shard import Parts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from training.checkpoint import Resumable
    from training.update import Update

_PRECISIONS = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of a run.

    Attributes:
        output: folder for checkpoints, logs and the finished bundle.
        steps: updates in all.
        precision: "no" (float32), "bf16" or "fp16" autocast, or "auto", the fastest that the device multiplies in
            hardware.
        compile: compile the modules with torch.compile, which needs a C++ compiler on a CPU.
        ema_decay: largest decay of the averaged weights; 0 exports the raw ones.
        accumulate: batches whose gradients are averaged into one update.
        max_grad_norm: gradients are clipped to this norm; 0 does not clip.
        max_bad_steps: an update whose loss or gradient is not finite is skipped; after this many such steps in a row
            the run returns to its newest checkpoint and goes on from there at half the learning rates; so it does where
            it would end with two of them.
        max_returns: number of returns after which the run gives up.
        evaluate_every: steps between evaluations; 0 for none. The best weights so far are in the bundle `best`.
    """

    output: str
    steps: int
    seed: int = 0
    precision: Literal["auto", "no", "bf16", "fp16"] = "no"
    compile: bool = False
    ema_decay: float = 0.9999
    accumulate: int = 1
    max_grad_norm: float = 1.0
    max_bad_steps: int = 5
    max_returns: int = 5
    log_every: int = 10
    checkpoint_every: int = 500
    keep_last: int = 2
    evaluate_every: int = 0
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "log_every", "checkpoint_every", "keep_last", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seed", "max_grad_norm", "max_returns", "evaluate_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")

    def precision_on(self, device: torch.device) -> str:
        """Name the `precision` of autocast on `device`, "auto" decided."""
        return _PRECISIONS[choose_dtype(None, device)] if self.precision == "auto" else self.precision


def device_to_train_on() -> torch.device:
    """The device that accelerate will choose, without starting its state, which what comes later wants to set up."""
    return torch.device("cpu") if parse_flag_from_env("ACCELERATE_USE_CPU") else choose_device("auto")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, or Muon where `muon_lr` is given, with linear warm-up, then a decay or none.

    Exponential: `gamma`^step. Inverse: (1 + step / 10^6)^-1/2. Cosine: to a hundredth.
    """

    lr: float
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay: Literal["none", "exponential", "inverse", "cosine"] = "none"
    gamma: float = 0.999996
    muon_lr: float | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "muon_lr", "gamma"):  # no weight survives more
            if (value := getattr(self, name)) is not None and not 0 < value <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {value:g}")
        if not 0 <= self.weight_decay <= 1:
            raise ValueError(f"weight_decay must lie in 0..1, got {self.weight_decay:g}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {self.warmup_steps}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers from 0 to below 1, got {self.betas}")

    def build(self, module: nn.Module) -> Optimizer:
        """Build the optimizer of the module's trainable parameters."""
        betas = (self.betas[0], self.betas[1])
        if self.muon_lr is not None:
            return Muon(module, lr=self.lr, muon_lr=self.muon_lr, betas=betas, weight_decay=self.weight_decay)
        parameters = [p for p in module.parameters() if p.requires_grad]
        return torch.optim.AdamW(parameters, lr=self.lr, betas=betas, weight_decay=self.weight_decay)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of update `step` (from 0) of `steps`."""
        rate = self.lr * min(1.0, (step + 1) / max(self.warmup_steps, 1))
        if self.decay == "exponential":
            return rate * self.gamma**step
        if self.decay == "inverse":
            return rate * (1 + step / 1e6) ** -0.5
        if self.decay == "cosine":
            return rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        return rate


@dataclass(frozen=True)
class Demo:
    """A sound to listen to during a run: (C, T) `audio`, full scale 1, and its `name`."""

    name: str
    audio: Tensor
    sample_rate: int


class TrainingTask(ABC):
    """A training task: modules, optimizers, data and losses.

    Attributes:
        modules: the networks by name; the loop replaces them by their prepared (DDP) forms.
        optimizers: optimizer settings by the name of the module that each updates.
        averaged: names of the modules whose moving average is kept and exported.
        parts: parts gathered one at a time where weights are sharded, {} if they can't be: see training.shard.
        batch_size: items per process and batch.
        items: number of items in an epoch.
        frozen: networks that are used but not trained, by name.
        demonstrate_every: steps between demonstrations; 0 for none.
        notes: remarks on the settings, for the run's first lines.
        criterion: name of the held-out metric that selects the best weights, the smaller the better; "" for none.
    """

    modules: dict[str, nn.Module]
    optimizers: dict[str, OptimizerConfig]
    averaged: tuple[str, ...]
    batch_size: int
    items: int
    frozen: dict[str, nn.Module] = {}
    demonstrate_every: int = 0
    notes: tuple[str, ...] = ()
    criterion: str = ""
    parts: Parts = {}

    def begin(self, state: Resumable) -> None:  # noqa: B027
        """Load into `state` what a new run takes over from another; called before its first step."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Describe what the weights depend on, by the keys of the configuration, as nested mappings of plain values."""

    def keep(self) -> dict[str, Any]:
        """Plain values that the run keeps from its first step on, whatever they would be now."""
        return {}

    def take(self, kept: dict[str, Any]) -> None:  # noqa: B027
        """Take over what the run kept; called once its weights are loaded."""

    @abstractmethod
    def batch(self, number: int, rank: int, world: int) -> Any:
        """The `number`-th batch of process `rank`, on the CPU: a pure function of its arguments and the seed."""

    @abstractmethod
    def step(self, batch: Any, step: int, update: Update) -> dict[str, Tensor]:
        """Compute losses and call `update(name, loss)` for each optimizer.

        Returns metrics to log, of the same names in all processes and batches of a step.
        """

    def rate(self, name: str, step: int, steps: int) -> float:
        """Learning rate of module `name` in update `step` (from 0) of `steps`."""
        return self.optimizers[name].rate(step, steps)

    @abstractmethod
    def export(self, folder: Path, modules: dict[str, nn.Module]) -> None:
        """Write the bundle from unwrapped modules that hold the averaged weights."""

    def evaluate(self, step: int) -> dict[str, float]:
        """Compute metrics by name on held-out data; {} for none."""
        return {}

    def demonstrate(self, modules: dict[str, nn.Module]) -> list[Demo]:
        """Make demos with unwrapped modules that hold the averaged weights; called on one process only."""
        return []


def say_unread(tokenizer: Tokenizer, captions: Sequence[str], max_tokens: int) -> None:
    """Print in the first process how many captions are longer than what the text encoder reads, and one's lost end."""
    ends = [end for end in unread_parts(tokenizer, captions, max_tokens) if end]
    if ends and os.environ.get("RANK", "0") == "0":
        what = f"{len(ends)} of {len(captions)} captions are longer than the {max_tokens} tokens that are read"
        print(f"{what}; of the first this is lost: {ends[0][:200]}", file=sys.stderr, flush=True)
