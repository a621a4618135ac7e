"""The cost of a run, measured before it begins: stable-audio-lite plan configs/stable_audio/train_diffusion.yaml.

It builds what the trainer builds, does a few of its steps on this machine, and writes nothing. Activations are the
tensors that autograd keeps for the backward pass; two batch sizes tell what a batch costs and what each item adds.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from stable_audio_lite.bundle import read_config
from stable_audio_lite.config import load_config, read_yaml
from stable_audio_lite.errors import UserError
from training.checkpoint import checkpoints
from training.distill import DistillConfig, DistillTask
from training.loop import one_step
from training.profile import Profile, profile
from training.task import RunConfig, TrainingTask, device_to_train_on
from training.train_clap import ClapTask, TrainClapConfig
from training.train_diffusion import DiffusionTask, TrainDiffusionConfig
from training.train_vae import TrainVAEConfig, VAETask
from training.update import Update

TRAINERS: dict[str, tuple[type, type[TrainingTask]]] = {
    "train_clap": (TrainClapConfig, ClapTask),
    "train_vae": (TrainVAEConfig, VAETask),
    "train_diffusion": (TrainDiffusionConfig, DiffusionTask),
    "distill": (DistillConfig, DistillTask),
}
_LOOKED_AT = 6  # steps, of whose batches the fullest counts
_SPARE = 0.05  # of a GPU's memory, for what PyTorch doesn't count


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Cost of a run; sizes are in bytes.

    Attributes:
        trainer: the one that the config is for.
        trained, frozen: parameters by network.
        weights, gradients, optimizers, averages: memory of each process throughout.
        frozen_weights: the part of `weights` that is not trained.
        activations: further memory for a batch of `batch_size`, of which `per_item` is for each of its items.
        free: memory available to activations.
        checkpoint, bundle: size of each on disk.
        disk_free: space left on the disk of the run's output.
        items: number of items in an epoch.
        processes, batch_size, accumulate: their product is the number of items in a step.
        seconds: duration of a step.
        flops: floating-point operations of a step as torch counts them: matrix products, convolutions and attention.
        steps, done: updates in all and up to the newest checkpoint.
        keep_last: number of checkpoints kept.
        profile: time of a step by operation, if asked for.
    """

    trainer: str
    trained: dict[str, int]
    frozen: dict[str, int]
    weights: int
    frozen_weights: int
    gradients: int
    optimizers: int
    averages: int
    activations: int
    per_item: float
    free: int
    checkpoint: int
    bundle: int
    disk_free: int
    items: int
    processes: int
    batch_size: int
    accumulate: int
    seconds: float
    flops: int
    steps: int
    done: int
    keep_last: int
    profile: Profile | None = None

    @property
    def largest_batch(self) -> int:
        """Largest number of items in a batch whose activations fit into the free memory."""
        constant = self.activations - self.batch_size * self.per_item
        return max(0, math.floor((self.free - constant) / max(self.per_item, 1.0)))

    @property
    def sharded(self) -> int:
        """Memory of each process with FSDP, except for the parts of the network gathered while they compute."""
        gradients = self.gradients // (2 if self.processes > 1 else 1)  # no DDP, no buckets
        shared = self.weights - self.frozen_weights + gradients + self.optimizers + self.averages
        return self.frozen_weights + shared // self.processes + self.activations

    @property
    def step_items(self) -> int:
        """Number of items in an update, over all processes."""
        return self.processes * self.batch_size * self.accumulate

    @property
    def disk(self) -> int:
        """Most disk space that the run takes: one more checkpoint than it keeps, and the last and the best bundle."""
        return (self.keep_last + 1) * self.checkpoint + 2 * self.bundle

    @property
    def hours(self) -> float:
        """Hours to the end of the run."""
        return (self.steps - self.done) * self.seconds / 3600

    def as_text(self) -> str:
        """A line for each question."""
        parts = [f"{n} {c:,} trained" for n, c in self.trained.items()]
        parts += [f"{n} {c:,} frozen" for n, c in self.frozen.items()]
        fixed = self.weights + self.gradients + self.optimizers + self.averages
        fsdp = ""
        if self.processes > 1 and self.trainer == "train_diffusion":
            fsdp = f"\nwith FSDP      {_size(self.sharded)} a process, besides what is whole to compute"
        step = f"{self.processes} x {self.batch_size} x {self.accumulate}"
        return "\n".join(
            (
                f"trainer        training.{self.trainer}",
                f"parameters     {', '.join(parts)}",
                f"memory         {_size(fixed + self.activations)} a process: weights {_size(self.weights)}, "
                f"gradients {_size(self.gradients)}, optimizer {_size(self.optimizers)}, "
                f"averages {_size(self.averages)}, activations {_size(self.activations)} "
                f"({_size(self.per_item)} an item)" + fsdp,
                f"largest batch  {self.largest_batch} items a process, in {_size(self.free)} left for activations",
                f"disk           {_size(self.disk)} of {_size(self.disk_free)} free: "
                f"{self.keep_last + 1} checkpoints of {_size(self.checkpoint)}, 2 bundles of {_size(self.bundle)}"
                + (" - NOT ENOUGH" if self.disk > self.disk_free else ""),
                f"epoch          {self.items / self.step_items:,.1f} steps ({self.items:,} items, {step} a step: "
                "processes x batch x accumulated)",
                f"speed          {self.seconds:.3f} s a step, {self.batch_size * self.accumulate / self.seconds:.1f} "
                f"items/s and {self.flops / self.seconds / 1e9:.0f} GFLOP/s a process, measured here",
                f"to go          {self.steps - self.done:,} of {self.steps:,} steps: {self.hours:.2f} h",
                *([self.profile.as_text()] if self.profile else []),
            )
        )


