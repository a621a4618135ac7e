"""Train a VAE: python -m training.train_vae --config configs/stable_audio/train_vae.yaml.

With `freeze_encoder` and `initial` it is the second phase: the decoder is trained further while latents stay the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_audio_lite.bundle import load_part, save_bundle
from stable_audio_lite.config import to_dict
from stable_audio_lite.data.crops import Crops, item_numbers
from stable_audio_lite.data.manifest import read_items
from stable_audio_lite.data.unreadable import Unreadable
from stable_audio_lite.errors import UserError
from stable_audio_lite.models.dac import read_dac, state_from_dac
from stable_audio_lite.models.discriminator import Discriminator, DiscriminatorConfig
from stable_audio_lite.models.spectrogram_vae import SpectrogramVAE
from stable_audio_lite.models.vae import VAE, Posterior
from stable_audio_lite.models.waveform_vae import WaveformVAE
from stable_audio_lite.systems import StableAudioConfig, build_vae, load_model_config
from training.checkpoint import Resumable, warm_start
from training.command import main
from training.frozen import check_stage
from training.loop import fit
from training.losses import (
    MultiResolutionSTFTLoss,
    SpectralFeatureLoss,
    WaveformLoss,
    feature_matching,
    hinge_discriminator,
    hinge_generator,
)
from training.noise import item_noise
from training.task import OptimizerConfig, RunConfig, TrainingTask
from training.update import Update

_CALIBRATION = 64  # crops by whose statistics features are normalised
_SIGNALS = {"stft/sum": 1.0, "stft/difference": 1.0, "stft/left": 0.5, "stft/right": 0.5}
_COMMON = {"kl/latent": 1e-4, "adversarial/generator": 0.1, "adversarial/features": 5.0}
WEIGHTS = _SIGNALS | _COMMON
"""The weights of the paper's losses."""
LOSSES = {
    "waveform": (*WEIGHTS, "stft/mel", "waveform/relative"),
    "spectrogram": ("features/log", "features/root", "features/stereo", "features/spread", *_COMMON),
}
"""The losses of each kind of VAE."""


