"""The one training loop: data by step, updates, averages, logging, checkpoints, resuming.

Everything random in step s is drawn from (seed, s, process), and batches are functions of the step, so a run that was
killed and started again with the same command repeats what an uninterrupted run does, bit for bit on a CPU.
"""

from __future__ import annotations

import json
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from stable_audio_lite.config import save_config
from stable_audio_lite.errors import UserError
from training.checkpoint import Resumable, checkpoints, load_checkpoint, prune, save_checkpoint
from training.ema import EMA
from training.muon import Muon


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long and how to run.

    Attributes:
        output: folder for checkpoints, logs and the finished bundle.
        steps: updates in all.
        precision: "no" (float32), "bf16" or "fp16" autocast.
        compile: torch.compile the modules; needs a C++ compiler on a CPU.
        ema_decay: largest decay of the averaged weights; 0 exports the raw ones.
        accumulate: batches whose gradients are averaged into one update.
        max_grad_norm: gradients are clipped to this norm; 0 does not clip.
        max_bad_steps: an update whose loss or gradient is not finite is skipped; after this many such steps in a row
            the run returns to its newest checkpoint and goes on from there at half the learning rates.
        max_returns: after that many returns the run gives up.
        evaluate_every: steps between evaluations; 0 for none. The weights that did best are in the bundle `best`.
    """

    output: str
    steps: int
    seed: int = 0
    precision: Literal["no", "bf16", "fp16"] = "no"
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
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, or Muon where `muon_lr` is given, with linear warm-up, then exponential, cosine or no decay."""

    lr: float
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay: Literal["none", "exponential", "cosine"] = "none"
    gamma: float = 0.999996
    muon_lr: float | None = None

    def __post_init__(self) -> None:
        if self.lr <= 0 or len(self.betas) != 2:
            raise ValueError(f"lr must be positive and betas two numbers, got {self.lr}, {self.betas}")

    def build(self, module: nn.Module) -> Optimizer:
        """The optimizer over the module's trainable parameters."""
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
        if self.decay == "cosine":
            return rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        return rate


class Task(ABC):
    """What is trained: modules, optimizers, data and losses.

    Attributes:
        modules: the networks by name; the loop replaces them by their prepared (DDP) forms.
        optimizers: optimizer settings by the name of the module that each updates.
        averaged: names of the modules whose moving average is kept and exported.
        tensors: whatever else changes in place during training, by name; saved and resumed.
        batch_size: items per process and batch.
        criterion: which of the figures on held-out data says which weights are best, small is good; "" for none.
    """

    modules: dict[str, nn.Module]
    optimizers: dict[str, OptimizerConfig]
    averaged: tuple[str, ...]
    batch_size: int
    criterion: str = ""
    tensors: dict[str, Tensor] = {}

    @abstractmethod
    def batch(self, number: int, rank: int, world: int) -> Any:
        """The `number`-th batch of process `rank`, on the CPU: a pure function of its arguments and the seed."""

    @abstractmethod
    def step(self, batch: Any, step: int, update: Update) -> dict[str, Tensor]:
        """Compute losses and call `update(name, loss)` for each optimizer.

        Returns named figures to log, the same names in all processes and batches of a step.
        """

    @abstractmethod
    def export(self, folder: Path, modules: dict[str, nn.Module]) -> None:
        """Write the bundle from unwrapped modules that hold the averaged weights."""

    def evaluate(self, step: int) -> dict[str, float]:
        """Named figures on held-out data; {} for none."""
        return {}


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