def plan(path: str | Path, *, steps: int = 3, processes: int = 1, profiled: bool = False) -> RunPlan:
    """Measure the run that a trainer's config describes.

    The file is that of any trainer. `steps` steps are timed after two others, and one more is `profiled`. Each of the
    run's `processes` is assumed to be as fast as one is here.

    Raises:
        UserError: as the trainer itself: a key is wrong, or data or a bundle is missing.
    """
    trainer, config_class, _ = _trainer(path)
    return measure(trainer, load_config(path, config_class), steps=steps, processes=processes, profiled=profiled)


def measure(trainer: str, config: Any, *, steps: int = 3, processes: int = 1, profiled: bool = False) -> RunPlan:
    """Measure the run with the `config` of a trainer in `TRAINERS`, as `plan` does."""
    task_class, run = TRAINERS[trainer][1], config.run
    with tempfile.TemporaryDirectory() as nowhere:
        task = task_class(dataclasses.replace(config, run=dataclasses.replace(run, output=nowhere)))  # type: ignore[call-arg]
        return _measure(trainer, task, run, steps, processes, profiled)


def _trainer(path: str | Path) -> tuple[str, type[Any], type[TrainingTask]]:
    """Find the trainer that knows most of the file's keys, so that reading it strictly names what is wrong.

    Of those that know as many, it is the one for the kind of the file's model and of its `data`.
    """
    data = read_yaml(path)
    if "run" not in data:
        raise UserError(f"{path}: has no key 'run', so it trains nothing; give the YAML file of {', '.join(TRAINERS)}")
    if isinstance(model := data.get("model"), str) and read_config(model)[1]["kind"] != "stable_audio":
        return "train_diffusion", *TRAINERS["train_diffusion"]

    def known(name: str) -> tuple[int, bool]:
        shared = data.keys() & {f.name for f in dataclasses.fields(TRAINERS[name][0])}
        return len(shared), isinstance(data.get("data"), list) == (name == "train_clap")

    best = max(TRAINERS, key=known)
    return best, *TRAINERS[best]


