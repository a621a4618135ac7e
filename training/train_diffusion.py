"""Train a diffusion model: python -m training.train_diffusion --config configs/stable_audio/train_diffusion.yaml.

The kind of the config's `model` says of which system: training.train_spectrogram trains those on spectrograms. Here is
the latent one, whose U-Net learns from cached latents. The objective is v on the cosine schedule, x_t = cos(pi t/2) x +
sin(pi t/2) eps, with t uniform in [0, 1] and stratified over the batch (Salimans & Ho 2022, arXiv 2202.00512; Evans et
al. 2024, arXiv 2402.04825). Exports a complete bundle.
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

from stable_audio_lite.bundle import load_part, read_config, read_part, save_bundle
from stable_audio_lite.config import load_config, read_yaml
from stable_audio_lite.data.crops import epoch_index
from stable_audio_lite.data.latents import encoder_hash
from stable_audio_lite.data.windows import LatentWindows, stack
from stable_audio_lite.diffusion.schedule import add_noise, v_target
from stable_audio_lite.errors import UserError
from stable_audio_lite.lora import LoraConfig, add_lora, save_lora
from stable_audio_lite.models.conditioner import Conditioner
from stable_audio_lite.models.unet import Down, ResidualBlock, Transformer, Up
from stable_audio_lite.pipeline import StableAudio
from stable_audio_lite.systems import SPECTRAL, build_unet, build_vae, load_model_config
from training import train_spectrogram
from training.command import main_of
from training.denoising import Conditioned, DemosConfig, DenoisingTask
from training.frozen import FrozenClap, load_frozen_clap
from training.loop import fit
from training.task import OptimizerConfig, RunConfig, Sound
from training.train_spectrogram import TrainSpectrogramConfig


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
        time_shift: above 1, more of the times lie near 1, where it is decided what plays; half of them above
            time_shift / (1 + time_shift) where lowest_time is 0.
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
    time_shift: float = 1.0
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
        if not self.time_shift > 0:
            raise ValueError(f"time_shift must be above 0, got {self.time_shift}")


class DiffusionTask(DenoisingTask):
    """v-prediction on windows of cached latents."""

    objective = "v"
    criterion = "held_out/v"
    parts = {Down: (), Up: (), ResidualBlock: (), Transformer: ("keys_values",)}

    def __init__(self, config: TrainDiffusionConfig):
        self.config = config
        self.model = load_model_config(config.model)
        self.batch_size, self.seed = config.batch_size, config.run.seed
        self.condition_dropout = config.condition_dropout
        self.lowest_time, self.time_shift = config.lowest_time, config.time_shift
        self.demonstrate_every = config.demos.every if config.demos else 0
        self.silence = silence_latent(config.vae)
        torch.manual_seed(config.run.seed)
        conditioner = Conditioner(self.model.timing, self.model.context_width)
        model = Conditioned(conditioner, unet := build_unet(self.model))
        self.clap: FrozenClap = load_frozen_clap(config.clap, self.model.clap)
        statistics = self._go_on_from(config.initial, model) if config.initial else None
        self.frozen = {"text_encoder": self.clap.text}
        self.windows = self._windows(config.latents, statistics)
        self.items = len(self.windows)
        shared = (self.windows.mean, self.windows.std)
        self.validation = self._windows((config.held_out,), shared) if config.held_out else None
        self.held_out_items = len(self.validation) if self.validation else 0
        unet.gradient_checkpointing = config.gradient_checkpointing
        unet.latent_mean.copy_(self.windows.mean)
        unet.latent_std.copy_(self.windows.std)
        if config.lora:
            model.requires_grad_(False)
            add_lora(unet, config.lora)
        self.modules: dict[str, nn.Module] = {"model": model}
        self.optimizers = {"model": config.optimizer}

    def export(self, folder: Path, modules: dict[str, nn.Module]) -> None:
        model = modules["model"]
        if self.config.lora:
            save_lora(folder, model.network, self.config.lora, self._encoder)  # type: ignore[arg-type]
            return
        parts = self.clap.parts | {"vae": read_part(self.config.vae, "vae")}
        parts["conditioner"] = model.conditioner.state_dict()  # type: ignore[operator, union-attr]
        parts["unet"] = model.network.state_dict()  # type: ignore[operator, union-attr]
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
            return demos.sounds(model)

    def examples(self, numbers: range, seed: int, held_out: bool = False) -> dict[str, Any]:
        windows = self.validation if held_out else self.windows
        assert windows is not None
        drawn = [windows.window(epoch_index(n, len(windows), seed), random.Random(f"{seed}/{n}")) for n in numbers]
        return stack(drawn)

    def errors(self, batch: dict[str, Any]) -> Tensor:
        x0, eps, t = batch["x0"], batch["eps"], batch["t"]
        text = self.clap.text.to(x0.device).encode(batch["captions"])
        timing = (batch["seconds_start"], batch["seconds_total"])
        v = self.modules["model"](add_noise(x0, eps, t), t, text, timing, batch["dropped"])
        errors = (v.float() - v_target(x0, eps, t)).square().mean(1)  # B, T
        if self.config.padding:
            return errors.mean(1)
        own = torch.arange(errors.shape[1], device=errors.device) < batch["frames"][:, None]
        return (errors * own).sum(1) / own.sum(1)

    def _go_on_from(self, bundle: str, model: Conditioned) -> tuple[Tensor, Tensor]:
        """Load the bundle's U-Net and timing embeddings; returns the statistics that it normalises latents by."""
        if encoder_hash(read_part(bundle, "vae")) != self._encoder:
            raise UserError(f"initial: the U-Net of {bundle} knows the latents of another VAE than {self.config.vae}")
        self.clap.check_same(read_part(bundle, "text_encoder"), bundle, self.config.clap)
        load_part(bundle, "unet", model.network)
        load_part(bundle, "conditioner", model.conditioner)
        mean, std = (model.network.get_buffer(name).float().clone() for name in ("latent_mean", "latent_std"))
        return mean, std

    def _windows(self, folders: tuple[str, ...], statistics: tuple[Tensor, Tensor] | None) -> LatentWindows:
        seconds = self.model.hop / self.model.sample_rate
        return LatentWindows(folders, self.model.latent_frames, self.silence, self._encoder, seconds, statistics)

    @cached_property
    def _encoder(self) -> str:
        return encoder_hash(read_part(self.config.vae, "vae"))


@torch.no_grad()
def silence_latent(bundle: str) -> Tensor:
    """Latent (C, window) that a bundle's VAE gives for digital silence."""
    model = load_model_config(bundle)
    vae = build_vae(model.vae)
    load_part(bundle, "vae", vae)
    vae.prepare_for_inference()
    return vae.encode_chunked(torch.zeros(1, model.vae.audio_channels, model.window_samples)).mean[0]


def run(config: TrainDiffusionConfig) -> Path:
    """Train as configured; returns the bundle's folder."""
    return fit(config.run, DiffusionTask(config), config)


def on_spectrograms(path: str | Path) -> bool:
    """Whether the config at `path` names a model that works on spectrograms."""
    model = read_yaml(path).get("model")
    return isinstance(model, str) and Path(model).exists() and read_config(model)[1].get("kind") in SPECTRAL


def run_file(path: Path) -> Path:
    """Train the system that the config at `path` names by its model; returns the bundle's folder."""
    if on_spectrograms(path):
        return train_spectrogram.run(load_config(path, TrainSpectrogramConfig))
    return run(load_config(path, TrainDiffusionConfig))


if __name__ == "__main__":
    main_of(__doc__, run_file)
