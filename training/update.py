"""Optimizer updates that skip losses and gradients that are not finite, and count them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from training.shard import full
from training.task import RunConfig, TrainingTask


@dataclass
class Health:
    """Count of what has gone wrong so far, and the best result; part of a checkpoint.

    Attributes:
        skipped: updates left out because a loss or a gradient was not finite.
        in_a_row: latest steps in a row in which that happened.
        returns: number of times that the run went back to a checkpoint; each halves the learning rates.
        best: the smallest value of the task's criterion.
    """

    skipped: int = 0
    in_a_row: int = 0
    returns: int = 0
    best: float | None = None

    def improved(self, figure: float | None) -> bool:
        """Record `figure` if it is the smallest so far; returns whether it is."""
        if figure is None or not math.isfinite(figure) or (self.best is not None and figure >= self.best):
            return False
        self.best = figure
        return True


class Update:
    """Backward passes as losses arrive, then clipping and the optimizers' steps at the step's end."""

    def __init__(self, accelerator: Accelerator, run: RunConfig, task: TrainingTask, optimizers: dict[str, Optimizer]):
        self.accelerator, self.run, self.task, self.optimizers = accelerator, run, task, optimizers
        self.scaler = accelerator.scaler  # of the loss, in fp16 alone
        self.health = Health()
        self.grad_norms: dict[str, Tensor] = {}
        self.step, self.bad, self.overflow = 0, False, False
        self.finite: dict[str, bool] = {}  # by module: True while all its losses in this step are

    def begin(self, step: int) -> None:
        """Start `step` (from 0)."""
        self.step, self.bad, self.overflow, self.finite = step, False, False, {}

    def __call__(self, name: str, loss: Tensor) -> None:
        """Add the gradient of `loss` (a scalar) for module `name`, which `end` will update."""
        finite = bool(torch.isfinite(self.accelerator.gather(loss.detach())).all())
        self.finite[name] = self.finite.get(name, True) and finite
        loss = loss / self.run.accumulate
        if finite:
            self.accelerator.backward(loss)

    def gradient(self, loss: Tensor, at: Tensor) -> Tensor:
        """Gradient of `loss` with respect to `at`, at the loss scale that fp16 needs; the graph is retained."""
        if self.scaler is None:
            return torch.autograd.grad(loss, at, retain_graph=True)[0]
        scale = self.scaler.get_scale()
        gradient = torch.autograd.grad(scale * loss, at, retain_graph=True)[0] / scale
        fits = torch.isfinite(gradient).all() | ~torch.isfinite(loss.detach()).all()
        self.overflow = self.overflow or not bool(self.accelerator.gather(fits).all())
        return gradient

    def mean(self, values: Tensor) -> Tensor:
        """Average `values` over the processes."""
        return self.accelerator.reduce(values, "mean")

    def agreed(self, decision: bool) -> bool:
        """Share the main process's `decision`, for what all processes have to do together."""
        return bool(self.accelerator.gather(torch.tensor([decision], device=self.accelerator.device))[0])

    def end(self) -> bool:
        """Update each module that got a loss; returns whether too many steps in a row were bad, at a run's end two.

        Where a loss or the gradient is not finite, the update is skipped and counted. In fp16 a gradient may overflow
        now and then: that update is skipped as well and the loss scale lowered, which doesn't count as bad.
        """
        for name, finite in self.finite.items():
            optimizer = self.optimizers[name]
            if not finite or not self._clip(name, optimizer):
                if not self.overflow:
                    self.health.skipped += 1
                    self.bad = True
            else:
                for group in optimizer.param_groups:
                    group["lr"] = self.task.rate(name, self.step, self.run.steps) * 0.5**self.health.returns
                with self.accelerator.autocast():  # of Muon's matrix products
                    self.scaler.step(optimizer) if self.scaler is not None else optimizer.step()
            optimizer.zero_grad()
        if self.scaler is not None and self.overflow:
            self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor())
        elif self.scaler is not None and any(self.finite.values()):
            self.scaler.update()
        self.health.in_a_row = self.health.in_a_row + 1 if self.bad else 0
        last = self.step + 1 >= self.run.steps
        return self.health.in_a_row >= (min(2, self.run.max_bad_steps) if last else self.run.max_bad_steps)

    def _clip(self, name: str, optimizer: Optimizer) -> bool:
        """Clip the gradient to the largest norm; returns whether it can be used."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)  # which also notes non-finite gradients, for its own step
        parameters = self.task.modules[name].parameters()
        norm = full(nn.utils.clip_grad_norm_(parameters, self.run.max_grad_norm or math.inf))
        self.grad_norms[f"grad_norm/{name}"] = norm
        return self.scaler is not None or bool(torch.isfinite(norm))


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module itself, without DDP around it."""
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module
