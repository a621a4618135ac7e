"""What all diffusion trainers share: noise levels, dropped conditions, losses by level, figures on held-out data."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stable_audio_lite.data.crops import item_numbers
from stable_audio_lite.diffusion.denoiser import Conditional, Objective
from stable_audio_lite.generation import Pipeline
from stable_audio_lite.models.conditioner import Conditioner, drop
from stable_audio_lite.nn.attention import Condition
from training.noise import generator, item_noise
from training.task import Sound, Task
from training.update import Update

_LEVELS = 4  # noise-level bins of the logged loss
_UNPROMPTED = 3  # demos where there are no prompts


@dataclass(frozen=True, kw_only=True)
class DemosConfig:
    """Sounds made while training, of the same seeds each time.

    Attributes:
        every: steps between them.
        prompts: one sound each, at every guidance scale in `cfg`; none: sounds from nothing.
        seconds: length of each, or null for the window.
        steps: sampling steps, or null for the model's own.
    """

    every: int
    prompts: tuple[str, ...] = ()
    cfg: tuple[float, ...] = (1.0, 3.0, 6.0)
    seconds: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or not self.cfg:
            raise ValueError("every must be at least 1, and cfg not empty")

    def sounds(self, model: Pipeline) -> list[Sound]:
        """What `model` makes of them."""
        settings: dict[str, Any] = {"seconds": self.seconds, "steps": self.steps, "seed": 0}
        if not self.prompts:
            made = model.generate(count=_UNPROMPTED, **settings)
            return [Sound(f"sound{i}", audio, made.sample_rate) for i, audio in enumerate(made.audio, 1)]
        sounds = []
        for cfg in self.cfg:
            made = model.generate(list(self.prompts), cfg=cfg, **settings)
            rows = enumerate(made.audio, 1)
            sounds += [Sound(f"prompt{i}-cfg{cfg:g}", audio, made.sample_rate) for i, audio in rows]
        return sounds


class Conditioned(nn.Module):
    """A network with its timing embeddings: what is trained together, in one forward."""

    def __init__(self, conditioner: Conditioner, network: nn.Module):
        super().__init__()
        self.conditioner, self.network = conditioner, network

    def forward(self, x: Tensor, t: Tensor, text: Condition, timing: tuple[Tensor, Tensor], dropped: Tensor) -> Tensor:
        """Noisy data (B, ...), times, text features, (start, total) seconds, dropped (B,) bool -> prediction."""
        network: Conditional = self.network  # type: ignore[assignment]
        condition = drop(self.conditioner(text, *timing), network.null_condition(len(x)), dropped)
        return network(x, t, network.context(condition))


class DenoisingTask(Task):
    """A network learns to predict clean data, noise or v from noisy data.

    Attributes:
        objective: what is predicted; the losses are called after it.
        seed: of the run.
        condition_dropout: share of items trained without their condition.
        lowest_time: times lie from here to 1, stratified over the batch; uniform where `time_shift` is 1.
        time_shift: how much more of them lie near 1, see `stratified_times`.
        held_out_items: how many held-out examples there are.
    """

    averaged = ("model",)
    objective: Objective
    seed: int
    condition_dropout: float = 0.0
    lowest_time: float = 0.0
    time_shift: float = 1.0
    held_out_items: int = 0

    @abstractmethod
    def examples(self, numbers: range, seed: int, held_out: bool = False) -> dict[str, Any]:
        """The examples of these numbers, each a function of its own and the seed: x0 (B, ...) and what else is used."""

    @abstractmethod
    def errors(self, batch: dict[str, Any]) -> Tensor:
        """Mean squared error (B,) of the prediction for x0 and eps at times t, with `dropped` conditions."""

    def batch(self, number: int, rank: int, world: int) -> dict[str, Any]:
        seed, size = self.seed, self.batch_size
        numbers = item_numbers(number, rank, world, size)
        batch = self.examples(numbers, seed)
        own = slice(rank * size, (rank + 1) * size)
        draws = generator(seed, number)
        return batch | {
            "eps": item_noise(seed, numbers, tuple(batch["x0"].shape[1:])),
            "t": stratified_times(world * size, draws, self.lowest_time, self.time_shift)[own],
            "dropped": (torch.rand(world * size, generator=draws) < self.condition_dropout)[own],
        }

    def step(self, batch: dict[str, Any], step: int, update: Update) -> dict[str, Tensor]:
        errors = self.errors(batch)
        loss = errors.mean()
        update("model", loss)
        return {f"loss/{self.objective}": loss.detach()} | loss_by_level(errors.detach(), batch["t"], self.objective)

    def evaluate(self, step: int) -> dict[str, float]:
        """The loss on held-out examples, in all and by level; fixed noise at times spread over those trained on."""
        if not self.held_out_items:
            return {}
        count = min(self.held_out_items, 4 * self.batch_size)
        device = next(self.modules["model"].parameters()).device
        errors, times = [], []
        for first in range(0, count, self.batch_size):
            numbers = range(first, min(first + self.batch_size, count))
            batch = self.examples(numbers, 0, held_out=True)
            batch["eps"] = item_noise(0, numbers, tuple(batch["x0"].shape[1:]))
            lowest = self.lowest_time
            batch["t"] = lowest + (1 - lowest) * (torch.arange(len(numbers)) + 0.5) / len(numbers)
            batch["dropped"] = torch.zeros(len(numbers), dtype=torch.bool)
            times.append(batch["t"])
            errors.append(self.errors({k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}))
        whole = torch.cat(errors).cpu()
        figures = {f"loss/{self.objective}": whole.mean()} | loss_by_level(whole, torch.cat(times), self.objective)
        return {k.replace("loss", "held_out"): float(v) for k, v in figures.items() if not v.isnan()}


def stratified_times(batch: int, draws: torch.Generator, lowest: float = 0.0, shift: float = 1.0) -> Tensor:
    """Times in [lowest, 1] for a batch, in random order: one in each of `batch` equally likely parts.

    Uniform for shift s = 1; otherwise uniform u become s u / (1 + (s - 1) u), which has its median at s / (1 + s)
    (Esser et al. 2024, arXiv 2403.03206, section 5.3.2: the more numbers say the same, the more noise it takes to
    drown it).
    """
    first = lowest / (shift - (shift - 1) * lowest)
    u = first + (1 - first) * (torch.arange(batch) + torch.rand(batch, generator=draws)) / batch
    return (shift * u / (1 + (shift - 1) * u))[torch.randperm(batch, generator=draws)]


def loss_by_level(errors: Tensor, t: Tensor, objective: str) -> dict[str, Tensor]:
    """Mean error of the items in each quarter of the noise levels, NaN where there are none.

    All quarters are there always: processes that log together must name the same figures.
    """
    level = (t * _LEVELS).long().clamp_max(_LEVELS - 1)
    return {f"loss/{objective}_t{i}of{_LEVELS}": errors[level == i].mean() for i in range(_LEVELS)}
