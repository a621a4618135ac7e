"""Distil a bundle into a student of few steps: python -m training.distill --config configs/stable_audio/distill.yaml.

With one network call a step the student makes what its teacher makes in many, guidance included. As in progressive
distillation (Salimans & Ho 2022, arXiv 2202.00512; of guided models Meng et al. 2023, arXiv 2210.03142) it learns the
estimate of x0 with which one step of DDIM arrives where several guided steps of the teacher do, but at once, not by
halving, and where it will be asked: on its own way from noise to data, at the noise levels of its own steps (as Ross et
al. 2011, arXiv 1011.0686). That takes captions and lengths, no sound. The run exports a complete bundle.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_audio_lite.bundle import load_part, read_part, resolve, save_bundle
from stable_audio_lite.config import to_dict
from stable_audio_lite.data.crops import item_numbers
from stable_audio_lite.data.item import Item
from stable_audio_lite.data.manifest import read_items
from stable_audio_lite.diffusion.denoiser import Guidance, NetworkDenoiser
from stable_audio_lite.diffusion.editing import KnownRegion
from stable_audio_lite.diffusion.samplers import SAMPLERS, Denoiser, polyexponential_sigmas
from stable_audio_lite.errors import UserError
from stable_audio_lite.models.conditioner import Conditioner
from stable_audio_lite.models.unet import Down, ResidualBlock, Transformer, UNet, Up
from stable_audio_lite.representation import LatentRepresentation, Representation, load_representation
from stable_audio_lite.systems import MAX_CFG, STUDENT_SAMPLER, ComplexSTFTConfig, StableAudioConfig, load_system
from stable_audio_lite.weights import state_hash
from training.command import main
from training.denoising import Conditioned
from training.examples import Buckets
from training.frozen import FrozenClap, check_stage, load_frozen_clap
from training.loop import fit
from training.noise import generator, item_noise
from training.task import OptimizerConfig, RunConfig, TrainingTask, say_unread
from training.train_diffusion import network_of
from training.update import Update

_SOLVER = "dpmpp-2m"  # of the teacher
_HELD_OUT = 2  # batches
_NOTHING = 1e-8  # an error of rounding alone


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation of a bundle of any system.

    Attributes:
        teacher: the bundle; the student begins with its weights.
        captions: for a teacher that reads text, data sets whose captions to make sounds for. Only their lists are read:
            the captions, and the lengths in "seconds"; what has no length is taken to be as long as the window.
        held_out: another such data set, to compare student and teacher on, or null.
        steps: of the student.
        teacher_steps: of the teacher, for each of the student's.
        cfg: the teacher's guidance scale, which the student has built in; null: the teacher's default.
        batch_size: sounds in a batch; each is an example for every step of the student.
        condition_dropout: share of the sounds made without a prompt.
    """

    teacher: str
    captions: tuple[str, ...] = ()
    held_out: str | None = None
    steps: int = 8
    teacher_steps: int = 2
    cfg: float | None = None
    batch_size: int = 4
    condition_dropout: float = 0.05
    run: RunConfig
    optimizer: OptimizerConfig

    def __post_init__(self) -> None:
        for name in ("steps", "teacher_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.cfg is not None and not 0 <= self.cfg <= MAX_CFG:
            raise ValueError(f"cfg must lie in 0..{MAX_CFG:g}, got {self.cfg}")
        if not 0 <= self.condition_dropout <= 1:
            raise ValueError(f"condition_dropout must lie in 0..1, got {self.condition_dropout}")


class Requests:
    """Captions with timing, as sounds are asked for: the whole of a piece, or some window of a long one.

    Args:
        sources: data sets.
        representation: of the sounds.
        windows: lengths in frames that are shorter than the representation's.

    Raises:
        UserError: a data set can't be read, or an item has no caption or an odd length.
    """

    def __init__(self, sources: Sequence[str], representation: Representation, windows: Sequence[int]):
        self.items = [item for source in sources for item in read_items(source)]
        if mute := next((item for item in self.items if not item.captions), None):
            raise UserError(f"{mute.path}: has no caption, and the teacher reads text; caption it or leave it out")
        self.window = representation.window_seconds
        self.seconds = [_seconds(item, self.window) for item in self.items]
        rate = representation.sample_rate / representation.hop
        frames = (math.ceil(seconds * rate) for seconds in self.seconds)
        self.buckets = Buckets(frames, sorted({*windows, representation.shape[-1]}))

    @property
    def captions(self) -> list[str]:
        """Every caption of every item."""
        return [caption for item in self.items for caption in item.captions]

    def batch(self, number: int, rank: int, world: int, size: int, seed: int) -> tuple[int, dict[str, Any]]:
        """Draw the `number`-th batch of a process.

        Returns:
            Its length in frames, and "captions", "seconds_start" and "seconds_total" of `size` sounds.
        """
        frames, group = self.buckets.batch(number, size * world, seed)
        captions, starts, totals = [], [], []
        own = group[rank * size : (rank + 1) * size]
        for index, n in zip(own, item_numbers(number, rank, world, size), strict=True):
            rng = random.Random(f"{seed}/{n}")
            captions.append(rng.choice(self.items[index].captions))
            starts.append(rng.uniform(0, max(self.seconds[index] - self.window, 0)))
            totals.append(self.seconds[index])
        timing = {"seconds_start": torch.tensor(starts), "seconds_total": torch.tensor(totals)}
        return frames, {"captions": captions} | timing


def _seconds(item: Item, window: float) -> float:
    """Length of an item as its row says, by default the window."""
    given = item.metadata.get("seconds")
    try:
        seconds = window if given in (None, "") else float(given)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UserError(f"{item.path}: its 'seconds' should be its length, got {given!r}; correct or remove it")
    return seconds


class DistillTask(TrainingTask):
    """Training of a student to arrive, by each of its steps, where its teacher does by several."""

    averaged = ("model",)
    criterion = "held_out/distance"

    def __init__(self, config: DistillConfig):
        self.config, self.batch_size = config, config.batch_size
        check_stage("teacher", config.teacher, "training.train_diffusion", hub=True)
        self.folder = resolve(config.teacher)
        self.system = load_system(self.folder)
        self.process, self.defaults = self.system.process, self.system.generation
        if self.defaults.distilled is not None:
            raise UserError(f"teacher: {config.teacher} is a student itself; give the model that it was distilled from")
        self.clap = self._load_clap()
        self.representation = load_representation(self.folder, self.system)
        self.teacher = self._load_teacher()
        self.cfg = 1.0 if self.clap is None else self.defaults.cfg if config.cfg is None else config.cfg
        self.sigmas = self._levels(config.steps)
        self.requests, self.held_out = self._load_requests()
        self.items = self.batch_size if self.requests is None else len(self.requests.items)
        self.frozen = {"teacher": self.teacher}
        if self.clap is not None and self.requests is not None:
            self.frozen["text_encoder"] = self.clap.text
            say_unread(self.clap.text.tokenizer, self.requests.captions, self.clap.text.max_tokens)
        self.modules = {"model": copy.deepcopy(self.teacher).requires_grad_(True)}
        if isinstance(network_of(self.modules["model"]), UNet):
            self.parts = {Down: (), Up: (), ResidualBlock: (), Transformer: ("keys_values",)}
        if config.run.compile:
            network_of(self.teacher).compile(dynamic=False)
        self.optimizers = {"model": config.optimizer}
        self.notes = (f"{config.steps} steps with guidance {self.cfg:g} of {config.teacher} built in",)

    def fingerprint(self) -> dict[str, Any]:
        weights = self.teacher.state_dict() | {"sigmas": self.sigmas}
        if self.clap is not None:
            weights |= {f"text_encoder.{key}": value for key, value in self.clap.parts["text_encoder"].items()}
        model = {k: v for k, v in to_dict(self.system).items() if k not in ("format", "generation", "vae")}
        facts = {"teacher": f"weights {state_hash(weights)[:12]}", "model": model, "steps": self.config.steps}
        return facts | {"cfg": self.cfg, "rescale": self.defaults.rescale}

    def batch(self, number: int, rank: int, world: int) -> dict[str, Any]:
        return self._draw(self.requests, number, rank, world, self.config.run.seed)

    def step(self, batch: dict[str, Any], step: int, update: Update) -> dict[str, Tensor]:
        """Take the student's way from noise to data, and learn from the teacher at each of its steps.

        The error of each step counts relative to itself (the gradient is that of its logarithm), or the first steps,
        whose errors are hundreds of times as large, would drown those that decide on the sound.
        """
        teacher, student = self.denoisers(batch)
        x, losses = batch["eps"] * self.sigmas[0], []
        for sigma, following in pairwise(self.sigmas.tolist()):
            with torch.no_grad():
                target = self.target(teacher, x, sigma, following)
            estimate = student(x, _levels_of(x, sigma))
            # The error of v is that of x0, weighted by 1 + SNR (Salimans & Ho 2022, section 4).
            losses.append((1 + sigma**-2) * (estimate - target).square().mean())
            update("model", losses[-1] / losses[-1].detach().clamp_min(_NOTHING) / self.config.steps)
            x = arrive(x, estimate.detach(), sigma, following)
        figures = {f"loss/step{i}": loss.detach() for i, loss in enumerate(losses, 1)}
        return {"loss/v": torch.stack(losses).detach().mean()} | figures

    def target(self, teacher: Denoiser, x: Tensor, sigma: float, following: float) -> Tensor:
        """The estimate of x0 with which DDIM arrives at level `following` where the teacher does.

        The teacher takes its steps from x (B, ...) at level `sigma`, evenly in log sigma; one if it is to 0.
        """
        if not following:
            return teacher(x, _levels_of(x, sigma))
        levels = torch.logspace(math.log10(sigma), math.log10(following), self.config.teacher_steps + 1)
        return aim(x, _solve(_SOLVER, teacher, x, levels), sigma, following)

    def denoisers(self, batch: dict[str, Any]) -> tuple[Denoiser, Denoiser]:
        """Return the teacher, guided, and the student, both under the conditions of a batch.

        After the end of a piece they know that there is silence, as in generation.
        """
        student: Any = self.modules["model"]
        self.teacher.to(batch["eps"].device)
        network: Any = network_of(self.teacher)
        if self.clap is None:
            pair: tuple[Denoiser, Denoiser] = (
                NetworkDenoiser(network, self.process),
                NetworkDenoiser(lambda x, t, context: student(x, t), self.process),
            )
            return pair
        assert isinstance(self.teacher, Conditioned)
        text = self.clap.text.to(batch["eps"].device).encode(batch["captions"])
        timing, dropped = (batch["seconds_start"], batch["seconds_total"]), batch["dropped"]
        with torch.no_grad():
            condition = self.teacher.condition(text, timing, dropped)
            guided = Guidance(network, self.process, condition, scale=self.cfg, rescale=self.defaults.rescale)
        pair = guided, NetworkDenoiser(lambda x, t, context: student(x, t, text, timing, dropped)[0], self.process)
        if (ended := self._ended(batch)) is None:
            return pair
        silent = self._silence[:, -ended.shape[-1] :].to(ended.device)
        return KnownRegion(pair[0], silent, ended), KnownRegion(pair[1], silent, ended)

    def evaluate(self, step: int) -> dict[str, float]:
        """Compare with the teacher's result of many steps for the same held-out captions and noise.

        "distance" is the root mean square of the difference, relative to that result's, "teacher_distance" the same of
        the teacher in as many guided steps as the student has.
        """
        if self.clap is not None and self.held_out is None:
            return {}
        differences, power = torch.zeros(2, dtype=torch.float64), 0.0
        for batch, many, few in self._references:
            x = batch["eps"] * self.sigmas[0]
            made = _solve(STUDENT_SAMPLER, self.denoisers(self._here(batch))[1], x.to(self._device), self.sigmas).cpu()
            live = 1.0 if (ended := self._ended(batch)) is None else (~ended).float()
            differences += torch.stack([((y - many) * live).square().sum(dtype=torch.float64) for y in (made, few)])
            power += float((many * live).square().sum(dtype=torch.float64))
        distance, teachers = (differences / power).sqrt().tolist()
        return {"held_out/distance": distance, "held_out/teacher_distance": teachers}

    @cached_property
    def _references(self) -> list[tuple[dict[str, Any], Tensor, Tensor]]:
        """Held-out batches, with the teacher's results in its own number of steps and in the student's."""
        references = []
        for number in range(_HELD_OUT):
            batch = self._draw(self.held_out, number, 0, 1, 0)
            teacher, x = self.denoisers(self._here(batch))[0], (batch["eps"] * self.sigmas[0]).to(self._device)
            counts = self._levels(self.defaults.steps), self.sigmas
            many, few = (_solve(_SOLVER, teacher, x, sigmas).cpu() for sigmas in counts)
            references.append((batch, many, few))
        return references

    def export(self, folder: Path, modules: dict[str, nn.Module]) -> None:
        model = modules["model"]
        steps, sampler = self.config.steps, STUDENT_SAMPLER
        own = replace(self.defaults, steps=steps, cfg=1.0, rescale=0.0, sampler=sampler, distilled=self.cfg)
        system = replace(self.system, generation=own)
        parts: dict[str, Mapping[str, Tensor]] = {self.system.part: network_of(model).state_dict()}
        if isinstance(self.system, StableAudioConfig):
            parts["vae"] = read_part(self.folder, "vae")
        if self.clap is None:
            save_bundle(folder, system, parts)
            return
        assert isinstance(model, Conditioned)
        parts |= {**self.clap.parts, "conditioner": model.conditioner.state_dict()}
        save_bundle(folder, system, parts, self.clap.text.tokenizer.to_str())

    def _load_clap(self) -> FrozenClap | None:
        """Load the text encoder of a teacher that reads text."""
        if self.system.clap is None:
            if self.config.captions or self.config.held_out or self.config.cfg is not None:
                raise UserError(f"captions, held_out, cfg: {self.config.teacher} reads no text; leave them out")
            return None
        if not self.config.captions:
            raise UserError(f"captions: {self.config.teacher} reads text; name data sets with captions")
        return load_frozen_clap(str(self.folder), self.system.clap)

    def _load_teacher(self) -> nn.Module:
        network = self.system.network()
        load_part(self.folder, self.system.part, network)
        if self.clap is None:
            return network.float().requires_grad_(False)
        assert not isinstance(self.system, ComplexSTFTConfig) and self.system.context_width is not None
        conditioner = Conditioner(self.system.timing, self.system.context_width)
        load_part(self.folder, "conditioner", conditioner)
        return Conditioned(conditioner, network).float().requires_grad_(False)

    def _load_requests(self) -> tuple[Requests | None, Requests | None]:
        if self.clap is None:
            return None, None
        windows, held_out = self.defaults.windows, self.config.held_out
        requests = Requests(self.config.captions, self.representation, windows)
        return requests, Requests((held_out,), self.representation, windows) if held_out else None

    def _draw(self, requests: Requests | None, number: int, rank: int, world: int, seed: int) -> dict[str, Any]:
        size, frames, batch = self.batch_size, self.representation.shape[-1], dict[str, Any]()
        numbers = item_numbers(number, rank, world, size)
        if requests is not None:
            frames, batch = requests.batch(number, rank, world, size, seed)
        unprompted = torch.rand(world * size, generator=generator(seed, number)) < self.config.condition_dropout
        batch["dropped"] = unprompted[rank * size : (rank + 1) * size]
        return batch | {"eps": item_noise(seed, numbers, (*self.representation.shape[:-1], frames))}

    def _ended(self, batch: dict[str, Any]) -> Tensor | None:
        """Frames (B, 1, T) of latents that come after the end of the piece; None for other systems."""
        if not isinstance(latents := self.representation, LatentRepresentation) or self.clap is None:
            return None
        seconds = batch["seconds_total"] - batch["seconds_start"]
        ends = (seconds * latents.sample_rate / latents.hop - 1e-6).ceil()
        return (torch.arange(batch["eps"].shape[-1], device=ends.device) >= ends[:, None])[:, None]

    @cached_property
    def _silence(self) -> Tensor:
        assert isinstance(self.representation, LatentRepresentation)
        return self.representation.silence

    def _levels(self, steps: int) -> Tensor:
        defaults = self.defaults
        return polyexponential_sigmas(steps, defaults.sigma_min, defaults.sigma_max, defaults.rho)

    @property
    def _device(self) -> torch.device:
        return next(self.modules["model"].parameters()).device

    def _here(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Move a batch to the student's device."""
        return {k: v.to(self._device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def arrive(x: Tensor, estimate: Tensor, sigma: float, following: float) -> Tensor:
    """One step of DDIM from x (B, ...) at level `sigma` to level `following`, by an estimate of x0."""
    return estimate + following / sigma * (x - estimate)


def aim(x: Tensor, reached: Tensor, sigma: float, following: float) -> Tensor:
    """The estimate of x0 by which `arrive` gets to `reached` (Salimans & Ho 2022, algorithm 2)."""
    share = following / sigma
    return (reached - share * x) / (1 - share)


def _solve(name: str, denoiser: Denoiser, x: Tensor, sigmas: Tensor) -> Tensor:
    """Sample by a solver that draws no noise."""
    return SAMPLERS[name](denoiser, x, sigmas, noise=lambda: torch.zeros_like(x))


def _levels_of(x: Tensor, sigma: float) -> Tensor:
    """One noise level for each item of x."""
    return x.new_full((len(x),), sigma)


def run(config: DistillConfig) -> Path:
    """Distil as configured; returns the student's folder."""
    return fit(config.run, DistillTask(config), config)


if __name__ == "__main__":
    main(__doc__, DistillConfig, run)
