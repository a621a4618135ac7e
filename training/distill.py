"""Distil guidance into a network: python -m training.distill --config configs/stable_audio/distill.yaml.

Classifier-free guidance takes two forwards a step. The student takes the scale as an input, and one forward (Meng et
al. 2023, arXiv 2210.03142, section 3.1): it learns what its teacher, guided, predicts. It learns that where it will be
asked, on its own way from noise to data (as Ross et al. 2011, arXiv 1011.0686), which takes captions and lengths, no
sound. The run exports a complete bundle, with few steps as its default.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_audio_lite.bundle import load_part, part_path, read_part, resolve, save_bundle
from stable_audio_lite.clap.config import ClapConfig
from stable_audio_lite.config import to_dict
from stable_audio_lite.data.crops import item_numbers
from stable_audio_lite.data.item import Item
from stable_audio_lite.data.manifest import read_items
from stable_audio_lite.diffusion.denoiser import NetworkDenoiser, guide
from stable_audio_lite.diffusion.editing import KnownRegion
from stable_audio_lite.diffusion.process import Process, append_dims
from stable_audio_lite.diffusion.samplers import SAMPLERS, Denoiser, polyexponential_sigmas
from stable_audio_lite.errors import UserError
from stable_audio_lite.models.conditioner import Conditioner
from stable_audio_lite.models.unet import Down, ResidualBlock, Transformer, UNet, Up
from stable_audio_lite.nn.attention import Condition
from stable_audio_lite.representation import LatentRepresentation, Representation, load_representation
from stable_audio_lite.systems import (
    MAX_CFG,
    ComplexSTFTConfig,
    SpectrogramDiffusionConfig,
    StableAudioConfig,
    load_system,
)
from stable_audio_lite.weights import load_state, state_hash
from training.command import main
from training.denoising import Conditioned
from training.examples import Buckets
from training.frozen import check_stage, load_frozen_clap
from training.loop import fit
from training.noise import generator, item_noise
from training.task import OptimizerConfig, RunConfig, TrainingTask, say_unread
from training.update import Update

TextConfig = StableAudioConfig | SpectrogramDiffusionConfig
"""A system that reads text, or might."""
_SOLVER = "dpmpp-2m"
_HELD_OUT = 2  # batches
_NOTHING = 1e-8  # an error of rounding alone
_UNPROMPTED = 0.05  # share of the sounds made without a prompt
_AT_DEFAULT = 0.5  # share of those with the teacher's default scale; others' are spread evenly in their logarithm


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation of guidance into a bundle that reads text.

    Attributes:
        teacher: the bundle; the student begins with its weights.
        captions: data sets whose captions to make sounds for. Only their lists are read: the captions, and the lengths
            in "seconds"; what has no length is taken to be as long as the window.
        held_out: another such data set, to compare student and teacher on, or null.
        largest_scale: the largest guidance scale that the student takes; beyond it guidance takes two forwards.
        steps: sampling steps of the ways on which it learns, and its default.
        batch_size: sounds in a batch; each is an example at every step.
    """

    teacher: str
    captions: tuple[str, ...]
    held_out: str | None = None
    largest_scale: float = 8.0
    steps: int = 8
    batch_size: int = 4
    run: RunConfig
    optimizer: OptimizerConfig

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.steps < 2:
            raise ValueError(f"batch_size must be at least 1 and steps 2, got {self.batch_size} and {self.steps}")
        if not 1 < self.largest_scale <= MAX_CFG:
            raise ValueError(f"largest_scale must lie above 1 and up to {MAX_CFG:g}, got {self.largest_scale}")


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
    """Training of a network that takes the guidance scale to predict what its teacher does with two forwards."""

    averaged = ("model",)
    criterion = "held_out/distance"

    def __init__(self, config: DistillConfig):
        self.config, self.batch_size = config, config.batch_size
        check_stage("teacher", config.teacher, "training.train_diffusion", hub=True)
        self.folder = resolve(config.teacher)
        theirs, clap = self._teachers_system()
        self.process, self.defaults = theirs.process, theirs.generation
        self.system = self._with_guidance(theirs)
        self.representation = load_representation(self.folder, theirs)
        self.clap = load_frozen_clap(str(self.folder), clap)
        self.teacher = self._load(theirs)
        windows, held_out = self.defaults.windows, config.held_out
        self.requests = Requests(config.captions, self.representation, windows)
        self.held_out = Requests((held_out,), self.representation, windows) if held_out else None
        self.items = len(self.requests.items)
        self.frozen = {"teacher": self.teacher, "text_encoder": self.clap.text}
        say_unread(self.clap.text.tokenizer, self.requests.captions, self.clap.text.max_tokens)
        torch.manual_seed(config.run.seed)
        student = self._load(self.system).requires_grad_(True)
        self.modules: dict[str, nn.Module] = {"model": student}
        if isinstance(student.network, UNet):
            self.parts = {Down: (), Up: (), ResidualBlock: (), Transformer: ("keys_values",)}
        if config.run.compile:
            self.teacher.network.compile(dynamic=False)
        self.optimizers = {"model": config.optimizer}
        self.notes = (f"guidance up to {config.largest_scale:g} of {config.teacher} becomes an input",)

    def fingerprint(self) -> dict[str, Any]:
        weights = self.teacher.state_dict()
        weights |= {f"text_encoder.{key}": value for key, value in self.clap.parts["text_encoder"].items()}
        model = {k: v for k, v in to_dict(self.system).items() if k not in ("format", "generation", "vae")}
        return {"teacher": f"weights {state_hash(weights)[:12]}", "model": model}

    def batch(self, number: int, rank: int, world: int) -> dict[str, Any]:
        return self._draw(self.requests, number, rank, world, self.config.run.seed)

    def step(self, batch: dict[str, Any], step: int, update: Update) -> dict[str, Tensor]:
        """Take the student's way from noise to data, and learn at each of its steps what the teacher predicts there.

        The error of each step counts relative to itself (the gradient is that of its logarithm), or the first steps,
        whose errors are many times as large, would drown those that decide on the sound.
        """
        errors: list[Tensor] = []

        def learn(error: Tensor) -> None:
            errors.append(error.detach())
            update("model", error / errors[-1].clamp_min(_NOTHING) / self.config.steps)

        teacher, student = self.denoisers(batch)
        lesson = _Lesson(teacher, student, self.sounding(batch), learn)
        _solve(self._held(batch, lesson), batch["eps"], batch["sigmas"])
        figures = {f"loss/step{i}": error for i, error in enumerate(errors, 1)}
        return {f"loss/{self.process.objective}": torch.stack(errors).mean()} | figures

    def denoisers(self, batch: dict[str, Any]) -> tuple[NetworkDenoiser, NetworkDenoiser]:
        """Return the teacher, guided by two forwards, and the student, both at the scale of each item of a batch."""
        device, scale = batch["eps"].device, batch["scale"]
        model, network = self.modules["model"], self.teacher.to(device).network
        text = self.clap.text.to(device).encode(batch["captions"])
        about = text, (batch["seconds_start"], batch["seconds_total"]), batch["dropped"]
        start = batch["seconds_start"] * self.teacher.frame_rate
        with torch.no_grad():
            guided = _Guided(network, self.process, self.teacher.condition(*about), scale, start)
        return guided, NetworkDenoiser(lambda x, t, context: model(x, t, *about, scale)[0], self.process)

    def evaluate(self, step: int) -> dict[str, float]:
        """Compare with the teacher's result of many steps for the same held-out captions and noise.

        "distance" is the root mean square of the difference, relative to that result's, "teacher_distance" the same of
        the teacher in as many steps as the student has. The scale is the teacher's default.
        """
        if self.held_out is None:
            return {}
        differences, power = torch.zeros(2, dtype=torch.float64), 0.0
        for batch, many, few in self._references:
            made = self._made(batch, self.denoisers(batch)[1], self.config.steps)
            live = self.sounding(batch).cpu()
            differences += torch.stack([((y - many) * live).square().sum(dtype=torch.float64) for y in (made, few)])
            power += float((many * live).square().sum(dtype=torch.float64))
        distance, teachers = (differences / power).sqrt().tolist()
        return {"held_out/distance": distance, "held_out/teacher_distance": teachers}

    @cached_property
    def _references(self) -> list[tuple[dict[str, Any], Tensor, Tensor]]:
        """Held-out batches, with the teacher's results in its own number of steps and in the student's."""
        assert self.held_out is not None
        references = []
        for number in range(_HELD_OUT):
            drawn = self._draw(self.held_out, number, 0, 1, 0)
            drawn["scale"] = torch.where(drawn["dropped"], 1.0, self.defaults.cfg)
            batch = {k: v.to(self._device) if isinstance(v, Tensor) else v for k, v in drawn.items()}
            teacher = self.denoisers(batch)[0]
            many, few = (self._made(batch, teacher, steps) for steps in (self.defaults.steps, self.config.steps))
            references.append((batch, many, few))
        return references

    def _made(self, batch: dict[str, Any], denoiser: Denoiser, steps: int) -> Tensor:
        return _solve(self._held(batch, denoiser), batch["eps"], self._levels(steps)).cpu()

    def export(self, folder: Path, modules: dict[str, nn.Module]) -> None:
        model = modules["model"]
        assert isinstance(model, Conditioned)
        system = replace(self.system, generation=replace(self.defaults, steps=self.config.steps, sampler=_SOLVER))
        parts: dict[str, Mapping[str, Tensor]] = {
            system.part: model.network.state_dict(),
            "conditioner": model.conditioner.state_dict(),
            **self.clap.parts,
        }
        if isinstance(system, StableAudioConfig):
            parts["vae"] = read_part(self.folder, "vae")
        save_bundle(folder, system, parts, self.clap.text.tokenizer.to_str())

    def _teachers_system(self) -> tuple[TextConfig, ClapConfig]:
        system, name, scale = load_system(self.folder), self.config.teacher, self.config.largest_scale
        if isinstance(system, ComplexSTFTConfig) or system.clap is None:
            raise UserError(f"teacher: {name} reads no text, so it has no guidance to distil")
        if rescale := system.generation.rescale:
            raise UserError(
                f"teacher: {name} rescales its guidance (generation.rescale {rescale:g}), which takes two forwards; "
                "set it to 0 in its config.yaml"
            )
        if system.generation.cfg > scale:
            raise UserError(f"largest_scale: {scale:g} is below the default of {name}, {system.generation.cfg:g}")
        return system, system.clap

    def _with_guidance(self, theirs: TextConfig) -> TextConfig:
        """The teacher's system, its network with the scale as an input."""
        scale = self.config.largest_scale
        if isinstance(theirs, StableAudioConfig):
            return replace(theirs, unet=replace(theirs.unet, guidance=scale))
        return replace(theirs, transformer=replace(theirs.transformer, guidance=scale))

    def _load(self, system: TextConfig) -> Conditioned:
        """Load the teacher's weights, in float32; what only `system` has begins as it is built."""
        assert system.clap is not None
        network, path = system.network(), part_path(self.folder, system.part)
        new = {key: value for key, value in network.state_dict().items() if key.startswith("guidance.")}
        load_state(network, new | read_part(self.folder, system.part), str(path), "the config")
        conditioner = Conditioner(system.timing, system.clap.text_width)
        load_part(self.folder, "conditioner", conditioner)
        rate = self.representation.sample_rate / self.representation.hop
        return Conditioned(conditioner, network, rate).float().requires_grad_(False)

    def _draw(self, requests: Requests, number: int, rank: int, world: int, seed: int) -> dict[str, Any]:
        """Draw requests with noise, scales, and the noise levels of the way.

        Of every second batch all levels but the last are lower, by a share of a step: other numbers of steps may be
        asked for, too.
        """
        config, size, everyone = self.config, self.batch_size, world * self.batch_size
        frames, batch = requests.batch(number, rank, world, size, seed)
        draws, own = generator(seed, number), slice(rank * size, (rank + 1) * size)
        dropped = torch.rand(everyone, generator=draws) < _UNPROMPTED
        spread = config.largest_scale ** torch.rand(everyone, generator=draws)
        default = torch.rand(everyone, generator=draws) < _AT_DEFAULT
        scale = torch.where(default, self.defaults.cfg, spread).masked_fill(dropped, 1.0)
        share = torch.rand((), generator=draws) * (number % 2)
        levels = self._levels(config.steps)
        levels[:-2] *= (levels[1:-1] / levels[:-2]) ** share
        numbers = item_numbers(number, rank, world, size)
        eps = item_noise(seed, numbers, (*self.representation.shape[:-1], frames))
        return batch | {"dropped": dropped[own], "scale": scale[own], "sigmas": levels, "eps": eps}

    def sounding(self, batch: dict[str, Any]) -> Tensor:
        """Tell which data, (B, ...) bool, come before the end of a piece; all, for other systems than of latents."""
        eps = batch["eps"]
        if not isinstance(latents := self.representation, LatentRepresentation):
            return torch.ones_like(eps, dtype=torch.bool)
        seconds = batch["seconds_total"] - batch["seconds_start"]
        ends = (seconds * latents.sample_rate / latents.hop - 1e-6).ceil()
        return (torch.arange(eps.shape[-1], device=eps.device) < ends[:, None])[:, None].expand_as(eps)

    def _held(self, batch: dict[str, Any], denoiser: Denoiser) -> Denoiser:
        """The denoiser, which knows that there is silence after the end of a piece, as in generation."""
        if not isinstance(self.representation, LatentRepresentation):
            return denoiser
        silent = self._silence[:, -batch["eps"].shape[-1] :].to(batch["eps"].device)
        return KnownRegion(denoiser, silent, ~self.sounding(batch))

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


