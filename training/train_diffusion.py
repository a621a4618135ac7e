"""Train the U-Net: python -m training.train_diffusion --config configs/stable_audio/train_diffusion.yaml.

It learns from cached latents. The objective is v on the cosine schedule, x_t = cos(pi t/2) x + sin(pi t/2) eps, with t
uniform in [0, 1] and stratified over the batch (Salimans & Ho 2022, arXiv 2202.00512; Evans et al. 2024, arXiv
2402.04825). Exports a complete bundle.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_audio_lite.bundle import StableAudioConfig, load_model_config, load_part, read_part, save_bundle
from stable_audio_lite.conditioning.conditioner import Conditioner, drop
from stable_audio_lite.data.crops import epoch_index, item_numbers
from stable_audio_lite.data.latents import encoder_hash
from stable_audio_lite.data.windows import LatentWindows, stack
from stable_audio_lite.diffusion.schedule import add_noise, v_target
from stable_audio_lite.errors import UserError
from stable_audio_lite.lora import LoraConfig, add_lora, save_lora
from stable_audio_lite.models.unet import Down, ResidualBlock, Transformer, UNet, Up
from stable_audio_lite.models.vae import VAE
from stable_audio_lite.nn.attention import Condition
from stable_audio_lite.pipeline import StableAudio
from training.command import main
from training.frozen import FrozenClap, load_frozen_clap
from training.loop import fit
from training.noise import generator, item_noise
from training.task import OptimizerConfig, RunConfig, Sound, Task
from training.update import Update

_LEVELS = 4  # noise-level bins of the logged loss


@dataclass(frozen=True, kw_only=True)
class DemosConfig:
    """Sounds made while training, of the same seeds each time.

    Attributes:
        every: steps between them.
        prompts: one sound each, at every guidance scale in `cfg`.
        seconds: length of each, or null for the window.
        steps: sampling steps, or null for the model's own.
    """

    every: int
    prompts: tuple[str, ...]
    cfg: tuple[float, ...] = (1.0, 3.0, 6.0)
    seconds: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or not self.prompts or not self.cfg:
            raise ValueError("every must be at least 1, and prompts and cfg not empty")


@dataclass(frozen=True, kw_only=True)
class TrainDiffusionConfig:
    """Training of the U-Net and the timing embeddings.

    Attributes:
        model: path of the model's YAML file.
        latents: folders written by training.pre_encode, whose items are trained on alike.
        held_out: another such folder for the validation loss, or null.
        vae: bundle with the VAE that made the latents.
        clap: bundle with the text encoder, or a pretrained CLAP: transformers folder, hub id or LAION `.pt`.
        initial: bundle whose U-Net and timing embeddings to go on from, or null; its VAE's encoder and its text encoder
            have to be those of `vae` and `clap`.
        lora: size of a LoRA to train in the place of all weights, or null; it is what the run exports.
        condition_dropout: share of items trained without their condition.
        lowest_time: smallest t that is trained. A generator that ends above that noise level (generation.sigma_min of
            the model, tan(pi t / 2)) has no use for what is below, where most of the loss is.
        padding: whether the silence after an item's end is part of the loss, and so learned.
        demos: sounds to make while training, or null.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
    """

    model: str
    latents: tuple[str, ...]
    held_out: str | None = None
    vae: str
    clap: str
    initial: str | None = None
    lora: LoraConfig | None = None
    batch_size: int = 16
    condition_dropout: float = 0.1
    lowest_time: float = 0.0
    padding: bool = True
    demos: DemosConfig | None = None
    gradient_checkpointing: bool = False
    run: RunConfig
    optimizer: OptimizerConfig

    def __post_init__(self) -> None:
        if not self.latents:
            raise ValueError("latents is empty; list the folders that training.pre_encode wrote")
        if self.lora and not self.initial:
            raise ValueError("lora needs `initial`, the bundle that it changes")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if not 0 <= self.condition_dropout <= 1:
            raise ValueError(f"condition_dropout must lie in 0..1, got {self.condition_dropout}")
        if not 0 <= self.lowest_time < 1:
            raise ValueError(f"lowest_time must be at least 0 and below 1, got {self.lowest_time}")


class ConditionedUNet(nn.Module):
    """The U-Net with its timing embeddings: what is trained together, in one forward."""

    def __init__(self, model: StableAudioConfig):
        super().__init__()
        self.conditioner = Conditioner(model.timing, model.context_width)
        self.unet = UNet(
            model.unet,
            channels=model.vae.latent_channels,
            context_width=model.context_width,
            context_tokens=model.context_tokens,
        )

    def forward(self, x: Tensor, t: Tensor, text: Condition, timing: tuple[Tensor, Tensor], dropped: Tensor) -> Tensor:
        """Noisy latents (B, C, T), times, text features, (start, total) seconds, dropped (B,) bool -> v (B, C, T)."""
        condition = drop(self.conditioner(text, *timing), self.unet.null_condition(len(x)), dropped)
        return self.unet(x, t, self.unet.context(condition))


class DiffusionTask(Task):
    """v-prediction on windows of cached latents."""

    averaged = ("model",)
    criterion = "held_out/v"
    parts = {Down: (), Up: (), ResidualBlock: (), Transformer: ("keys_values",)}

    def __init__(self, config: TrainDiffusionConfig):
        self.config = config
        self.model = load_model_config(config.model)
        self.batch_size = config.batch_size
        self.demonstrate_every = config.demos.every if config.demos else 0
        self.silence = silence_latent(config.vae)
        torch.manual_seed(config.run.seed)
        model = ConditionedUNet(self.model)
        self.clap: FrozenClap = load_frozen_clap(config.clap, self.model)
        statistics = self._go_on_from(config.initial, model) if config.initial else None
        self.frozen = {"text_encoder": self.clap.text}
        self.windows = self._windows(config.latents, statistics)
        self.items = len(self.windows)
        shared = (self.windows.mean, self.windows.std)
        self.validation = self._windows((config.held_out,), shared) if config.held_out else None
        model.unet.gradient_checkpointing = config.gradient_checkpointing
        model.unet.latent_mean.copy_(self.windows.mean)
        model.unet.latent_std.copy_(self.windows.std)
        if config.lora:
            model.requires_grad_(False)
            add_lora(model.unet, config.lora)
        self.modules: dict[str, nn.Module] = {"model": model}
        self.optimizers = {"model": config.optimizer}

    def batch(self, number: int, rank: int, world: int) -> dict[str, Any]:
        seed, size = self.config.run.seed, self.batch_size
        numbers = item_numbers(number, rank, world, size)
        batch = self._batch(self.windows, numbers, seed)
        own = slice(rank * size, (rank + 1) * size)
        draws = generator(seed, number)
        return batch | {
            "eps": item_noise(seed, numbers, tuple(batch["latents"].shape[1:])),
            "t": stratified_times(world * size, draws, self.config.lowest_time)[own],
            "dropped": (torch.rand(world * size, generator=draws) < self.config.condition_dropout)[own],
        }

    def step(self, batch: dict[str, Any], step: int, update: Update) -> dict[str, Tensor]:
        errors = self._errors(batch)
        loss = errors.mean()
        update("model", loss)
        return {"loss/v": loss.detach()} | loss_by_level(errors.detach(), batch["t"])

    def evaluate(self, step: int) -> dict[str, float]:
        """v-loss on held-out windows, in all and by level, with fixed noise at times spread over those trained on."""
        if self.validation is None:
            return {}
        count = min(len(self.validation), 4 * self.batch_size)
        device = next(self.modules["model"].parameters()).device
        errors, times = [], []
        for first in range(0, count, self.batch_size):
            numbers = range(first, min(first + self.batch_size, count))
            batch = self._batch(self.validation, numbers, seed=0)
            batch["eps"] = item_noise(0, numbers, tuple(batch["latents"].shape[1:]))
            lowest = self.config.lowest_time
            batch["t"] = lowest + (1 - lowest) * (torch.arange(len(numbers)) + 0.5) / len(numbers)
            batch["dropped"] = torch.zeros(len(numbers), dtype=torch.bool)
            times.append(batch["t"])
            errors.append(self._errors({k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}))
        figures = {"loss/v": (whole := torch.cat(errors).cpu()).mean()} | loss_by_level(whole, torch.cat(times))
        return {k.replace("loss", "held_out"): float(v) for k, v in figures.items() if not v.isnan()}

    def export(self, folder: Path, modules: dict[str, nn.Module]) -> None:
        model = modules["model"]
        if self.config.lora:
            save_lora(folder, model.unet, self.config.lora, self._encoder)  # type: ignore[arg-type]
            return
        parts = self.clap.parts | {"vae": read_part(self.config.vae, "vae")}
        parts["conditioner"] = model.conditioner.state_dict()  # type: ignore[operator, union-attr]
        parts["unet"] = model.unet.state_dict()  # type: ignore[operator, union-attr]
        save_bundle(folder, self.model, parts, self.clap.text.tokenizer.to_str())

    def demonstrate(self, modules: dict[str, nn.Module]) -> list[Sound]:
        """Each prompt at each guidance scale, by the bundle that the run would export now."""
        demos = self.config.demos
        assert demos is not None
        with tempfile.TemporaryDirectory() as folder:
            self.export(exported := Path(folder) / "bundle", modules)
            device = str(next(self.modules["model"].parameters()).device)
            if self.config.lora:
                model = StableAudio.from_pretrained(self.config.initial or "", device=device, lora=exported)
            else:
                model = StableAudio.from_pretrained(exported, device=device)
            sounds = []
            for cfg in demos.cfg:
                made = model.generate(list(demos.prompts), seconds=demos.seconds, steps=demos.steps, cfg=cfg, seed=0)
                rows = enumerate(made.audio, 1)
                sounds += [Sound(f"prompt{i}-cfg{cfg:g}", audio, made.sample_rate) for i, audio in rows]
        return sounds

    def _errors(self, batch: dict[str, Any]) -> Tensor:
        """Mean squared error of v per item, (B,)."""
        x0, eps, t = batch["latents"], batch["eps"], batch["t"]
        text = self.clap.text.to(x0.device).encode(batch["captions"])
        timing = (batch["seconds_start"], batch["seconds_total"])
        v = self.modules["model"](add_noise(x0, eps, t), t, text, timing, batch["dropped"])
        errors = (v.float() - v_target(x0, eps, t)).square().mean(1)  # B, T
        if self.config.padding:
            return errors.mean(1)
        own = torch.arange(errors.shape[1], device=errors.device) < batch["frames"][:, None]
        return (errors * own).sum(1) / own.sum(1)

    def _batch(self, windows: LatentWindows, numbers: range, seed: int) -> dict[str, Any]:
        drawn = [windows.window(epoch_index(n, len(windows), seed), random.Random(f"{seed}/{n}")) for n in numbers]
        return stack(drawn)

    def _go_on_from(self, bundle: str, model: ConditionedUNet) -> tuple[Tensor, Tensor]:
        """Load the bundle's U-Net and timing embeddings; returns the statistics that it normalises latents by."""
        slow = load_model_config(bundle).vae.slow_channels
        if encoder_hash(read_part(bundle, "vae"), slow) != self._encoder:
            raise UserError(f"initial: the U-Net of {bundle} knows the latents of another VAE than {self.config.vae}")
        theirs, ours = read_part(bundle, "text_encoder"), self.clap.parts["text_encoder"]
        # A shipped bundle stores its text encoder in bfloat16.
        if theirs.keys() != ours.keys() or not all(
            v.shape == ours[k].shape and torch.allclose(v.float(), ours[k].float(), rtol=1e-2, atol=1e-3)
            for k, v in theirs.items()
        ):
            raise UserError(f"initial: {bundle} was trained with another text encoder than that of {self.config.clap}")
        load_part(bundle, "unet", model.unet)
        load_part(bundle, "conditioner", model.conditioner)
        return model.unet.latent_mean.float().clone(), model.unet.latent_std.float().clone()

    def _windows(self, folders: tuple[str, ...], statistics: tuple[Tensor, Tensor] | None) -> LatentWindows:
        seconds = self.model.hop / self.model.sample_rate
        return LatentWindows(folders, self.model.latent_frames, self.silence, self._encoder, seconds, statistics)

    @cached_property
    def _encoder(self) -> str:
        return encoder_hash(read_part(self.config.vae, "vae"), self.model.vae.slow_channels)


