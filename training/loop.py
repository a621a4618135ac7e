"""The one training loop: data by step, updates, averages, logging, checkpoints, resuming.

Everything random in step s is drawn from (seed, s, process), and batches are functions of the step, so a run that was
killed and started again with the same command repeats what an uninterrupted run does, bit for bit on a CPU.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from torch.optim import Optimizer

from stable_audio_lite.config import read_yaml, save_config, to_dict
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import locked
from training.checkpoint import Resumable, checkpoints, load_checkpoint, prune, read_info, save_checkpoint, tidy
from training.ema import EMA
from training.fingerprint import changed_settings, check_fingerprint, fingerprint
from training.monitor import Monitor
from training.shard import shard, sharding
from training.signals import Signals, Stopped
from training.task import RunConfig, TrainingTask, device_to_train_on
from training.update import Health, Update


def fit(run: RunConfig, task: TrainingTask, config: Any) -> Path:
    """Train `task` for `run.steps` steps, resuming from the newest checkpoint in `run.output`.

    `config` is the whole configuration (a dataclass), saved beside the checkpoints. Returns the bundle's folder.
    SIGTERM and Ctrl-C end the run after the step that they come in, with a checkpoint.

    Raises:
        UserError: the output can't be written or another run is in it, its newest checkpoint is damaged or was trained
            with something else, or losses stay not finite.
        Stopped: by a signal.
    """
    output = Path(run.output)
    _check_output(output, config)
    torch.set_flush_denormal(True)  # products of averages and momenta that fade away take many times as long
    sharded = sharding(task.parts)
    accelerator = _accelerator(run, output, sharded)
    with ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(locked(output))
        signals = stack.enter_context(Signals(accelerator))
        return _fit(run, task, config, accelerator, sharded and accelerator.num_processes > 1, signals)


def _check_output(output: Path, config: Any) -> None:
    """Refuse a folder whose config.yaml isn't a run's: a bundle's, or the very file that the settings came from."""
    file = output / "config.yaml"
    if not file.exists() or checkpoints(output / "checkpoints"):
        return
    with suppress(UserError):
        if read_yaml(file) == to_dict(config):
            return
    raise UserError(f"output: {file} is no run's, for there are no checkpoints; choose another folder")


def _fit(
    run: RunConfig, task: TrainingTask, config: Any, accelerator: Accelerator, sharded: bool, signals: Signals
) -> Path:
    output = Path(run.output)
    own, done = fingerprint(run, task), checkpoints(output / "checkpoints")
    if done:
        check_fingerprint(done[-1], read_info(done[-1]).get("fingerprint", {}), own)
    plain = {n: m.to(accelerator.device) for n, m in task.modules.items()}
    gather = shard(plain, task.parts if sharded else {}, accelerator)
    optimizers: dict[str, Optimizer] = {n: c.build(plain[n]) for n, c in task.optimizers.items()}
    averages = {n: EMA(plain[n], run.ema_decay) for n in task.averaged} if run.ema_decay else {}
    state = Resumable(plain, optimizers, {n: e.average for n, e in averages.items()})
    if run.compile:
        for module in plain.values():
            module.compile(dynamic=False)
    # Sharded weights need no DDP around them.
    task.modules = {n: accelerator.prepare_model(m, evaluation_mode=sharded) for n, m in plain.items()}
    update = Update(accelerator, run, task, optimizers)
    start = _resume(done[-1], state, update) if done else 0
    if not done:
        task.begin(state)
    about = {"fingerprint": own, "kept": task.keep()}
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _announce(accelerator, run, (*task.notes, *changed_settings(output, config)), start)
        tidy(output / "checkpoints")
        save_config(config, output / "config.yaml")
    try:
        accelerator.init_trackers("logs")
    except Exception as error:  # a tracker's own, of any kind
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"tracker: {run.tracker} can't start, log in to it or choose none ({reason})") from error
    if not done:
        _checkpoint(run, 0, state, update, about)  # so that there is one to return to from the first step on
    with Monitor(accelerator, run, task.batch_size, start) as monitor:
        while start < run.steps:
            for step, batches in _batches(task, accelerator, start, run):
                losses = one_step(task, batches, step, update)
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
                        best = update.agreed(update.health.improved(figures.get(task.criterion)))
                        if best and (modules := gather()):
                            task.export(output / "best", modules)
                if _due(task.demonstrate_every, step, run.steps):
                    with _Averaged(plain, averages), torch.no_grad():
                        if modules := gather():
                            monitor.play(step, task.demonstrate(modules))
                monitor.show(step, losses | update.grad_norms, update.health)
                stopping = signals.stopping() and start < run.steps
                if (stopping or _due(run.checkpoint_every, step, run.steps)) and not update.bad:
                    _checkpoint(run, start, state, update, about)
                if stopping:
                    accelerator.end_training()
                    newest = checkpoints(output / "checkpoints")[-1]
                    words = f"stopped after step {start} of {run.steps}; the same command goes on from {newest}"
                    raise Stopped(signals.number, words if accelerator.is_main_process else "")
    bundle = output / "bundle"
    with _Averaged(plain, averages):
        if modules := gather():
            _check_finite(modules, task, output)
            task.export(bundle, modules)
    accelerator.end_training()
    return bundle


def _announce(accelerator: Accelerator, run: RunConfig, notes: Iterable[str], start: int) -> None:
    """Say what the run is about to do, with `notes` on its settings."""
    count, number_type = accelerator.num_processes, accelerator.mixed_precision
    number_type = "float32" if number_type == "no" else number_type
    words = f"{count} process{'es' if count > 1 else ''} on {accelerator.device.type}, {number_type}, "
    words += f"{run.output}: from step {start} to {run.steps}"
    print("; ".join((words, *notes)), file=sys.stderr, flush=True)