def fit(run: RunConfig, task: Task, config: Any) -> Path:
    """Train `task` for `run.steps` steps, resuming from the newest checkpoint in `run.output`.

    `config` is the whole configuration (a dataclass), saved beside the checkpoints. Returns the bundle's folder.

    Raises:
        UserError: the output can't be written, its newest checkpoint doesn't fit, or losses stay not finite.
    """
    output = Path(run.output)
    accelerator = _accelerator(run, output)
    plain = {n: m.to(accelerator.device) for n, m in task.modules.items()}
    optimizers = {n: c.build(plain[n]) for n, c in task.optimizers.items()}
    averages = {n: EMA(plain[n], run.ema_decay) for n in task.averaged} if run.ema_decay else {}
    state = Resumable(plain, optimizers, {n: e.average for n, e in averages.items()}, task.tensors)
    if accelerator.is_main_process:
        save_config(config, output / "config.yaml")
    if run.compile:
        for module in plain.values():
            module.compile(dynamic=False)
    task.modules = {n: accelerator.prepare_model(m) for n, m in plain.items()}
    update = Update(accelerator, run, task, {n: accelerator.prepare_optimizer(o) for n, o in optimizers.items()})
    start = _resume(output, state, update.health)
    with _Monitor(accelerator, run, task.batch_size, start) as monitor:
        while start < run.steps:
            for step, batches in _batches(task, accelerator, start, run):
                losses = _step(task, batches, step, update)
                start = step + 1
                if update.end():
                    start = _return(output, step, state, update)
                    monitor.restart(start)
                    break
                for name, ema in averages.items():
                    ema.update(plain[name], step)
                if _due(run.evaluate_every, step, run.steps):
                    with _Averaged(plain, averages), torch.no_grad():
                        monitor.write(step, figures := task.evaluate(step))
                        if update.health.improved(figures.get(task.criterion)) and accelerator.is_main_process:
                            task.export(output / "best", plain)
                monitor.show(step, losses | update.grad_norms, update.health)
                if _due(run.checkpoint_every, step, run.steps) and not update.bad:
                    _checkpoint(run, accelerator, start, state, update.health)
    bundle = output / "bundle"
    if accelerator.is_main_process:
        with _Averaged(plain, averages):
            task.export(bundle, plain)
    accelerator.end_training()
    return bundle


def _resume(output: Path, state: Resumable, health: Health) -> int:
    """Load the newest checkpoint, if there is one; returns the step to go on with."""
    done = checkpoints(output / "checkpoints")
    if not done:
        return 0
    info = load_checkpoint(done[-1], state)
    for key, value in info["health"].items():
        setattr(health, key, value)
    return info["step"]


def _return(output: Path, step: int, state: Resumable, update: Update) -> int:
    """Go back to the newest checkpoint at half the rates; returns its step."""
    skipped, returns = update.health.skipped, update.health.returns + 1
    done = checkpoints(output / "checkpoints")
    good = str(done[-1]) if done else "none was written"
    row = f"losses or gradients were not finite in the {update.run.max_bad_steps} steps up to {step}"
    if not done or returns > update.run.max_returns:
        raise UserError(f"{row}; last good checkpoint: {good}. Lower the learning rates or max_grad_norm")
    start = _resume(output, state, update.health)
    update.health.skipped, update.health.returns, update.health.in_a_row = skipped, returns, 0
    if update.accelerator.is_main_process:
        print(f"\n{row}: back to {good}, learning rates times {0.5**returns:g}", file=sys.stderr, flush=True)
    return start


def _due(every: int, step: int, steps: int) -> bool:
    return every > 0 and ((step + 1) % every == 0 or step + 1 == steps)


def _accelerator(run: RunConfig, output: Path) -> Accelerator:
    trackers = [] if run.tracker == "none" else [run.tracker]
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: {output} can't be made ({error.strerror})") from error
    accelerator = Accelerator(mixed_precision=run.precision, log_with=trackers, project_dir=str(output))
    accelerator.init_trackers("logs")
    return accelerator


def _mix(seed: int, number: int, rank: int) -> int:
    return (seed * 1_000_003 + number) * 4_099 + rank


def _batches(task: Task, accelerator: Accelerator, start: int, run: RunConfig) -> Iterator[tuple[int, Iterator[Any]]]:
    """(step, its batches) pairs; the next batch is read while one is used."""
    rank, world = accelerator.process_index, accelerator.num_processes
    last = run.steps * run.accumulate - 1
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(task.batch, start * run.accumulate, rank, world)

        def take(number: int) -> Any:
            nonlocal ahead
            batch = ahead.result()
            ahead = pool.submit(task.batch, min(number + 1, last), rank, world)
            return batch

        for step in range(start, run.steps):
            yield step, (take(number) for number in range(step * run.accumulate, (step + 1) * run.accumulate))


