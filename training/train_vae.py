"""Train the VAE: python -m training.train_vae --config configs/stable_audio/train_vae.yaml.

With `freeze_encoder` and `initial` it is the second phase: the decoder learns on while latents stay what they were.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from stable_audio_lite.bundle import StableAudioConfig, load_model_config, load_part, save_bundle
from stable_audio_lite.data.crops import Crops, LatentCrops, item_numbers
from stable_audio_lite.data.latents import encoder_hash
from stable_audio_lite.data.manifest import read_items
from stable_audio_lite.data.unreadable import Unreadable
from stable_audio_lite.errors import UserError
from stable_audio_lite.models.dac import read_dac, state_from_dac
from stable_audio_lite.models.discriminator import Discriminator, DiscriminatorConfig
from stable_audio_lite.models.vae import VAE, Posterior
from training.balancer import Balancer
from training.checkpoint import Resumable, take_over
from training.command import main
from training.loop import fit
from training.losses import (
    MultiResolutionSTFTLoss,
    WaveformLoss,
    feature_matching,
    hinge_discriminator,
    hinge_generator,
)
from training.noise import item_noise
from training.task import OptimizerConfig, RunConfig, Task
from training.update import Update

_ON_OUTPUT = (
    *("waveform/relative", "stft/sum", "stft/difference", "stft/left", "stft/right", "stft/mel", "stft/levels"),
    *("adversarial/generator", "adversarial/features"),
)
"""Losses of the output, which the balancer weighs; the others are of the latents."""


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Weight of each loss term in the generator's sum; 0 leaves out waveform, mel and levels, which the paper lacks."""

    waveform: float = 0.0
    mel: float = 0.0
    levels: float = 0.0
    sum: float = 1.0
    difference: float = 1.0
    left: float = 0.5
    right: float = 0.5
    kl: float = 1e-4
    adversarial: float = 0.1
    features: float = 5.0


