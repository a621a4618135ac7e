"""Speed of VAE training, phase 1 with discriminators, beside the same networks in plain eager PyTorch.

    python -m evaluation.benchmarks.vae_training --config configs/stable_audio/starter_vae.yaml

Ours are the steps of `training.train_vae`. The peer is assembled from descript-audio-codec's own blocks, its Snake and
torch's weight norm in place, and runs the discriminator anew for each loss, as GAN trainers do. Losses, discriminator,
optimizers, precision and data (noise) are the same; both take whole steps in turn, so that a busy machine slows both.
Prints seconds of audio trained on per second, from each one's fastest step.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from evaluation.benchmarks.timing import time_in_turns
from evaluation.benchmarks.vae_decoding import peer_decoder, waveform_vae
from stable_audio_lite.audio.io import write_audio
from stable_audio_lite.command import Parser, guarded
from stable_audio_lite.config import from_dict
from stable_audio_lite.models.discriminator import Discriminator, DiscriminatorConfig
from stable_audio_lite.models.vae import Posterior
from stable_audio_lite.models.waveform_vae import WaveformVAEConfig
from training.losses import MultiResolutionSTFTLoss, feature_matching, hinge_discriminator, hinge_generator
from training.task import OptimizerConfig, RunConfig
from training.train_vae import WEIGHTS, TrainVAEConfig, VAETask
from training.update import Update

_WINDOWS, _RATE = (2048, 512, 128), 1e-4


class PeerVAE(nn.Module):
    """The VAE of the same shape from descript-audio-codec's encoder and decoder."""

    def __init__(self, config: WaveformVAEConfig):
        from dac.model.dac import Encoder
        from dac.nn.layers import WNConv1d

        super().__init__()
        width = config.encoder_width * 2 ** len(config.strides)
        self.encoder = Encoder(config.encoder_width, list(config.strides), width)
        self.encoder.block[0] = WNConv1d(config.audio_channels, config.encoder_width, kernel_size=7, padding=3)
        self.project = nn.Conv1d(width, 2 * config.latent_channels, 1)
        self.decoder = peer_decoder(config)

    def forward(self, audio: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As VAE.forward."""
        posterior = Posterior.of(self.project(self.encoder(audio)))
        return self.decoder(posterior.mean + posterior.std * noise), posterior.mean, posterior.std


def peer_discriminator(config: DiscriminatorConfig) -> Discriminator:
    """The discriminator with its maps laid out in memory as torch does by itself."""
    discriminator = Discriminator(config)
    for scale in discriminator.scales:
        scale.convs[0].register_forward_pre_hook(lambda _, inputs: inputs[0].contiguous())  # type: ignore[index, union-attr]
    return discriminator


@dataclass(frozen=True)
class TrainingSpeeds:
    """Seconds of audio trained on per second."""

    ours: float
    peer: float


def our_step(task: VAETask, accelerator: Accelerator, batch: dict[str, Tensor]) -> Callable[[], None]:
    """A whole step as `training.loop` takes it."""
    task.modules = {k: accelerator.prepare_model(m.to(accelerator.device)) for k, m in task.modules.items()}
    optimizers = {k: c.build(task.modules[k]) for k, c in task.optimizers.items()}
    update = Update(accelerator, task.config.run, task, optimizers)

    def step() -> None:
        update.begin(0)
        with accelerator.autocast():
            task.step(batch, 0, update)
        update.end()

    return step


def peer_step(
    vae: nn.Module, discriminator: nn.Module, stft: MultiResolutionSTFTLoss, batch: dict[str, Tensor], bf16: bool
) -> Callable[[], None]:
    """A whole step of phase 1: both forwards, backwards, clipping and AdamW updates."""
    audio = batch["audio"]
    first, second = (torch.optim.AdamW(m.parameters(), lr=_RATE) for m in (vae, discriminator))

    def learn(module: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()

    def step() -> None:
        with torch.autocast(audio.device.type, torch.bfloat16, enabled=bf16):
            output, mean, std = vae(audio, batch["noise"])
            output = output.float()
            discriminator.requires_grad_(False)
            fake = discriminator(output)
            with torch.no_grad():
                real = discriminator(audio)
            discriminator.requires_grad_(True)
        losses = stft(output, audio) | {"kl/latent": Posterior(mean, std).kl()}
        losses |= {"adversarial/generator": hinge_generator(fake), "adversarial/features": feature_matching(real, fake)}
        learn(vae, first, torch.stack([WEIGHTS[name] * loss for name, loss in losses.items()]).sum())
        with torch.autocast(audio.device.type, torch.bfloat16, enabled=bf16):
            real, fake = discriminator(audio), discriminator(output.detach())
        learn(discriminator, second, hinge_discriminator(real, fake))

    return step


def time_training(
    model: str | Path,
    judge: DiscriminatorConfig,
    *,
    batch: int,
    frames: int,
    precision: Literal["no", "bf16"],
    steps: int,
) -> TrainingSpeeds:
    """Time `steps` steps of each on `batch` crops of `frames` latent frames.

    Raises:
        UserError: the model has no VAE on waveforms.
    """
    config, sample_rate = waveform_vae(model)
    accelerator = Accelerator(mixed_precision=precision)
    device = accelerator.device
    torch.manual_seed(0)
    crops = {
        "audio": 0.1 * torch.randn(batch, config.audio_channels, frames * config.hop, device=device),
        "noise": torch.randn(batch, config.latent_channels, frames, device=device),
    }
    task = _task(model, judge, crops["audio"][0].cpu(), sample_rate)
    peer = PeerVAE(config).to(device), peer_discriminator(judge).to(device)
    stft = MultiResolutionSTFTLoss(sample_rate, _WINDOWS).to(device)
    runs = (our_step(task, accelerator, crops), peer_step(*peer, stft, crops, precision == "bf16"))
    seconds = batch * frames * config.hop / sample_rate
    return TrainingSpeeds(*(seconds / timing.minimum for timing in time_in_turns(runs, steps)))


def _task(model: str | Path, judge: DiscriminatorConfig, sound: Tensor, sample_rate: int) -> VAETask:
    """Phase 1 of VAE training, on a data set of the one `sound`, which is never read again."""
    with tempfile.TemporaryDirectory() as folder:
        write_audio(Path(folder) / "noise.wav", sound, sample_rate)
        optimizer = OptimizerConfig(lr=_RATE)
        return VAETask(
            TrainVAEConfig(
                model=str(model),
                data=folder,
                stft_windows=_WINDOWS,
                optimizer=optimizer,
                discriminator=judge,
                discriminator_optimizer=optimizer,
                run=RunConfig(output=folder, steps=1),
            )
        )


def main() -> int:
    """Run the command; returns its exit status."""
    parser = Parser(description=__doc__)
    parser.add_argument("--config", default="configs/stable_audio/starter_vae.yaml", help="model config")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--frames", type=int, default=64, help="latent frames in a crop")
    parser.add_argument("--windows", type=int, nargs="+", default=[1024, 512, 256], help="of the discriminator")
    parser.add_argument("--filters", type=int, default=8, help="of the discriminator")
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16")
    parser.add_argument("--steps", type=int, default=5)
    return guarded(lambda: _run(parser.parse_args()))


def _run(args: argparse.Namespace) -> None:
    shape = {"windows": args.windows, "filters": args.filters}
    judge = from_dict(DiscriminatorConfig, shape, "--windows, --filters")
    sizes = {"batch": args.batch, "frames": args.frames, "steps": args.steps}
    speeds = time_training(args.config, judge, precision=args.precision, **sizes)
    print(
        f"seconds of audio per second, {args.batch} crops of {args.frames} frames, precision {args.precision}, "
        f"{torch.get_num_threads()} threads: ours {speeds.ours:.2f}, DAC's blocks {speeds.peer:.2f}, "
        f"ratio {speeds.ours / speeds.peer:.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