def _step(task: Task, batches: Iterator[Any], step: int, update: Update) -> dict[str, Tensor]:
    """One update of everything; returns the losses, averaged over the batches."""
    accelerator, count = update.accelerator, update.run.accumulate
    update.begin(step)
    rows = []
    for index, batch in enumerate(batches):
        torch.manual_seed(_mix(update.run.seed, step * count + index, accelerator.process_index))
        update.last = index + 1 == count
        with ExitStack() as stack:
            if not update.last:  # processes share gradients once, with the last batch
                for module in task.modules.values():
                    stack.enter_context(accelerator.no_sync(module))
            stack.enter_context(accelerator.autocast())
            rows.append(task.step(_to(batch, accelerator.device), step, update))
    return {k: torch.stack([row[k].detach().float() for row in rows]).nanmean() for k in rows[0]}


class _Monitor:
    """Progress bar, trackers and `losses.jsonl`."""

    def __init__(self, accelerator: Accelerator, run: RunConfig, batch_size: int, start: int):
        from tqdm import tqdm

        self.accelerator, self.run = accelerator, run
        self.items_per_step = batch_size * accelerator.num_processes * run.accumulate
        main = accelerator.is_main_process
        self.bar = tqdm(total=run.steps, initial=start, unit="step", disable=not main, mininterval=1.0, smoothing=0.05)
        self.last = (time.monotonic(), start)

    def __enter__(self) -> _Monitor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.close()

    def restart(self, start: int) -> None:
        """Go on counting from `start`."""
        self.bar.n, self.last = start, (time.monotonic(), start)
        self.bar.refresh()

    def show(self, step: int, losses: dict[str, Tensor], health: Health) -> None:
        """Advance the bar; every `log_every` steps also average the losses over processes and write them."""
        self.bar.update()
        if step % self.run.log_every and step + 1 != self.run.steps:
            return
        # NaN: a figure of which a process had no items.
        gathered = {k: self.accelerator.gather(v.detach().float().reshape(1)) for k, v in losses.items()}
        figures = {k: float(v.nanmean()) for k, v in gathered.items() if not bool(v.isnan().all())}
        now, (then, last) = time.monotonic(), self.last
        figures |= {"updates/skipped": health.skipped, "updates/returns": health.returns}
        figures["items_per_second"] = (step + 1 - last) * self.items_per_step / max(now - then, 1e-9)
        self.last = (now, step + 1)
        name, value = next(iter(figures.items()))
        self.bar.set_postfix_str(f"{name} {value:.4f}, {figures['items_per_second']:.1f} items/s")
        self.write(step, figures)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Send figures to the trackers and append them to `losses.jsonl`."""
        if not figures:
            return
        self.accelerator.log(figures, step=step)
        if self.accelerator.is_main_process:
            with (Path(self.run.output) / "losses.jsonl").open("a") as file:
                file.write(json.dumps({"step": step} | {k: float(f"{v:.8g}") for k, v in figures.items()}) + "\n")


class _Averaged:
    """Within this context the modules hold their averaged weights."""

    def __init__(self, modules: dict[str, nn.Module], averages: dict[str, EMA]):
        self.modules, self.averages = modules, averages

    def __enter__(self) -> None:
        self.raw = {n: {k: v.clone() for k, v in self.modules[n].state_dict().items()} for n in self.averages}
        for name, ema in self.averages.items():
            self.modules[name].load_state_dict(ema.average)

    def __exit__(self, *exc: object) -> None:
        for name, raw in self.raw.items():
            self.modules[name].load_state_dict(raw)


def _checkpoint(run: RunConfig, accelerator: Accelerator, step: int, state: Resumable, health: Health) -> None:
    folder = Path(run.output) / "checkpoints"
    if accelerator.is_main_process:
        save_checkpoint(folder, step, state, {"seed": run.seed, "health": asdict(health)})
        prune(folder, run.keep_last)
    accelerator.wait_for_everyone()


def unwrap(module: nn.Module) -> nn.Module:
    """The module itself, without DDP around it."""
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {k: _to(v, device) for k, v in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(_to(v, device) for v in batch)
    return batch
