"""Diffusion on spectrograms, of music files as they are; `python -m training.train_diffusion` runs it.

The forward process is DDPM's (Ho et al. 2020, arXiv 2006.11239), with steps uniform and stratified over the batch. The
spectrogram U-Net predicts the noise, the transformer the clean spectrogram. Exports a bundle.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_audio_lite.audio.spectrogram import Spectrogram
from stable_audio_lite.bundle import load_part, read_part, save_bundle
from stable_audio_lite.data.crops import Crops
from stable_audio_lite.data.manifest import read_items
from stable_audio_lite.data.unreadable import Unreadable
from stable_audio_lite.diffusion.schedule import DiscreteSchedule
from stable_audio_lite.errors import UserError
from stable_audio_lite.models.conditioner import Conditioner
from stable_audio_lite.spectral import SpectralAudio
from stable_audio_lite.systems import ComplexSTFTConfig, SpectrogramDiffusionConfig, load_spectral
from training.denoising import Conditioned, DemosConfig, DenoisingTask
from training.frozen import FrozenClap, load_frozen_clap
from training.loop import fit
from training.task import OptimizerConfig, RunConfig, Sound


@dataclass(frozen=True, kw_only=True)
class TrainSpectrogramConfig:
    """Training of a network on spectrograms.

    Attributes:
        model: path of the model's YAML file.
        data: folder of audio to train on, captioned if the model reads text; stereo files are mixed to mono.
        held_out: another such folder for the validation loss, or null.
        clap: for a model that reads text, the bundle with the text encoder, or a pretrained CLAP: transformers folder,
            hub id or LAION `.pt`.
        initial: bundle whose network to go on from, or null.
        condition_dropout: share of items trained without their condition.
        gain_db: the level of each crop is changed by up to this many dB either way.
        demos: sounds to make while training, or null.
        max_unreadable: share of the data's files that may be unreadable; others take their place, and
            `unreadable.jsonl` beside the checkpoints lists them.
    """

    model: str
    data: str
    held_out: str | None = None
    clap: str | None = None
    initial: str | None = None
    batch_size: int = 16
    condition_dropout: float = 0.1
    gain_db: float = 0.0
    max_unreadable: float = 0.01
    demos: DemosConfig | None = None
    run: RunConfig
    optimizer: OptimizerConfig

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if not 0 <= self.condition_dropout <= 1:
            raise ValueError(f"condition_dropout must lie in 0..1, got {self.condition_dropout}")
        if self.gain_db < 0:
            raise ValueError(f"gain_db must be at least 0, got {self.gain_db}")


class SpectrogramTask(DenoisingTask):
    """Prediction of noise or of clean spectrograms from noisy ones."""

    def __init__(self, config: TrainSpectrogramConfig):
        self.config = config
        self.model = load_spectral(config.model)
        self.demonstrate_every = config.demos.every if config.demos else 0
        self.objective = self.model.objective
        self.criterion = f"held_out/{self.objective}"
        self.batch_size, self.seed = config.batch_size, config.run.seed
        self.condition_dropout = config.condition_dropout
        self.spectrogram = Spectrogram(self.model.spectrogram)
        self.schedule = DiscreteSchedule(self.model.schedule)
        self.crops = self._crops(config.data, config.run.seed, config.gain_db, config.max_unreadable)
        self.items = len(self.crops.items)
        self.validation = self._crops(config.held_out, 0, 0.0, 0.0) if config.held_out else None
        self.held_out_items = len(self.validation.items) if self.validation else 0
        torch.manual_seed(config.run.seed)
        model = network = self.model.network()
        self.clap = self._load_clap()
        if self.clap is not None:
            assert isinstance(self.model, SpectrogramDiffusionConfig) and self.model.context_width is not None
            model = Conditioned(Conditioner(self.model.timing, self.model.context_width), network)
            self.frozen = {"text_encoder": self.clap.text}
        if config.initial:
            self._go_on_from(config.initial, model)
        self.modules: dict[str, nn.Module] = {"model": model}
        self.optimizers = {"model": config.optimizer}

    def examples(self, numbers: range, seed: int, held_out: bool = False) -> dict[str, Any]:
        source = self.validation if held_out else self.crops
        assert source is not None
        crops = [source.crop(n) for n in numbers]
        examples: dict[str, Any] = {
            "x0": self.spectrogram.encode(torch.stack([crop.audio.mean(0) for crop in crops])),
            "seconds_start": torch.tensor([crop.seconds_start for crop in crops]),
            "seconds_total": torch.tensor([crop.seconds_total for crop in crops]),
        }
        if self.clap is not None:
            pairs = zip(numbers, crops, strict=True)
            examples["captions"] = [random.Random(f"{seed}/{n}/caption").choice(crop.captions) for n, crop in pairs]
        return examples

    def errors(self, batch: dict[str, Any]) -> Tensor:
        x0, eps = batch["x0"], batch["eps"]
        steps = (batch["t"] * self.schedule.steps).long().clamp_max(self.schedule.steps - 1)
        x_t = self.schedule.add_noise(x0, eps, steps)
        if self.clap is None:
            prediction = self.modules["model"](x_t, steps)
        else:
            text = self.clap.text.to(x0.device).encode(batch["captions"])
            timing = (batch["seconds_start"], batch["seconds_total"])
            prediction = self.modules["model"](x_t, steps, text, timing, batch["dropped"])
        target = eps if self.objective == "eps" else x0
        return (prediction.float() - target).square().mean((1, 2, 3))

    def export(self, folder: Path, modules: dict[str, nn.Module]) -> None:
        model = modules["model"]
        if self.clap is None:
            save_bundle(folder, self.model, {self.model.part: model.state_dict()})
            return
        assert isinstance(model, Conditioned)
        parts = self.clap.parts | {self.model.part: model.network.state_dict()}
        parts["conditioner"] = model.conditioner.state_dict()
        save_bundle(folder, self.model, parts, self.clap.text.tokenizer.to_str())

    def demonstrate(self, modules: dict[str, nn.Module]) -> list[Sound]:
        """Sounds of the bundle that the run would export now."""
        assert self.config.demos is not None
        with tempfile.TemporaryDirectory() as folder:
            self.export(exported := Path(folder) / "bundle", modules)
            device = str(next(self.modules["model"].parameters()).device)
            return self.config.demos.sounds(SpectralAudio.from_pretrained(exported, device=device))

    def _crops(self, folder: str, seed: int, gain_db: float, max_unreadable: float) -> Crops:
        items, shape = read_items(folder), self.model.spectrogram
        if self.model.clap is not None and (mute := [item for item in items if not item.captions]):
            raise UserError(
                f"{mute[0].path}: has no caption, and {self.config.model} reads text; caption it or leave it out"
            )
        unreadable = Unreadable(len(items), max_unreadable, self.config.run.output if max_unreadable else None)
        return Crops(items, shape.sample_rate, shape.samples, seed, gain_db=gain_db, unreadable=unreadable)

    def _load_clap(self) -> FrozenClap | None:
        if isinstance(self.model, ComplexSTFTConfig) or self.model.clap is None:
            if self.config.clap:
                raise UserError(f"clap: {self.config.model} reads no text; leave it out, or give the model a clap")
            return None
        if not self.config.clap:
            raise UserError(f"clap: {self.config.model} reads text; name the CLAP whose text encoder it is to use")
        return load_frozen_clap(self.config.clap, self.model.clap)

    def _go_on_from(self, bundle: str, model: nn.Module) -> None:
        theirs, ours = load_spectral(bundle), self.model
        if (theirs.kind, theirs.spectrogram) != (ours.kind, ours.spectrogram):
            raise UserError(f"initial: {bundle} is of kind {theirs.kind} with {theirs.spectrogram}, another system")
        if isinstance(model, Conditioned):
            assert self.clap is not None
            self.clap.check_same(read_part(bundle, "text_encoder"), bundle, self.config.clap or "")
            load_part(bundle, "conditioner", model.conditioner)
        load_part(bundle, ours.part, model.network if isinstance(model, Conditioned) else model)


def run(config: TrainSpectrogramConfig) -> Path:
    """Train as configured; returns the bundle's folder."""
    return fit(config.run, SpectrogramTask(config), config)