class _Guided(NetworkDenoiser):
    """Guidance by two forwards, whatever the network could do, at a scale (B,) for each item."""

    def __init__(self, network: Any, process: Process, condition: Condition, scale: Tensor, start: Tensor):
        both = Condition.concatenate([condition, network.unwanted(condition, None)])
        super().__init__(network, process, network.context(both, None, torch.cat((start, start))))
        self.scale = scale

    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        wanted, unwanted = super().predict(torch.cat((x_t, x_t)), torch.cat((t, t))).chunk(2)
        return guide(wanted, unwanted, append_dims(self.scale, x_t))


class _Lesson:
    """The student as a denoiser that learns from the teacher wherever it is asked.

    `learn` gets the mean squared error of the prediction in frames that are `sounding`.
    """

    def __init__(
        self,
        teacher: NetworkDenoiser,
        student: NetworkDenoiser,
        sounding: Tensor,
        learn: Callable[[Tensor], None],
    ):
        self.teacher, self.student, self.sounding, self.learn = teacher, student, sounding, learn

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        x_t, t = x * append_dims((1 + sigma**2).rsqrt(), x), self.teacher.process.time(sigma)
        with torch.no_grad():
            target = self.teacher.predict(x_t, t)
        with torch.enable_grad():
            prediction = self.student.predict(x_t, t)
            self.learn((prediction.float() - target.float())[self.sounding].square().mean())
        return self.teacher.process.to_x0(prediction.detach(), x_t, sigma)


def _solve(denoiser: Denoiser, eps: Tensor, sigmas: Tensor) -> Tensor:
    """Sample from noise eps (B, ...), by a solver that draws no more of it."""
    return SAMPLERS[_SOLVER](denoiser, eps * sigmas[0], sigmas, noise=lambda: torch.zeros_like(eps))


def run(config: DistillConfig) -> Path:
    """Distil as configured; returns the student's folder."""
    return fit(config.run, DistillTask(config), config)


if __name__ == "__main__":
    main(__doc__, DistillConfig, run)