@dataclass(frozen=True, kw_only=True)
class TrainVAEConfig:
    """Training of the VAE.

    Attributes:
        model: path of the model's YAML file.
        data: folder of audio to train on.
        held_out: folder of audio to evaluate on, or null.
        crop_frames: length of a crop in latent frames.
        held_out_crops: number of crops to evaluate on.
        endings: share of the crops that lie across the end of their item: a decoder has to know silence, with which
            the U-Net's windows end.
        gain_db: the level of each crop is changed by up to this many dB either way.
        inverted: share of the crops whose polarity is inverted.
        max_unreadable: share of the data's files that may be unreadable; they are skipped and listed in
            `unreadable.jsonl` beside the checkpoints.
        noise: how much of the posterior's noise the decoder hears; below 1 it learns to be exact, above to be robust,
            which the second phase may want.
        stft_windows: window lengths of the reconstruction loss in samples.
        stft_floor: smallest magnitude that its logarithm hears, relative to a full-scale sine's peak.
        balance: norm per item of the gradient at the output, of which each loss gets a share by its weight (EnCodec's
            balancer); 0 adds the weighted losses up.
        discriminator: shape of the discriminator, or null for none.
        discriminator_start: step from which it learns; its learning rate is warmed up from there.
        adversarial_start: step from which it is heard, or null for the step from which it learns.
        initial: bundle whose VAE to start from, or a `weights.pth` of descript-audio-codec, or null.
        continues: `run.output` of an earlier run whose newest checkpoint gives the discriminator's weights and both
            optimizers' state, or null to start these anew; with `initial`.
        freeze_encoder: keep encoder and bottleneck as they are.
        latents: folder of latents of `data` that the decoder hears in place of the encoder's and without `noise`, as
            training.regenerate writes them, or null; with `freeze_encoder` and `initial`.
    """

    model: str
    data: str
    held_out: str | None = None
    held_out_crops: int = 16
    crop_frames: int = 64
    endings: float = 0.0
    noise: float = 1.0
    gain_db: float = 0.0
    inverted: float = 0.0
    max_unreadable: float = 0.01
    batch_size: int = 8
    run: RunConfig
    optimizer: OptimizerConfig
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    stft_windows: tuple[int, ...] = (2048, 1024, 512, 256, 128, 64, 32)
    stft_floor: float = 1e-4
    a_weighting: bool = True
    balance: float = 0.0
    discriminator: DiscriminatorConfig | None = None
    discriminator_optimizer: OptimizerConfig | None = None
    discriminator_start: int = 0
    adversarial_start: int | None = None
    initial: str | None = None
    continues: str | None = None
    freeze_encoder: bool = False
    latents: str | None = None

    def __post_init__(self) -> None:
        if self.freeze_encoder and not self.initial:
            raise ValueError("freeze_encoder needs initial: the bundle whose encoder is finished")
        if self.latents and not self.freeze_encoder:
            raise ValueError("latents needs freeze_encoder: the decoder of a finished encoder learns")
        if self.latents and (self.gain_db or self.inverted):
            raise ValueError("latents are of the recordings as they are: leave out gain_db and inverted")
        if self.continues and not self.initial:
            raise ValueError("continues needs initial: the bundle whose VAE goes on")
        if (self.discriminator is None) != (self.discriminator_optimizer is None):
            raise ValueError("discriminator and discriminator_optimizer go together: give both or neither")
        if min(self.crop_frames, self.batch_size, self.held_out_crops) < 1:
            raise ValueError("crop_frames, batch_size and held_out_crops must be at least 1")
        if not self.stft_windows or min(self.stft_windows) < 4:
            raise ValueError(f"stft_windows must be one length of at least 4 or several, got {self.stft_windows}")
        for name in ("endings", "inverted"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        if self.stft_floor <= 0 or min(self.gain_db, self.noise, self.balance) < 0:
            raise ValueError("stft_floor must be above 0, gain_db, noise and balance at least 0")


class VAETask(Task):
    """Joint training, or of the decoder alone."""

    averaged = ("vae",)
    criterion = "held_out/stft/sum"

    def __init__(self, config: TrainVAEConfig):
        self.config = config
        self.model = load_model_config(config.model)
        self.batch_size = config.batch_size
        samples = config.crop_frames * self.model.vae.hop
        windows = (*config.stft_windows, *(config.discriminator.windows if config.discriminator else ()))
        if max(windows) // 2 >= samples:
            raise UserError(
                f"crop_frames: {samples} samples are too few for a window of {max(windows)}; take longer crops"
            )
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
            inverted=config.inverted,
            unreadable=self.unreadable,
        )
        self.validation = self._validation(samples)
        torch.manual_seed(config.run.seed)
        vae = VAE(self.model.vae)
        if config.initial:
            _start_from(config.initial, vae, self.model, config.freeze_encoder)
        vae.encoder.requires_grad_(not config.freeze_encoder)
        self.modules: dict[str, nn.Module] = {"vae": vae}
        self.optimizers = {"vae": config.optimizer}
        if config.discriminator and config.discriminator_optimizer:
            self.modules["discriminator"] = Discriminator(config.discriminator)
            self.optimizers["discriminator"] = config.discriminator_optimizer
        self.pairs = self._pairs(config, vae) if config.latents else None
        shares = {k: v for k, v in self._weights.items() if k in _ON_OUTPUT}
        self.balancer = Balancer(shares, config.balance) if config.balance else None
        self.tensors = {"balancer": self.balancer.state} if self.balancer else {}
        self.waveform = WaveformLoss(self.model.sample_rate)
        self.stft = MultiResolutionSTFTLoss(
            self.model.sample_rate,
            config.stft_windows,
            config.a_weighting,
            config.stft_floor,
            mel=config.weights.mel > 0,
            levels=config.weights.levels > 0,
        )

    def begin(self, state: Resumable) -> None:
        if self.config.continues:
            take_over(Path(self.config.continues), state, [name for name in state.modules if name != "vae"])

    def batch(self, number: int, rank: int, world: int) -> dict[str, Tensor]:
        if self.pairs:
            audio, latents = self.pairs.batch(number, self.batch_size, rank, world)
            return {"audio": audio, "latents": latents}
        numbers = item_numbers(number, rank, world, self.batch_size)
        shape = (self.model.vae.latent_channels, self.config.crop_frames)
        noise = self.config.noise * item_noise(self.config.run.seed, numbers, shape)
        return {"audio": self.crops.batch(number, self.batch_size, rank, world), "noise": noise}

    def rate(self, name: str, step: int, steps: int) -> float:
        first = self.config.discriminator_start if name == "discriminator" else 0
        return super().rate(name, step - first, steps - first)

    def step(self, batch: dict[str, Tensor], step: int, update: Update) -> dict[str, Tensor]:
        audio = batch["audio"]
        output, mean, std = self.modules["vae"](audio, batch.get("noise"), batch.get("latents"))
        # All that hears the output is differentiated there first, so that the discriminator runs once for both.
        heard = output.detach().float().requires_grad_()
        losses = self._reconstruction(heard, audio)
        judged = "discriminator" in self.modules and step >= self.config.discriminator_start
        if judged:
            real, fake = (self.modules["discriminator"](sound) for sound in (audio, heard))
            if step >= (self.config.adversarial_start or 0):
                losses["adversarial/generator"] = hinge_generator(fake)
                losses["adversarial/features"] = feature_matching(real, fake)
        total = self._total(losses, heard, update)
        loss = total.detach() + ((output.float() - heard.detach()) * update.gradient(total, heard)).sum()
        if not self.config.freeze_encoder:
            losses["kl/latent"] = Posterior(mean, std).kl()
            loss = loss + self._weights["kl/latent"] * losses["kl/latent"]
        update("vae", loss)
        if judged:
            update("discriminator", hinge := hinge_discriminator(real, fake))
            losses["discriminator/hinge"] = hinge.detach()
        figures = {"data/unreadable": torch.tensor(len(self.unreadable))}
        figures["latent/std"] = (batch["latents"] if mean is None else mean.detach()).std()
        total = torch.stack([self._weights[k] * v.detach() for k, v in losses.items() if k in self._weights]).sum()
        return {"loss/total": total} | losses | figures

    def evaluate(self, step: int) -> dict[str, float]:
        """Reconstruction losses of the posterior mean on fixed held-out crops."""
        if self.validation is None:
            return {}
        device = next(self.modules["vae"].parameters()).device
        totals: dict[str, float] = {}
        for crops in self.validation.split(self.batch_size):
            audio = crops.to(device)
            noise = torch.zeros(len(audio), self.model.vae.latent_channels, self.config.crop_frames, device=device)
            output, _, _ = self.modules["vae"](audio, noise)
            error = (audio - output.float()).square().sum((1, 2))
            snr = 10 * torch.log10(audio.square().sum((1, 2)).clamp_min(1e-8) / error.clamp_min(1e-8))
            for name, value in (self._reconstruction(output, audio) | {"snr_db": snr.mean()}).items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(audio) / len(self.validation)
        return {f"held_out/{name}": value for name, value in totals.items()}

    def export(self, folder: Path, modules: dict[str, nn.Module]) -> None:
        save_bundle(folder, self.model, {"vae": modules["vae"].state_dict()})

    def _pairs(self, config: TrainVAEConfig, vae: VAE) -> LatentCrops:
        encoder = encoder_hash(vae.state_dict(), self.model.vae.slow_channels)
        rate, hop = self.model.sample_rate, self.model.vae.hop
        frames, seed, folder = config.crop_frames, config.run.seed, config.latents or ""
        with torch.no_grad():
            silence = vae.encode(torch.zeros(1, self.model.vae.audio_channels, frames * hop)).mean[0]
        return LatentCrops(self.crops.items, folder, silence, encoder, rate, hop, frames, seed, config.endings)

    def _validation(self, samples: int) -> Tensor | None:
        if self.config.held_out is None:
            return None
        items = read_items(self.config.held_out)
        crops = Crops(items, self.model.sample_rate, samples, seed=0, unreadable=Unreadable(len(items), 1.0))
        return crops.batch(0, self.config.held_out_crops)

    def _reconstruction(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        with torch.autocast(output.device.type, enabled=False):
            losses = {f"stft/{k}": v for k, v in self.stft.to(output.device)(output, target).items()}
            if self.config.weights.waveform:
                losses["waveform/relative"] = self.waveform.to(output.device)(output, target)
            return losses

    def _total(self, losses: dict[str, Tensor], output: Tensor, update: Update) -> Tensor:
        if self.balancer:
            return self.balancer(losses, output, update.gradient, update.mean)
        return torch.stack([self._weights[k] * v for k, v in losses.items()]).sum()

    @cached_property
    def _weights(self) -> dict[str, float]:
        w = self.config.weights
        return {
            "waveform/relative": w.waveform,
            "stft/sum": w.sum,
            "stft/difference": w.difference,
            "stft/left": w.left,
            "stft/right": w.right,
            "stft/mel": w.mel,
            "stft/levels": w.levels,
            "adversarial/generator": w.adversarial,
            "adversarial/features": w.features,
            "kl/latent": w.kl,
        }


def _start_from(source: str, vae: VAE, model: StableAudioConfig, keep_latents: bool) -> None:
    """Load a bundle's VAE, or a DAC's; `keep_latents` refuses a bundle that is configured to make others."""
    if Path(source).suffix in (".pth", ".pt"):
        vae.load_state_dict(state_from_dac(read_dac(source).state, vae))
        return
    theirs = load_model_config(source)
    pairs = {f"vae.{f.name}": [getattr(c.vae, f.name) for c in (theirs, model)] for f in fields(model.vae)}
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