@torch.no_grad()
def silence_latent(bundle: str) -> Tensor:
    """Latent (C, window) that a bundle's VAE gives for digital silence."""
    model = load_model_config(bundle)
    vae = VAE(model.vae)
    load_part(bundle, "vae", vae)
    vae.prepare_for_inference()
    return vae.encode_chunked(torch.zeros(1, model.vae.audio_channels, model.window_samples)).mean[0]


def stratified_times(batch: int, draws: torch.Generator, lowest: float = 0.0) -> Tensor:
    """One uniform time in each of `batch` equal parts of [lowest, 1], in random order: lower variance, same law."""
    times = lowest + (1 - lowest) * (torch.arange(batch) + torch.rand(batch, generator=draws)) / batch
    return times[torch.randperm(batch, generator=draws)]


def loss_by_level(errors: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Mean error of the items in each quarter of the noise levels, NaN where there are none.

    All quarters are there always: processes that log together must name the same figures.
    """
    level = (t * _LEVELS).long().clamp_max(_LEVELS - 1)
    return {f"loss/v_t{i}of{_LEVELS}": errors[level == i].mean() for i in range(_LEVELS)}


def run(config: TrainDiffusionConfig) -> Path:
    """Train as configured; returns the bundle's folder."""
    return fit(config.run, DiffusionTask(config), config)


if __name__ == "__main__":
    main(__doc__, TrainDiffusionConfig, run)