def _resume(checkpoint: Path, state: Resumable, update: Update) -> int:
    """Load a checkpoint; returns the step to continue with."""
    info = load_checkpoint(checkpoint, state)
    update.task.take(info.get("kept", {}))
    update.health = Health(**info["health"])
    if update.scaler is not None and info.get("scaler"):
        update.scaler.load_state_dict(info["scaler"])
    return info["step"]


def _return(output: Path, step: int, state: Resumable, update: Update) -> int:
    """Go back to the newest checkpoint, at half the learning rates; returns its step."""
    health = replace(update.health, in_a_row=0, returns=update.health.returns + 1)
    good = checkpoints(output / "checkpoints")[-1]
    row = f"losses or gradients were not finite in the {update.health.in_a_row} steps up to {step}"
    if health.returns > update.run.max_returns:
        raise UserError(f"{row}; last good checkpoint: {good}. Lower {_rates(update.task)} or run.max_grad_norm")
    start = _resume(good, state, update)
    update.health = health
    if update.accelerator.is_main_process:
        print(f"\n{row}: back to {good}, learning rates times {0.5**health.returns:g}", file=sys.stderr, flush=True)
    return start


def _rates(task: TrainingTask) -> str:
    """The learning rates by their keys, as in "lr (0.001) of vae"."""
    rates = [(key, name, getattr(c, key)) for name, c in task.optimizers.items() for key in ("lr", "muon_lr")]
    return ", ".join(f"{key} ({rate:g}) of {name}" for key, name, rate in rates if rate is not None)


def _check_finite(modules: dict[str, nn.Module], task: TrainingTask, output: Path) -> None:
    """Refuse to export weights that the last update broke."""
    for name, module in modules.items():
        if bad := next((key for key, value in module.state_dict().items() if not bool(value.isfinite().all())), None):
            raise UserError(f"{output}: {name} ended with weights that are not finite ({bad}); lower {_rates(task)}")


def _due(every: int, step: int, steps: int) -> bool:
    return every > 0 and ((step + 1) % every == 0 or step + 1 == steps)


def _accelerator(run: RunConfig, output: Path, sharded: bool) -> Accelerator:
    trackers = [] if run.tracker == "none" else [run.tracker]
    if trackers and importlib.util.find_spec(run.tracker) is None:
        raise UserError(f"tracker: {run.tracker} is not installed; pip install {run.tracker}, or choose none")
    # Autocast would keep a copy of every weight that was whole for a while.
    handlers = [AutocastKwargs(cache_enabled=False)] if sharded else []
    precision = run.precision_on(device_to_train_on())
    accelerator = Accelerator(
        mixed_precision=precision, log_with=trackers, project_dir=str(output), kwargs_handlers=handlers
    )
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("precision: fp16 needs a GPU, whose loss scaling it relies on; choose bf16 or no")
    return accelerator


def _mix(seed: int, number: int, rank: int) -> int:
    return (seed * 1_000_003 + number) * 4_099 + rank


def _batches(
    task: TrainingTask, accelerator: Accelerator, start: int, run: RunConfig
) -> Iterator[tuple[int, Iterator[Any]]]:
    """Yield (step, its batches) pairs; the next batch is read while one is used."""
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


def one_step(task: TrainingTask, batches: Iterable[Any], step: int, update: Update) -> dict[str, Tensor]:
    """Accumulate the gradients of one update, which `update.end` applies; returns the losses averaged over batches."""
    accelerator, count = update.accelerator, update.run.accumulate
    update.begin(step)
    rows: list[dict[str, Tensor]] = []
    for index, batch in enumerate(batches):
        torch.manual_seed(_mix(update.run.seed, step * count + index, accelerator.process_index))
        with ExitStack() as stack:
            if index + 1 < count:  # processes share gradients once, with the last batch
                for module in task.modules.values():
                    if isinstance(module, nn.parallel.DistributedDataParallel):
                        stack.enter_context(module.no_sync())
            stack.enter_context(accelerator.autocast())
            losses = task.step(_to(batch, accelerator.device), step, update)
        rows.append({k: v.detach().float() for k, v in losses.items()})  # detached, so that their graphs are freed
    return {k: torch.stack([row[k] for row in rows]).nanmean() for k in rows[0]}


class _Averaged:
    """Context in which the modules hold their averaged weights."""

    def __init__(self, modules: dict[str, nn.Module], averages: dict[str, EMA]):
        self.modules, self.averages = modules, averages

    def __enter__(self) -> None:
        self.raw = {n: {k: v.clone() for k, v in self.modules[n].state_dict().items()} for n in self.averages}
        for name, ema in self.averages.items():
            self.modules[name].load_state_dict(ema.average)

    def __exit__(self, *exc: object) -> None:
        for name, raw in self.raw.items():
            self.modules[name].load_state_dict(raw)


def _checkpoint(run: RunConfig, step: int, state: Resumable, update: Update, about: dict[str, Any]) -> None:
    folder = Path(run.output) / "checkpoints"
    scaler = update.scaler.state_dict() if update.scaler is not None else None
    info = {"seed": run.seed, "health": asdict(update.health), "scaler": scaler} | about
    save_checkpoint(folder, step, state, info, main=update.accelerator.is_main_process)
    if update.accelerator.is_main_process:
        prune(folder, run.keep_last)
    update.accelerator.wait_for_everyone()


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {k: _to(v, device) for k, v in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(_to(v, device) for v in batch)
    return batch