def _measure(trainer: str, task: TrainingTask, run: RunConfig, steps: int, processes: int, profiled: bool) -> RunPlan:
    precision = run.precision_on(device_to_train_on())
    accelerator = Accelerator(mixed_precision=precision)
    plain = {name: module.to(accelerator.device) for name, module in task.modules.items()}
    optimizers = {name: c.build(plain[name]) for name, c in task.optimizers.items()}
    if run.compile:
        for module in plain.values():
            module.compile(dynamic=False)
    update = Update(accelerator, run, task, optimizers)
    whole, part = task.batch_size, max(1, task.batch_size // 2)
    counts = {size: _counted_step(task, size, _fullest(task, size, run), update) for size in {part: 0, whole: 0}}
    kept = {size: count.kept for size, count in counts.items()}
    per_item = (kept[whole] - kept[part]) / (whole - part) if whole > part else kept[whole]

    def do(step: int) -> None:
        one_step(task, _batches(task, step, run), step, update)
        update.end()
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize(accelerator.device)

    begun = time.perf_counter()
    for step in range(2, 2 + steps):
        do(step)
    seconds = (time.perf_counter() - begun) / steps
    trained = {n: sum(p.numel() for p in m.parameters() if p.requires_grad) for n, m in plain.items()}
    weights = {name: _bytes(module.state_dict().values()) for name, module in plain.items()}
    averages = sum(weights[name] for name in task.averaged) if run.ema_decay else 0
    frozen_weights = sum(_bytes(m.state_dict().values()) for m in task.frozen.values())
    gradients = sum(_bytes(p for p in m.parameters() if p.requires_grad) for m in plain.values())
    entries = [entry for optimizer in optimizers.values() for entry in optimizer.state.values()]
    states = _bytes(value for entry in entries for value in entry.values() if isinstance(value, Tensor))
    output = Path(run.output).absolute()
    done = checkpoints(output / "checkpoints")
    fixed = sum(weights.values()) + frozen_weights + gradients * (2 if processes > 1 else 1) + states + averages
    return RunPlan(
        trainer=trainer,
        trained=trained,
        frozen={n: sum(p.numel() for p in m.parameters()) for n, m in task.frozen.items()}
        | {n: c for n, m in plain.items() if (c := sum(p.numel() for p in m.parameters()) - trained[n])},
        weights=sum(weights.values()) + frozen_weights,
        frozen_weights=frozen_weights,
        gradients=gradients * (2 if processes > 1 else 1),  # DDP's buckets hold them once more
        optimizers=states,
        averages=averages,
        activations=kept[whole],
        per_item=per_item,
        free=_free(accelerator.device, fixed, averages),
        checkpoint=sum(weights.values()) + averages + states,
        bundle=sum(weights[name] for name in task.averaged) + frozen_weights,
        disk_free=shutil.disk_usage(next(p for p in (output, *output.parents) if p.exists())).free,
        items=task.items,
        processes=processes,
        batch_size=whole,
        accumulate=run.accumulate,
        seconds=seconds,
        flops=counts[whole].flops,
        steps=run.steps,
        done=int(done[-1].name.removeprefix("step_")) if done else 0,
        keep_last=run.keep_last,
        profile=profile(lambda: do(2 + steps), accelerator.device, precision) if profiled else None,
    )


def _batches(task: TrainingTask, step: int, run: RunConfig) -> Iterable[Any]:
    return (task.batch(number, 0, 1) for number in range(step * run.accumulate, (step + 1) * run.accumulate))


@dataclass(frozen=True)
class _Counts:
    """Counts of one step: peak bytes kept by autograd, and floating-point operations."""

    kept: int
    flops: int


def _fullest(task: TrainingTask, size: int, run: RunConfig) -> int:
    """Find which of the first steps has most data in batches of `size`, whose windows may differ in length."""
    before, task.batch_size = task.batch_size, size
    amounts = [sum(_bytes(_tensors(batch)) for batch in _batches(task, step, run)) for step in range(_LOOKED_AT)]
    task.batch_size = before
    return amounts.index(max(amounts))


def _tensors(batch: Any) -> list[Tensor]:
    return [value for value in batch.values() if isinstance(value, Tensor)]


def _counted_step(task: TrainingTask, size: int, step: int, update: Update) -> _Counts:
    """Do a step with batches of `size` items."""
    before, task.batch_size = task.batch_size, size
    constant = {t.untyped_storage().data_ptr() for m in task.modules.values() for t in m.state_dict().values()}
    with (flops := FlopCounter()), (saved := SavedTensorMemory(constant)).hooks:
        one_step(task, _batches(task, step, update.run), step, update)
        update.end()
    task.batch_size = before
    return _Counts(saved.most, flops.total)


class FlopCounter(TorchDispatchMode):
    """Operation counter by torch's formulas. (Its FlopCounterMode also tracks modules, which forbids autograd.grad.)"""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


class SavedTensorMemory:
    """Memory behind the tensors that autograd saves, each counted once, without that at `constant` addresses."""

    def __init__(self, constant: set[int]):
        self.constant, self.now, self.most = constant, 0, 0
        self.holders: Counter[int] = Counter()
        self.hooks = saved_tensors_hooks(lambda tensor: _Kept(self, tensor), lambda kept: kept.tensor)

    def add(self, tensor: Tensor, holders: int) -> None:
        """Add `holders` (1, or -1 to remove one) to those of the tensor's memory."""
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in self.constant:
            return
        before = self.holders[address]
        self.holders[address] += holders
        self.now += storage.nbytes() * (int(before + holders > 0) - int(before > 0))
        self.most = max(self.most, self.now)


class _Kept:
    """A saved tensor, counted for as long as it lives."""

    def __init__(self, saved: SavedTensorMemory, tensor: Tensor):
        self.saved, self.tensor = saved, tensor
        saved.add(tensor, 1)

    def __del__(self) -> None:
        self.saved.add(self.tensor, -1)


def _free(device: torch.device, fixed: int, averages: int) -> int:
    """Memory left for activations; all else is allocated already, except the averages."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1] * (1 - _SPARE)) - fixed
    return psutil.virtual_memory().available - averages


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
