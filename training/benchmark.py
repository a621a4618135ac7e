"""Speed of VAE training, phase 1 with discriminators, beside the same networks in plain eager PyTorch.

    python -m training.benchmark --config configs/stable_audio/starter.yaml

The peer is assembled from descript-audio-codec's own blocks, its Snake and torch's weight norm in place. Losses,
discriminator, optimizers, precision and data (noise) are the same; both take whole steps in turn, so that a busy
machine slows both. Prints seconds of audio trained on per second, from each one's fastest step.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stable_audio_lite.bundle import load_model_config
from stable_audio_lite.models.discriminator import Discriminator, DiscriminatorConfig
from stable_audio_lite.models.vae import VAE, Posterior, VAEConfig
from training.losses import MultiResolutionSTFTLoss, feature_matching, hinge_discriminator, hinge_generator
from training.train_vae import halves


class PeerVAE(nn.Module):
    """The VAE of the same shape from descript-audio-codec's encoder and decoder."""

    def __init__(self, config: VAEConfig):
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


@dataclass(frozen=True)
class Speeds:
    """Seconds of audio per second."""

    ours: float
    peer: float


def training_step(
    vae: nn.Module,
    discriminator: nn.Module,
    stft: MultiResolutionSTFTLoss,
    audio: Tensor,
    noise: Tensor,
    dtype: torch.dtype,
) -> Callable[[], None]:
    """A whole step of phase 1: both forwards, backwards and AdamW updates."""
    first, second = (torch.optim.AdamW(m.parameters(), lr=1e-4) for m in (vae, discriminator))

    def step() -> None:
        with torch.autocast(audio.device.type, dtype, enabled=dtype != torch.float32):
            output, mean, std = vae(audio, noise)
            output = output.float()
            discriminator.requires_grad_(False)
            fake = discriminator(output)
            with torch.no_grad():
                real = discriminator(audio)
            discriminator.requires_grad_(True)
            judged = hinge_generator(fake) + feature_matching(real, fake)
        loss = sum(stft(output, audio).values()) + judged + Posterior(mean, std).kl()
        first.zero_grad()
        loss.backward()
        first.step()
        with torch.autocast(audio.device.type, dtype, enabled=dtype != torch.float32):
            real, fake = halves(discriminator(torch.cat((audio, output.detach()))))
        second.zero_grad()
        hinge_discriminator(real, fake).backward()
        second.step()
        if audio.is_cuda:
            torch.cuda.synchronize()

    return step


def measure(
    config: VAEConfig,
    judge: DiscriminatorConfig,
    sample_rate: int,
    *,
    batch: int,
    frames: int,
    dtype: torch.dtype,
    steps: int,
    device: str,
    compiled: bool = False,
) -> Speeds:
    """Time `steps` steps of each on `batch` crops of `frames` latent frames; slow channels and clock are left out.

    With `compiled`, our networks are compiled as `run.compile` does; the peer stays as it is.
    """
    config = replace(config, slow_channels=0, clock=1)
    torch.manual_seed(0)
    audio = 0.1 * torch.randn(batch, config.audio_channels, frames * config.hop, device=device)
    noise = torch.randn(batch, config.latent_channels, frames, device=device)
    stft = MultiResolutionSTFTLoss(sample_rate, (2048, 512, 128)).to(device)
    networks = [(vae.to(device), Discriminator(judge).to(device)) for vae in (VAE(config), PeerVAE(config))]
    if compiled:
        for network in networks[0]:
            network.compile(dynamic=False)
    runs = [training_step(vae, discriminator, stft, audio, noise, dtype) for vae, discriminator in networks]
    best = [math.inf, math.inf]
    for number in range(steps + 1):
        for index, run in enumerate(runs):
            start = time.perf_counter()
            run()
            if number:  # the first one warms up
                best[index] = min(best[index], time.perf_counter() - start)
    seconds = batch * frames * config.hop / sample_rate
    return Speeds(*(seconds / b for b in best))


def main() -> None:
    """Print both speeds and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/stable_audio/starter.yaml", help="model config")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--frames", type=int, default=64, help="latent frames in a crop")
    parser.add_argument("--windows", type=int, nargs="+", default=[1024, 512, 256], help="of the discriminator")
    parser.add_argument("--filters", type=int, default=8, help="of the discriminator")
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="ours, as `run: {compile: true}` does")
    args = parser.parse_args()
    model = load_model_config(args.config)
    speeds = measure(
        model.vae,
        DiscriminatorConfig(windows=tuple(args.windows), filters=args.filters),
        model.sample_rate,
        batch=args.batch,
        frames=args.frames,
        dtype=torch.bfloat16 if args.precision == "bf16" else torch.float32,
        steps=args.steps,
        device=args.device,
        compiled=args.compile,
    )
    print(
        f"seconds of audio per second, {args.batch} crops of {args.frames} frames, precision {args.precision}, "
        f"{torch.get_num_threads()} threads: ours {speeds.ours:.2f}, DAC's blocks {speeds.peer:.2f}, "
        f"ratio {speeds.ours / speeds.peer:.2f}"
    )


if __name__ == "__main__":
    main()
