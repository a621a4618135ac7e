"""Train a diffusion model: python -m training.train_diffusion --config configs/stable_audio/train_diffusion.yaml.

The model may be of any system: its representation sets which data are denoised, its process how they become noise and
what the network predicts. The latent system is trained on cached latents, the others directly on sound. Noise levels
are stratified over the batch (Evans et al. 2024, arXiv 2402.04825: v-prediction on the cosine schedule). The run
exports a complete bundle.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_audio_lite.bundle import load_part, part_path, read_part, save_bundle
from stable_audio_lite.config import to_dict
from stable_audio_lite.data.crops import Crops, item_numbers
from stable_audio_lite.data.manifest import read_items
from stable_audio_lite.data.unreadable import Unreadable
from stable_audio_lite.errors import UserError
from stable_audio_lite.lora import LoraConfig, add_lora, merged_state, save_lora
from stable_audio_lite.models.conditioner import Conditioner
from stable_audio_lite.models.spectrogram_transformer import SpectrogramTransformer
from stable_audio_lite.models.unet import Down, ResidualBlock, Transformer, UNet, Up
from stable_audio_lite.pipeline import StableAudio
from stable_audio_lite.representation import (
    LatentRepresentation,
    Representation,
    load_latents,
    load_representation,
)
from stable_audio_lite.systems import ComplexSTFTConfig, StableAudioConfig, load_model_config, load_system
from stable_audio_lite.weights import load_state
from training.command import main
from training.denoising import Conditioned, DemosConfig, loss_by_level, stratified_shares
from training.examples import Examples, LatentWindows, SoundExamples, latent_statistics
from training.frozen import FrozenClap, check_stage, load_frozen_clap
from training.loop import fit
from training.noise import generator, item_noise
from training.task import Demo, OptimizerConfig, RunConfig, TrainingTask, say_unread
from training.update import Update, unwrap


@dataclass(frozen=True, kw_only=True)
class TrainDiffusionConfig:
    """Training of a network, and of timing embeddings where it reads text.

    Attributes:
        model: path of the model's YAML file.
        latents: for the latent system, folders written by training.pre_encode, whose items are equally likely.
        vae: for the latent system, the bundle with the VAE that made the latents.
        data: for the other systems, a folder of audio, captioned if the model reads text; stereo is mixed to mono.
        held_out: another such folder, of latents or of audio, for the validation loss, or null.
        clap: for a model that reads text, the bundle with the text encoder, or a pretrained CLAP: transformers folder,
            hub id or LAION `.pt`.
        initial: bundle whose network and timing embeddings to continue from, or null; it has to have the same
            representation and text encoder.
        lora: for the latent system, size of a LoRA to train instead of all weights, or null; the exported bundle has it
            merged, and holds it alone in its folder `lora`.
        condition_dropout: share of items trained without their condition.
        lowest_time: smallest share of the noise levels that is trained. A generator that ends above that level
            (generation.sigma_min of the model) has no use for those below, where most of the loss is. None: all levels,
            or, with `initial`, those down to where that bundle's generator ends: it may never have seen others.
        time_shift: above 1, more of the noise levels are near 1, where the content is decided: half of them are above
            time_shift / (1 + time_shift) if lowest_time is 0.
        gain_db: for sound, the level of each crop is changed by up to this many dB either way.
        max_unreadable: for sound, share of the files that may be unreadable; others take their place, and
            `unreadable.jsonl` beside the checkpoints lists them.
        demos: sounds to make while training, or null.
        gradient_checkpointing: for the latent system, recompute activations in the backward pass: less memory, about a
            third more time.
    """

    model: str
    latents: tuple[str, ...] = ()
    vae: str | None = None
    data: str | None = None
    held_out: str | None = None
    clap: str | None = None
    initial: str | None = None
    lora: LoraConfig | None = None
    batch_size: int = 16
    condition_dropout: float = 0.1
    lowest_time: float | None = None
    time_shift: float = 1.0
    gain_db: float = 0.0
    max_unreadable: float = 0.01
    demos: DemosConfig | None = None
    gradient_checkpointing: bool = False
    run: RunConfig
    optimizer: OptimizerConfig

    def __post_init__(self) -> None:
        if bool(self.latents) == (self.data is not None):
            raise ValueError("give either latents, folders that training.pre_encode wrote, or data, a folder of audio")
        if bool(self.latents) != (self.vae is not None):
            raise ValueError("latents and vae go together: the bundle with the VAE that made them")
        if self.lora and not self.initial:
            raise ValueError("lora needs `initial`, the bundle that it changes")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if not 0 <= self.condition_dropout <= 1:
            raise ValueError(f"condition_dropout must lie in 0..1, got {self.condition_dropout}")
        if not 0 <= (self.lowest_time or 0.0) < 1:
            raise ValueError(f"lowest_time must be at least 0 and below 1, got {self.lowest_time}")
        if not self.time_shift > 0:
            raise ValueError(f"time_shift must be above 0, got {self.time_shift}")
        if self.gain_db < 0:
            raise ValueError(f"gain_db must be at least 0, got {self.gain_db}")


class DiffusionTask(TrainingTask):
    """Training of a network to predict clean data, noise or v from noisy data."""

    averaged = ("model",)

    def __init__(self, config: TrainDiffusionConfig):
        self.config = config
        check_stage("vae", config.vae, "training.train_vae")
        check_stage("clap", config.clap, "training.train_clap", hub=True)
        check_stage("initial", config.initial, "training.train_diffusion")
        self.model = load_system(config.model)
        self.process, self.batch_size = self.model.process, config.batch_size
        self.criterion = f"held_out/{self.process.objective}"
        self.lowest_time = self._lowest_time()
        self.demonstrate_every = config.demos.every if config.demos else 0
        self.clap = self._load_clap()
        self.representation = self._load_representation()
        torch.manual_seed(config.run.seed)
        model: nn.Module = self.model.network()
        if self.clap is not None:
            assert not isinstance(self.model, ComplexSTFTConfig) and self.model.context_width is not None
            rate = self.representation.sample_rate / self.representation.hop
            model = Conditioned(Conditioner(self.model.timing, self.model.context_width), model, rate)
            self.frozen = {"text_encoder": self.clap.text}
        if config.initial:
            self._go_on_from(config.initial, model)
        self.examples, self.validation = self._examples()
        self.items = len(self.examples)
        if self.clap is not None:
            say_unread(self.clap.text.tokenizer, self.examples.captions, self.clap.text.max_tokens)
        self._prepare(network_of(model))
        if config.lora:
            model.requires_grad_(False)
            add_lora(network_of(model), config.lora)
        self.modules: dict[str, nn.Module] = {"model": model}
        self.optimizers = {"model": config.optimizer}

    def fingerprint(self) -> dict[str, Any]:
        model = to_dict(self.model)
        facts: dict[str, Any] = {"model": {k: v for k, v in model.items() if k not in ("format", "generation", "vae")}}
        if isinstance(self.representation, LatentRepresentation):
            facts["vae"] = f"encoder {self.representation.hash[:12]}"
        if self.clap is not None:
            facts["clap"] = f"text encoder {self.clap.hash}"
        return facts | {"lora": to_dict(self.config.lora) if self.config.lora else None}

    def take(self, kept: dict[str, Any]) -> None:
        """Normalise latents by the statistics that the U-Net has had from the start."""
        network = network_of(unwrap(self.modules["model"]))
        if isinstance(network, UNet) and isinstance(latents := self.representation, LatentRepresentation):
            latents.mean, latents.std = (v.cpu()[:, None] for v in (network.latent_mean, network.latent_std))

    def batch(self, number: int, rank: int, world: int) -> dict[str, Any]:
        seed, size = self.config.run.seed, self.batch_size
        numbers = item_numbers(number, rank, world, size)
        batch = self.examples.batch(number, rank, world, size, seed)
        own, draws = slice(rank * size, (rank + 1) * size), generator(seed, number)
        shares = stratified_shares(world * size, draws, self.lowest_time, self.config.time_shift)
        return batch | {
            "eps": item_noise(seed, numbers, tuple(batch["x0"].shape[1:])),
            "shares": shares[own],
            "dropped": (torch.rand(world * size, generator=draws) < self.config.condition_dropout)[own],
        }

    def step(self, batch: dict[str, Any], step: int, update: Update) -> dict[str, Tensor]:
        (errors, pulse), objective = self.errors(batch), self.process.objective
        loss = errors.mean()
        metrics = {f"loss/{objective}": loss.detach()} | loss_by_level(errors.detach(), batch["shares"], objective)
        if pulse is not None:
            loss = loss + pulse
            metrics["loss/pulse"] = pulse.detach()
        update("model", loss)
        return metrics

    def errors(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Compute the mean squared error (B,) of predictions for data x0, noise eps and noise levels `shares`.

        The second result is the error of what a network with a pulse expects of the data, apart from its mean over T.
        """
        x0, eps, t = batch["x0"], batch["eps"], self.process.at(batch["shares"])
        x_t, model = self.process.add_noise(x0, eps, t), self.modules["model"]
        expected = None
        if self.clap is None:
            prediction = model(x_t, t)
        else:
            text = self.clap.text.to(x0.device).encode(batch["captions"])
            timing = batch["seconds_start"], batch["seconds_total"]
            prediction, expected = model(x_t, t, text, timing, batch["dropped"])
        errors = (prediction.float() - self.process.target(x0, eps, t)).square().flatten(1).mean(1)
        if expected is None:
            return errors, None
        return errors, (expected.float() - (x0 - x0.mean(-1, keepdim=True))).square().mean()

    def evaluate(self, step: int) -> dict[str, float]:
        """Compute the held-out loss, in total and by level, with fixed noise at levels spread over those trained on."""
        if self.validation is None:
            return {}
        count = min(len(self.validation), 4 * self.batch_size)
        device = next(self.modules["model"].parameters()).device
        errors, shares = [], []
        for first in range(0, count, self.batch_size):
            numbers = range(first, min(first + self.batch_size, count))
            batch = self.validation.draw(numbers, 0)
            batch["eps"] = item_noise(0, numbers, tuple(batch["x0"].shape[1:]))
            lowest = self.lowest_time
            batch["shares"] = lowest + (1 - lowest) * (torch.arange(len(numbers)) + 0.5) / len(numbers)
            batch["dropped"] = torch.zeros(len(numbers), dtype=torch.bool)
            shares.append(batch["shares"])
            errors.append(self.errors({k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})[0])
        whole, objective = torch.cat(errors).cpu(), self.process.objective
        figures = {f"loss/{objective}": whole.mean()} | loss_by_level(whole, torch.cat(shares), objective)
        return {k.replace("loss", "held_out"): float(v) for k, v in figures.items() if not v.isnan()}

    def export(self, folder: Path, modules: dict[str, nn.Module]) -> None:
        model, lora = modules["model"], self.config.lora
        network = network_of(model)
        parts: dict[str, Mapping[str, Tensor]] = {
            self.model.part: merged_state(network, lora) if lora else network.state_dict()
        }
        if self.config.vae:
            parts["vae"] = read_part(self.config.vae, "vae")
        if self.clap is None:
            save_bundle(folder, self.model, parts)
            return
        assert isinstance(model, Conditioned)
        parts |= {**self.clap.parts, "conditioner": model.conditioner.state_dict()}
        save_bundle(folder, self.model, parts, self.clap.text.tokenizer.to_str())
        if lora:
            save_lora(folder / "lora", network, lora, self.representation.hash)

    def demonstrate(self, modules: dict[str, nn.Module]) -> list[Demo]:
        """Generate each prompt at each guidance scale, with the bundle that the run would export now."""
        assert self.config.demos is not None
        with tempfile.TemporaryDirectory() as folder:
            self.export(exported := Path(folder) / "bundle", modules)
            device = str(next(self.modules["model"].parameters()).device)
            return self.config.demos.sounds(StableAudio.from_pretrained(exported, device=device))

    def _lowest_time(self) -> float:
        config = self.config
        if config.lowest_time is not None or not config.initial:
            return config.lowest_time or 0.0
        theirs = load_system(config.initial)
        shares = torch.linspace(0, 1, 10_001)
        alpha, sigma = theirs.process.alpha_sigma(theirs.process.at(shares))
        lowest, end = float(shares[sigma >= theirs.generation.sigma_min * alpha][0]), theirs.generation.sigma_min
        self.notes = (f"lowest_time {lowest:.3g}, as {config.initial} generates down to sigma_min {end:g}",)
        return lowest

    def _load_clap(self) -> FrozenClap | None:
        name = self.config.model
        if self.model.clap is None:
            if self.config.clap:
                raise UserError(f"clap: {name} reads no text; leave it out, or give the model a clap")
            return None
        if not self.config.clap:
            raise UserError(f"clap: {name} reads text; name the CLAP whose text encoder it is to use")
        return load_frozen_clap(self.config.clap, self.model.clap)

    def _load_representation(self) -> Representation:
        config, latent = self.config, isinstance(self.model, StableAudioConfig)
        if latent != bool(config.latents):
            wanted = "latents and vae" if latent else "data"
            raise UserError(f"{config.model}: is of kind {self.model.kind}; give {wanted} to train it on")
        if config.lora and not latent:
            raise UserError(f"lora: changes models of kind stable_audio, {config.model} is {self.model.kind}")
        if not isinstance(self.model, StableAudioConfig):
            return load_representation("", self.model)
        if config.initial:
            return self._latents_of(config.initial)
        latents = load_latents(config.vae or "", load_model_config(config.vae or ""))
        return self._with_statistics(latents, *latent_statistics(config.latents, latents.hash))

    def _latents_of(self, initial: str) -> LatentRepresentation:
        """Load the latents, normalised as for the U-Net of the bundle `initial`."""
        ours = load_latents(self.config.vae or "", load_model_config(self.config.vae or ""))
        theirs = load_latents(initial, load_model_config(initial))
        if theirs.hash != ours.hash:
            raise UserError(f"initial: the U-Net of {initial} knows the latents of another VAE than {self.config.vae}")
        return self._with_statistics(ours, theirs.mean[:, 0], theirs.std[:, 0])

    def _with_statistics(self, latents: LatentRepresentation, mean: Tensor, std: Tensor) -> LatentRepresentation:
        assert isinstance(self.model, StableAudioConfig)
        return LatentRepresentation(latents.vae, self.model, latents.hash, mean, std)

    def _examples(self) -> tuple[Examples, Examples | None]:
        """Load the examples to train on, and the held-out ones."""
        config, held_out = self.config, self.config.held_out
        if isinstance(latents := self.representation, LatentRepresentation):
            windows = LatentWindows(config.latents, latents, self.model.generation.windows)
            return windows, LatentWindows((held_out,), latents) if held_out else None
        crops = self._crops(config.data or "", config.run.seed, config.gain_db, config.max_unreadable)
        return crops, self._crops(held_out, 0, 0.0, 0.0) if held_out else None

    def _crops(self, folder: str, seed: int, gain_db: float, max_unreadable: float) -> SoundExamples:
        items, captioned = read_items(folder), self.clap is not None
        if captioned and (mute := [item for item in items if not item.captions]):
            raise UserError(
                f"{mute[0].path}: has no caption, and {self.config.model} reads text; caption it or leave it out"
            )
        unreadable = Unreadable(len(items), max_unreadable, self.config.run.output if max_unreadable else None)
        rate, samples = self.representation.sample_rate, self.representation.window_samples
        crops = Crops(items, rate, samples, seed, gain_db=gain_db, unreadable=unreadable)
        return SoundExamples(crops, self.representation, captioned)

    def _go_on_from(self, initial: str, model: nn.Module) -> None:
        """Load the network and timing embeddings of a bundle."""
        theirs = load_system(initial)
        if theirs.kind != self.model.kind or load_representation(initial, theirs).hash != self.representation.hash:
            raise UserError(f"initial: {initial} is of kind {theirs.kind} with other data than {self.config.model}")
        if isinstance(model, Conditioned):
            assert self.clap is not None
            self.clap.check_same(read_part(initial, "text_encoder"), initial, self.config.clap or "")
            load_part(initial, "conditioner", model.conditioner)
        state, own = read_part(initial, self.model.part), network_of(model)
        if getattr(own, "guidance", None) is None:  # without the input it is the same network, guided by two forwards
            state = {key: value for key, value in state.items() if not key.startswith("guidance.")}
        load_state(own, state, str(part_path(initial, self.model.part)), "the config")

    def _prepare(self, network: nn.Module) -> None:
        """Give a U-Net of latents the statistics that it stores, and set how it is sharded and checkpointed.

        An input for the guidance scale, which is learned from a teacher alone (training.distill), stays as it is.
        """
        if isinstance(network, UNet | SpectrogramTransformer) and network.guidance is not None:
            network.guidance.requires_grad_(False)
        if isinstance(network, UNet) and isinstance(latents := self.representation, LatentRepresentation):
            network.gradient_checkpointing = self.config.gradient_checkpointing
            network.latent_mean.copy_(latents.mean[:, 0])
            network.latent_std.copy_(latents.std[:, 0])
            self.parts = {Down: (), Up: (), ResidualBlock: (), Transformer: ("keys_values",)}


def network_of(model: nn.Module) -> nn.Module:
    """Unwrap the network from its timing embeddings."""
    return model.network if isinstance(model, Conditioned) else model


def run(config: TrainDiffusionConfig) -> Path:
    """Train as configured; returns the bundle's folder."""
    return fit(config.run, DiffusionTask(config), config)


if __name__ == "__main__":
    main(__doc__, TrainDiffusionConfig, run)