@dataclass(frozen=True, kw_only=True)
class TrainVAEConfig:
    """Training of the VAE.

    Attributes:
        model: path of the model's YAML file.
        data: folder of audio to train on.
        held_out: folder of audio to evaluate on, or null.
        crop_frames: length of a crop in latent frames.
        held_out_crops: number of crops to evaluate on.
        endings: share of the crops that cross the end of their item: a decoder has to know silence, with which the
            U-Net's windows end.
        gain_db: the level of each crop is changed by up to this many dB either way.
        panned: share of the crops whose stereo image is changed: mixed to mono and placed anywhere, or sides exchanged.
        max_unreadable: share of the data's files that may be unreadable; they are skipped and listed in
            `unreadable.jsonl` beside the checkpoints.
        weights: of each loss in the generator's sum, by name; losses without a weight are left out.
        stft_windows: window lengths of the reconstruction loss in samples.
        stft_floor: smallest magnitude that counts in its logarithm, relative to a full-scale sine's peak.
        discriminator: shape of the discriminator, or null for none.
        discriminator_start: first step in which it is trained and used; its learning rate is warmed up from there.
        initial: bundle whose VAE to start from, or a `weights.pth` of descript-audio-codec, or null.
        continues: `run.output` of an earlier run whose newest checkpoint gives the discriminator's weights and both
            optimizers' state, or null to start these anew; needs `initial`.
        freeze_encoder: keep encoder and bottleneck as they are.
    """

    model: str
    data: str
    held_out: str | None = None
    held_out_crops: int = 16
    crop_frames: int = 64
    endings: float = 0.0
    gain_db: float = 0.0
    panned: float = 0.0
    max_unreadable: float = 0.01
    batch_size: int = 8
    run: RunConfig
    optimizer: OptimizerConfig
    weights: dict[str, float] = field(default_factory=WEIGHTS.copy)
    stft_windows: tuple[int, ...] = (2048, 1024, 512, 256, 128, 64, 32)
    stft_floor: float = 1e-4
    a_weighting: bool = True
    discriminator: DiscriminatorConfig | None = None
    discriminator_optimizer: OptimizerConfig | None = None
    discriminator_start: int = 0
    initial: str | None = None
    continues: str | None = None
    freeze_encoder: bool = False

    def __post_init__(self) -> None:
        if self.freeze_encoder and not self.initial:
            raise ValueError("freeze_encoder needs initial: the bundle whose encoder is finished")
        if self.continues and not self.initial:
            raise ValueError("continues needs initial: the bundle whose VAE goes on")
        if (self.discriminator is None) != (self.discriminator_optimizer is None):
            raise ValueError("discriminator and discriminator_optimizer go together: give both or neither")
        if min(self.crop_frames, self.batch_size, self.held_out_crops) < 1:
            raise ValueError("crop_frames, batch_size and held_out_crops must be at least 1")
        if not self.stft_windows or min(self.stft_windows) < 4:
            raise ValueError(f"stft_windows must be one length of at least 4 or several, got {self.stft_windows}")
        for name in ("endings", "panned"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        if self.stft_floor <= 0 or self.gain_db < 0:
            raise ValueError("stft_floor must be above 0, gain_db at least 0")


class VAETask(TrainingTask):
    """Training of encoder and decoder, or of the decoder alone."""

    averaged = ("vae",)

    def __init__(self, config: TrainVAEConfig):
        self.config = config
        check_stage("initial", config.initial, "training.train_vae")
        self.model = load_model_config(config.model)
        self.batch_size = config.batch_size
        kind = self.model.vae.kind
        if unknown := next((name for name in config.weights if name not in LOSSES[kind]), None):
            raise UserError(f"weights: a {kind} VAE has no loss '{unknown}'; its losses are {', '.join(LOSSES[kind])}")
        self.criterion = "held_out/stft/sum" if kind == "waveform" else "held_out/features/log"
        samples = config.crop_frames * self.model.vae.hop
        self._check_windows(samples)
        items = read_items(config.data)
        self.items = len(items)
        self.unreadable = Unreadable(len(items), config.max_unreadable, config.run.output)
        self.crops = Crops(
            items,
            self.model.sample_rate,
            samples,
            config.run.seed,
            endings=config.endings,
            gain_db=config.gain_db,
            panned=config.panned,
            unreadable=self.unreadable,
        )
        self.validation = self._validation(samples)
        torch.manual_seed(config.run.seed)
        vae = self.vae = build_vae(self.model.vae)
        if config.initial:
            _start_from(config.initial, vae, self.model, config.freeze_encoder)
        elif isinstance(vae, SpectrogramVAE):
            vae.calibrate(self.crops.batch(0, _CALIBRATION))
        vae.encoder.requires_grad_(not config.freeze_encoder)
        self.modules: dict[str, nn.Module] = {"vae": vae}
        self.optimizers = {"vae": config.optimizer}
        if config.discriminator and config.discriminator_optimizer:
            self.modules["discriminator"] = Discriminator(config.discriminator)
            self.optimizers["discriminator"] = config.discriminator_optimizer
        self.reconstruction = self._reconstruction(vae)

    def fingerprint(self) -> dict[str, Any]:
        judge = self.config.discriminator
        return {
            "model": {"sample_rate": self.model.sample_rate, "vae": to_dict(self.model.vae)},
            "discriminator": to_dict(judge) if judge else None,
            "freeze_encoder": self.config.freeze_encoder,
        }

    def begin(self, state: Resumable) -> None:
        if self.config.continues:
            warm_start(Path(self.config.continues), state, [name for name in state.modules if name != "vae"])

    def batch(self, number: int, rank: int, world: int) -> dict[str, Tensor]:
        numbers = item_numbers(number, rank, world, self.batch_size)
        shape = (self.model.vae.latent_channels, self.config.crop_frames)
        audio = self.crops.batch(number, self.batch_size, rank, world)
        return {"audio": audio, "noise": item_noise(self.config.run.seed, numbers, shape)}

    def rate(self, name: str, step: int, steps: int) -> float:
        first = self.config.discriminator_start if name == "discriminator" else 0
        return super().rate(name, step - first, steps - first)

    def step(self, batch: dict[str, Tensor], step: int, update: Update) -> dict[str, Tensor]:
        audio, weights = batch["audio"], self.config.weights
        output, mean, std = self.modules["vae"](audio, batch["noise"])
        # Losses of the output are differentiated up to it first, so that the discriminator runs once for both updates.
        leaf = output.detach().float().requires_grad_()
        target = self.vae.target(audio)
        losses = self.reconstruction(leaf, target)
        judged = "discriminator" in self.modules and step >= self.config.discriminator_start
        if judged:
            real, fake = (self.modules["discriminator"](sound) for sound in (target, leaf))
            losses["adversarial/generator"] = hinge_generator(fake)
            losses["adversarial/features"] = feature_matching(real, fake)
        total = torch.stack([weights[name] * loss for name, loss in losses.items() if name in weights]).sum()
        loss = total.detach() + ((output.float() - leaf.detach()) * update.gradient(total, leaf)).sum()
        if not self.config.freeze_encoder:
            losses["kl/latent"] = Posterior(mean, std).kl()
            loss = loss + weights.get("kl/latent", 0.0) * losses["kl/latent"]
        update("vae", loss)
        if judged:
            update("discriminator", hinge := hinge_discriminator(real, fake))
            losses["discriminator/hinge"] = hinge
        figures = {"data/unreadable": torch.tensor(len(self.unreadable)), "latent/std": mean.std()}
        return {"loss/total": loss} | losses | figures

    def evaluate(self, step: int) -> dict[str, float]:
        """Compute the reconstruction losses of the posterior mean on fixed held-out crops."""
        if self.validation is None:
            return {}
        device = next(self.vae.parameters()).device
        totals: dict[str, float] = {}
        for crops in self.validation.split(self.batch_size):
            audio = crops.to(device)
            noise = torch.zeros(len(audio), self.model.vae.latent_channels, self.config.crop_frames, device=device)
            output, mean, std = self.modules["vae"](audio, noise)
            figures = self.reconstruction(output.float(), self.vae.target(audio))
            for name, value in (figures | {"kl/latent": Posterior(mean, std).kl()}).items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(audio) / len(self.validation)
        return {f"held_out/{name}": value for name, value in totals.items()}

    def export(self, folder: Path, modules: dict[str, nn.Module]) -> None:
        save_bundle(folder, self.model, {"vae": modules["vae"].state_dict()})

    def _check_windows(self, samples: int) -> None:
        judge = self.config.discriminator
        windows = (*self.config.stft_windows, *(judge.windows if judge else ()))
        if self.model.vae.kind == "waveform" and max(windows) // 2 >= samples:
            raise UserError(
                f"crop_frames: {samples} samples are too few for a window of {max(windows)}; take longer crops"
            )

    def _validation(self, samples: int) -> Tensor | None:
        if self.config.held_out is None:
            return None
        items = read_items(self.config.held_out)
        crops = Crops(items, self.model.sample_rate, samples, seed=0, unreadable=Unreadable(len(items), 1.0))
        return crops.batch(0, self.config.held_out_crops)

    def _reconstruction(self, vae: VAE) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
        """Make a function that computes distances of outputs to targets by name, in float32."""
        config, rate = self.config, self.model.sample_rate
        if isinstance(vae, SpectrogramVAE):
            distances: list[nn.Module] = [SpectralFeatureLoss(vae.encoder)]
        else:
            mel = "stft/mel" in config.weights
            distances = [
                MultiResolutionSTFTLoss(rate, config.stft_windows, config.a_weighting, config.stft_floor, mel=mel)
            ]
            if "waveform/relative" in config.weights:
                distances.append(WaveformLoss(rate))

        def measure(output: Tensor, target: Tensor) -> dict[str, Tensor]:
            with torch.autocast(output.device.type, enabled=False):
                return {k: v for d in distances for k, v in d.to(output.device)(output, target).items()}

        return measure


def _start_from(source: str, vae: VAE, model: StableAudioConfig, keep_latents: bool) -> None:
    """Load a bundle's VAE, or a DAC's; `keep_latents` refuses a bundle that is configured to make others."""
    if Path(source).suffix in (".pth", ".pt"):
        if not isinstance(vae, WaveformVAE):
            raise UserError(f"initial: {source} is for a VAE of kind waveform, the model's is {model.vae.kind}")
        vae.load_state_dict(state_from_dac(read_dac(source).state, vae))
        return
    theirs = load_model_config(source)
    pairs = {f"vae.{f.name}": [getattr(c.vae, f.name, None) for c in (theirs, model)] for f in fields(model.vae)}
    pairs["sample_rate"] = [theirs.sample_rate, model.sample_rate]
    if keep_latents and (other := [name for name, (a, b) in pairs.items() if a != b]):
        name = other[0]
        raise UserError(f"freeze_encoder: {source} has {name} {pairs[name][0]}, the model has {pairs[name][1]}")
    load_part(source, "vae", vae)


def run(config: TrainVAEConfig) -> Path:
    """Train as configured; returns the bundle's folder."""
    return fit(config.run, VAETask(config), config)


if __name__ == "__main__":
    main(__doc__, TrainVAEConfig, run)
