"""Speed of VAE training, phase 1 with discriminators, beside the same networks in plain eager PyTorch.

    python -m evaluation.benchmarks.vae_training --config configs/stable_audio/starter_vae.yaml

Ours are the steps of `training.train_vae`. The peer is assembled from descript-audio-codec's own blocks, its Snake and
torch's weight norm in place, and runs the discriminator anew for each loss, as GAN trainers do. Losses, discriminator,
optimizers, precision and data (noise) are the same; both take whole steps in turn, so that a busy machine slows both.
Prints seconds of audio trained on per second, from each one's fastest step.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from stable_audio_lite.audio.io import write_audio
from stable_audio_lite.errors import UserError
from stable_audio_lite.models.discriminator import Discriminator, DiscriminatorConfig
from stable_audio_lite.models.vae import Posterior
from stable_audio_lite.models.waveform_vae import WaveformVAEConfig
from stable_audio_lite.systems import load_model_config
from training.losses import MultiResolutionSTFTLoss, feature_matching, hinge_discriminator, hinge_generator
from training.task import OptimizerConfig, RunConfig
from training.train_vae import WEIGHTS, TrainVAEConfig, VAETask
from training.update import Update

WINDOWS, RATE = (2048, 512, 128), 1e-4


class PeerVAE(nn.Module):
    """The VAE of the same shape from descript-audio-codec's encoder and decoder."""

    def __init__(self, config: WaveformVAEConfig):
        from dac.model.dac import Decoder, Encoder
        from dac.nn.layers import WNConv1d

        super().__init__()
        width = config.encoder_width * 2 ** len(config.strides)
        self.encoder = Encoder(config.encoder_width, list(config.strides), width)
        self.encoder.block[0] = WNConv1d(config.audio_channels, config.encoder_width, kernel_size=7, padding=3)
        self.project = nn.Conv1d(width, 2 * config.latent_channels, 1)
        rates = list(reversed(config.strides))
        self.decoder = Decoder(config.latent_channels, config.decoder_width, rates, config.audio_channels)
        del self.decoder.model[-1]  # tanh, which this VAE has not

    def forward(self, audio: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As VAE.forward."""
        mean, scale = self.project(self.encoder(audio)).float().chunk(2, 1)
        std = F.softplus(scale) + 1e-4
        return self.decoder(mean + std * noise), mean, std


def peer_discriminator(config: DiscriminatorConfig) -> Discriminator:
    """The discriminator with its maps laid out in memory as torch does by itself."""
    discriminator = Discriminator(config)
    for scale in discriminator.scales:
        scale.convs[0].register_forward_pre_hook(lambda _, inputs: inputs[0].contiguous())  # type: ignore[index, union-attr]
    return discriminator


@dataclass(frozen=True)
class Speeds:
    """Seconds of audio per second."""

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
    first, second = (torch.optim.AdamW(m.parameters(), lr=RATE) for m in (vae, discriminator))

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


def measure(
    model: str | Path,
    judge: DiscriminatorConfig,
    *,
    batch: int,
    frames: int,
    precision: Literal["no", "bf16"],
    steps: int,
) -> Speeds:
    """Time `steps` steps of each on `batch` crops of `frames` latent frames."""
    whole = load_model_config(model)
    config = whole.vae
    if not isinstance(config, WaveformVAEConfig):
        raise UserError(f"{model}: has a VAE on spectrograms, and the peer's is on waveforms; give another model")
    accelerator = Accelerator(mixed_precision=precision)
    device, seconds = accelerator.device, batch * frames * config.hop / whole.sample_rate
    torch.manual_seed(0)
    crops = {
        "audio": 0.1 * torch.randn(batch, config.audio_channels, frames * config.hop, device=device),
        "noise": torch.randn(batch, config.latent_channels, frames, device=device),
    }
    with tempfile.TemporaryDirectory() as folder:
        write_audio(Path(folder) / "noise.wav", crops["audio"][0].cpu(), whole.sample_rate)
        task = VAETask(
            TrainVAEConfig(
                model=str(model),
                data=folder,
                stft_windows=WINDOWS,
                optimizer=OptimizerConfig(lr=RATE),
                discriminator=judge,
                discriminator_optimizer=OptimizerConfig(lr=RATE),
                run=RunConfig(output=folder, steps=1),
            )
        )
    peer = PeerVAE(config).to(device), peer_discriminator(judge).to(device)
    stft = MultiResolutionSTFTLoss(whole.sample_rate, WINDOWS).to(device)
    runs = [our_step(task, accelerator, crops), peer_step(*peer, stft, crops, precision == "bf16")]
    best = [math.inf, math.inf]
    for number in range(steps + 1):
        for index, run in enumerate(runs):
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first one warms up
                best[index] = min(best[index], time.perf_counter() - start)
    return Speeds(*(seconds / b for b in best))


def main() -> None:
    """Print both speeds and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/stable_audio/starter_vae.yaml", help="model config")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--frames", type=int, default=64, help="latent frames in a crop")
    parser.add_argument("--windows", type=int, nargs="+", default=[1024, 512, 256], help="of the discriminator")
    parser.add_argument("--filters", type=int, default=8, help="of the discriminator")
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    try:
        speeds = measure(
            args.config,
            DiscriminatorConfig(windows=tuple(args.windows), filters=args.filters),
            batch=args.batch,
            frames=args.frames,
            precision=args.precision,
            steps=args.steps,
        )
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(
        f"seconds of audio per second, {args.batch} crops of {args.frames} frames, precision {args.precision}, "
        f"{torch.get_num_threads()} threads: ours {speeds.ours:.2f}, DAC's blocks {speeds.peer:.2f}, "
        f"ratio {speeds.ours / speeds.peer:.2f}"
    )


if __name__ == "__main__":
    main()
