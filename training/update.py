"""Updates that leave out what is not finite, and count it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.task import RunConfig, Task


@dataclass
class Health:
    """What has gone wrong so far, and how well it went; part of a checkpoint.

    Attributes:
        skipped: updates left out because a loss or a gradient was not finite.
        in_a_row: steps up to now in which that happened, without one in between in which it didn't.
        returns: how often the run went back to a checkpoint; each halves the learning rates.
        best: the smallest value of the task's criterion.
    """

    skipped: int = 0
    in_a_row: int = 0
    returns: int = 0
    best: float | None = None

    def improved(self, figure: float | None) -> bool:
        """Whether `figure` is the smallest so far; remembers it then."""
        if figure is None or not math.isfinite(figure) or (self.best is not None and figure >= self.best):
            return False
        self.best = figure
        return True


class Update:
    """Backward, clip, optimizer step; one call per optimizer and step."""

    def __init__(self, accelerator: Accelerator, run: RunConfig, task: Task, optimizers: dict[str, Any]):
        self.accelerator, self.run, self.task, self.optimizers = accelerator, run, task, optimizers
        self.health = Health()
        self.grad_norms: dict[str, Tensor] = {}
        self.step, self.bad, self.last = 0, False, True
        self.spoiled: set[str] = set()  # modules of which a loss in this step was not finite

    def begin(self, step: int) -> None:
        """Start `step` (from 0)."""
        self.step, self.bad, self.spoiled = step, False, set()

    def __call__(self, name: str, loss: Tensor) -> None:
        """Add the gradient of `loss` (a scalar) for module `name` and, with the step's last batch, update it.

        Where a loss or the gradient is not finite, the update is left out and counted.
        """
        if bool(torch.isfinite(self.accelerator.gather(loss.detach())).all()):
            self.accelerator.backward(loss / self.run.accumulate)
        else:
            self.spoiled.add(name)
        if self.last:
            self._update(name)

    def _update(self, name: str) -> None:
        optimizer = self.optimizers[name]
        if name in self.spoiled:
            self._skip(optimizer)
            return
        for group in optimizer.param_groups:
            group["lr"] = self.task.optimizers[name].rate(self.step, self.run.steps) * 0.5**self.health.returns
        parameters = self.task.modules[name].parameters()
        norm = self.accelerator.clip_grad_norm_(parameters, self.run.max_grad_norm or math.inf)
        self.grad_norms[f"grad_norm/{name}"] = norm
        # In fp16 a gradient may overflow now and then: the loss scaler skips that step itself and lowers its scale.
        if self.run.precision != "fp16" and not bool(torch.isfinite(norm)):
            self._skip(optimizer)
            return
        optimizer.step()
        optimizer.zero_grad()

    def gradient(self, loss: Tensor, at: Tensor) -> Tensor:
        """Gradient of `loss` with respect to `at`, whose graph stays; computed at the loss scale that fp16 needs."""
        scaler = self.accelerator.scaler
        scale = scaler.get_scale() if scaler is not None else 1.0
        return torch.autograd.grad(scale * loss, at, retain_graph=True)[0] / scale

    def mean(self, values: Tensor) -> Tensor:
        """`values` averaged over the processes."""
        return self.accelerator.reduce(values, "mean")

    def end(self) -> bool:
        """Close the step; whether too many in a row were bad."""
        self.health.in_a_row = self.health.in_a_row + 1 if self.bad else 0
        return self.health.in_a_row >= self.run.max_bad_steps

    def _skip(self, optimizer: Any) -> None:
        optimizer.zero_grad()
        self.health.skipped += 1
        self.bad = True


def unwrap(module: nn.Module) -> nn.Module:
    """The module itself, without DDP around it."""
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module
