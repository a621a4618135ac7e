"""The variational autoencoder: descript-audio-codec's encoder and decoder without a quantizer.

Kumar et al. 2023 (arXiv 2306.06546) describe the blocks, Evans et al. 2024 (arXiv 2402.04825, section 3.1) the
bottleneck. Reads upward: residual unit, blocks, encoder and decoder, VAE.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stable_audio_lite.nn.conv import WeightNormConv1d, WeightNormConvTranspose1d, channels_last
from stable_audio_lite.nn.snake import FoldedSnake, Snake

SLOW_REACH = 4
"""Latent frames on each side of a frame that the encoder's smoothing of `slow_channels` sees."""

_DILATIONS = (1, 3, 9)


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Shape of the VAE.

    Attributes:
        audio_channels: channels of the waveform, 2 for stereo.
        encoder_width: channels after the encoder's first convolution; they double at each stride.
        decoder_width: channels after the decoder's first convolution; they halve at each stride.
        strides: time factors of the encoder's blocks, all even; the decoder takes them backwards.
        latent_channels: channels of the latent.
        slow_channels: how many of them, the first ones, the encoder smooths over time (by a binomial filter of
            `2 * SLOW_REACH + 1` frames). Phase can't pass there, so they come to carry loudness, timbre and the like,
            which a prompt says something about; the paper has none.
        clock: the decoder's first convolution has weights that turn with this period in latent frames; 1 for weights
            that stay, as in the paper. What is constant in constant latents repeats at every frame, so without a clock
            steady slow channels can only sound at multiples of the frame rate (43 Hz); with it at multiples of a
            `clock`th of that.
    """

    audio_channels: int = 2
    encoder_width: int = 128
    decoder_width: int = 1536
    strides: tuple[int, ...] = (4, 4, 8, 8)
    latent_channels: int = 64
    slow_channels: int = 0
    clock: int = 1

    def __post_init__(self) -> None:
        if not self.strides or any(s < 2 or s % 2 for s in self.strides):
            raise ValueError(f"strides must be even and at least 2, got {self.strides}")
        if min(self.audio_channels, self.encoder_width, self.latent_channels) < 1:
            raise ValueError("audio_channels, encoder_width and latent_channels must be at least 1")
        if not 0 <= self.slow_channels <= self.latent_channels:
            raise ValueError(f"slow_channels must lie in 0..{self.latent_channels}, got {self.slow_channels}")
        if self.clock < 1 or (self.clock > 1 and self.clock % 2):
            raise ValueError(f"clock must be 1 or even, got {self.clock}")
        if self.decoder_width < 1 or self.decoder_width % 2 ** len(self.strides):
            raise ValueError(f"decoder_width must be a multiple of {2 ** len(self.strides)}, got {self.decoder_width}")

    @property
    def hop(self) -> int:
        """Samples per latent frame."""
        return math.prod(self.strides)


class ResidualUnit(nn.Module):
    """Snake, dilated k7 convolution, Snake, k1 convolution, added to the input."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.layers = nn.Sequential(
            Snake(channels),
            WeightNormConv1d(channels, channels, 7, dilation=dilation, padding=3 * dilation),
            Snake(channels),
            # Near the identity at the start, so that depth does not blow up the signal.
            WeightNormConv1d(channels, channels, 1, gain=0.125),
        )

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layers[0], Snake):
            return x + self.layers(x)
        # Prepared for inference, the sum stays float32 with bf16 weights too: rounding it in each unit would cost 3 dB.
        return self.layers(x).float().add_(x)


class Down(nn.Module):
    """Encoder block: three residual units, Snake, strided convolution that doubles the channels."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.layers = nn.Sequential(
            *(ResidualUnit(channels, d) for d in _DILATIONS),
            Snake(channels),
            WeightNormConv1d(channels, 2 * channels, 2 * stride, stride=stride, padding=stride // 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Up(nn.Module):
    """Decoder block: Snake, transposed convolution that halves the channels, three residual units."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.layers = nn.Sequential(
            Snake(channels),
            WeightNormConvTranspose1d(channels, channels // 2, 2 * stride, stride=stride, padding=stride // 2),
            *(ResidualUnit(channels // 2, d) for d in _DILATIONS),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Encoder(nn.Module):
    """(B, audio_channels, T) -> (B, 2 latent_channels, T / hop): mean and scale."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        width = config.encoder_width
        # Music is quiet beside full scale: raise it to where Snake bends.
        layers: list[nn.Module] = [WeightNormConv1d(config.audio_channels, width, 7, padding=3, gain=8.0)]
        for stride in config.strides:
            layers.append(Down(width, stride))
            width *= 2
        layers += [Snake(width), WeightNormConv1d(width, width, 3, padding=1)]
        self.layers = nn.Sequential(*layers)
        self.project = nn.Conv1d(width, 2 * config.latent_channels, 1)
        # At first the noise must not drown the mean: unit gain for the mean, std = softplus(-3) = 0.05.
        means, scales = self.project.weight.data.chunk(2)
        nn.init.normal_(means, std=2 / math.sqrt(width))
        nn.init.zeros_(scales)
        bias = torch.zeros(2 * config.latent_channels)
        bias[config.latent_channels :] = -3.0
        self.project.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.layers(channels_last(x)))


class Decoder(nn.Module):
    """(B, latent_channels, F) -> (B, audio_channels, F * hop)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        width = config.decoder_width
        self.clock = config.clock
        layers: list[nn.Module] = [WeightNormConv1d(config.clock * config.latent_channels, width, 7, padding=3)]
        for stride in reversed(config.strides):
            layers.append(Up(width, stride))
            width //= 2
        # Untrained output at the level of music rather than of full scale.
        layers += [Snake(width), WeightNormConv1d(width, config.audio_channels, 7, padding=3, gain=0.1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(channels_last(self.turn(z)))

    def turn(self, z: Tensor, start: int = 0) -> Tensor:
        """(B, C, F) -> (B, clock * C, F): z times each function of the real Fourier basis of period `clock` frames.

        A convolution over that is one whose weights turn with the frame's number; z begins with number `start`.
        """
        if self.clock == 1:
            return z
        basis = fourier_basis(self.clock, z.shape[2], start).to(z)
        return (basis[:, None] * z[:, None]).flatten(1, 2)


def fourier_basis(period: int, frames: int, start: int = 0) -> Tensor:
    """(period, frames), from frame `start`: 1, then sqrt(2) cos and sin of 1, 2... turns in `period`, an even number.

    The last is the cosine of `period / 2` turns, +1 and -1 in turn.
    """
    number = torch.arange(start, start + frames) % period
    turns = torch.arange(1, period // 2 + 1)[:, None] * number * (2 * math.pi / period)
    waves = math.sqrt(2) * torch.stack((turns.cos(), turns.sin()), 1).flatten(0, 1)[:-1]
    waves[-1] /= math.sqrt(2)
    return torch.cat((torch.ones(1, frames), waves))


@dataclass(frozen=True)
class Posterior:
    """Diagonal Gaussian over latents; `mean` and `std` are (B, latent_channels, F)."""

    mean: Tensor
    std: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * eps, (B, latent_channels, F)."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """mean^2 + var - log var - 1, summed over channels, mean over the rest (a scalar)."""
        variance = self.std.square()
        return (self.mean.square() + variance - variance.log() - 1).sum(1).mean()


class VAE(nn.Module):
    """Stereo audio to latents and back; fully convolutional, any length."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def hop(self) -> int:
        """Samples per latent frame."""
        return self.config.hop

    def forward(
        self, audio: Tensor, noise: Tensor, latents: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Training pass: audio (B, audio_channels, T) and noise (B, latent_channels, T / hop) -> output, mean, std.

        Where `latents` are given they are decoded, and mean and std are None.
        """
        if latents is not None:
            return self.decode(latents), None, None
        posterior = self.encode(audio)
        return self.decode(posterior.mean + posterior.std * noise), posterior.mean, posterior.std

    def encode(self, audio: Tensor) -> Posterior:
        """Posterior of (B, audio_channels, T) audio; T is padded with silence to a multiple of `hop`.

        Raises:
            ValueError: the shape is not (B, audio_channels, T) with T > 0.
        """
        if audio.ndim != 3 or audio.shape[1] != self.config.audio_channels or audio.shape[2] == 0:
            raise ValueError(f"expected audio (B, {self.config.audio_channels}, T), got {tuple(audio.shape)}")
        audio = F.pad(audio, (0, -audio.shape[2] % self.hop)).to(self.encoder.project.weight.dtype)
        return self._posterior(self.encoder(audio))

    def decode(self, latents: Tensor) -> Tensor:
        """Audio (B, audio_channels, F * hop) of (B, latent_channels, F) latents, whole.

        Raises:
            ValueError: the shape is not (B, latent_channels, F) with F > 0.
        """
        self._check_latents(latents)
        return self.decoder(latents.to(self.encoder.project.weight.dtype))

    def encode_chunked(self, audio: Tensor, chunk_frames: int = 128) -> Posterior:
        """As `encode`, in pieces of `chunk_frames` latent frames."""
        pieces = list(self.encode_stream([audio], chunk_frames))
        return Posterior(torch.cat([p.mean for p in pieces], 2), torch.cat([p.std for p in pieces], 2))

    def encode_stream(self, blocks: Iterable[Tensor], chunk_frames: int = 128) -> Iterator[Posterior]:
        """Posteriors of up to `chunk_frames` frames each of audio that comes in (B, audio_channels, any) blocks.

        Each is computed from as much of the sound before and after as it depends on, so together they equal `encode` of
        the whole; no more than that and a block is held.

        Raises:
            ValueError: the blocks' shape is not (B, audio_channels, T), all are empty, or chunks are.
        """
        _check_chunks(chunk_frames)
        halo = self.encoder_halo
        held: Tensor | None = None
        left = start = 0  # frames: of the first sample held, and of the next posterior
        for block in blocks:
            held = block if held is None else torch.cat((held, block), 2)
            while (left + held.shape[2] // self.hop) >= start + chunk_frames + halo:
                yield self._encode_part(held, left, start, start + chunk_frames)
                start += chunk_frames
                held, left = held[:, :, max(start - halo - left, 0) * self.hop :], max(start - halo, left)
        if held is None:
            raise ValueError("expected audio, got no blocks")
        total = left + math.ceil(held.shape[2] / self.hop)
        for begin in range(start, max(total, 1), chunk_frames):
            yield self._encode_part(held, left, begin, min(begin + chunk_frames, total))

    def _encode_part(self, held: Tensor, left: int, start: int, stop: int) -> Posterior:
        """Frames start..stop of sound whose samples from frame `left` on are held."""
        first = max(start - self.encoder_halo, left)
        part = self.encode(held[:, :, (first - left) * self.hop : (stop + self.encoder_halo - left) * self.hop])
        own = slice(start - first, stop - first)
        return Posterior(part.mean[:, :, own], part.std[:, :, own])

    def decode_chunked(self, latents: Tensor, chunk_frames: int = 32) -> Tensor:
        """As `decode`, in pieces of `chunk_frames` latent frames that stay in the processor's cache."""
        return torch.cat(list(self.decode_stream(latents, chunk_frames)), 2)

    def decode_stream(self, latents: Tensor, chunk_frames: int = 32) -> Iterator[Tensor]:
        """Successive pieces (B, audio_channels, chunk_frames * hop) of what `decode` gives, in float32.

        The layers of the lowest rate, whose reach counts in whole frames, run over long pieces; the rest, whose reach
        is a fraction of a frame but whose activations are large, over pieces of `chunk_frames` frames. Each sees as
        much around it as it depends on, so the pieces equal the whole.

        Raises:
            ValueError: the shape is not (B, latent_channels, F) with F > 0, or chunks are empty.
        """
        _check_chunks(chunk_frames)
        self._check_latents(latents)
        x = latents.to(self.encoder.project.weight.dtype)
        layers = list(self.decoder.layers)
        low, high = layers[:2], layers[2:]
        rate = self.config.strides[-1]
        halo_low, halo_high = _reach(low), _reach(high)
        outer = 16 * chunk_frames
        for start in range(0, x.shape[2], outer):
            stop = min(start + outer, x.shape[2])
            # Rate-`rate` context that the second stage will need on both sides of this piece.
            first = max(start * rate - halo_high, 0)
            last = min(stop * rate + halo_high, x.shape[2] * rate)
            left, right = max(first // rate - halo_low, 0), min(-(-last // rate) + halo_low, x.shape[2])
            hidden = _run(low, channels_last(self.decoder.turn(x[:, :, left:right], left)))
            hidden = hidden[:, :, first - left * rate : last - left * rate]
            for inner in range(start * rate, stop * rate, chunk_frames * rate):
                end = min(inner + chunk_frames * rate, stop * rate)
                left, right = max(inner - halo_high, first), min(end + halo_high, last)
                y = _run(high, channels_last(hidden[:, :, left - first : right - first]))
                scale = self.hop // rate
                yield y[:, :, (inner - left) * scale : (end - left) * scale].float()

    @property
    def encoder_halo(self) -> int:
        """Latent frames on each side that an encoded frame's samples reach into."""
        smoothing = SLOW_REACH if self.config.slow_channels else 0
        return math.ceil(_reach(list(self.encoder.layers)) / self.hop) + smoothing

    def prepare_for_inference(self) -> VAE:
        """Fold weight norm and Snake's frequencies into the convolutions and stop gradients; returns self."""
        for module in list(self.modules()):
            if isinstance(module, WeightNormConv1d):
                module.fold()
        for module in list(self.modules()):
            if isinstance(module, nn.Sequential):
                _fold_snakes(module)
        return self.eval().requires_grad_(False)

    def _posterior(self, hidden: Tensor) -> Posterior:
        # softplus and the KL's logarithm lose too much in bf16
        mean, scale = hidden.float().chunk(2, dim=1)
        if slow := self.config.slow_channels:
            mean = torch.cat((smooth(mean[:, :slow]), mean[:, slow:]), 1)
        return Posterior(mean, F.softplus(scale) + 1e-4)

    def _check_latents(self, latents: Tensor) -> None:
        if latents.ndim != 3 or latents.shape[1] != self.config.latent_channels or latents.shape[2] == 0:
            raise ValueError(f"expected latents (B, {self.config.latent_channels}, F), got {tuple(latents.shape)}")


def smooth(x: Tensor) -> Tensor:
    """Low-pass (B, C, F) over time: -3 dB at 0.09, -24 dB at 0.25 and nothing left at 0.5 cycles per frame."""
    size = 2 * SLOW_REACH
    taps = torch.tensor([math.comb(size, k) / 2**size for k in range(size + 1)], dtype=x.dtype, device=x.device)
    channels = x.shape[1]
    padded = F.pad(x, (SLOW_REACH, SLOW_REACH), mode="replicate")
    return F.conv1d(padded, taps.expand(channels, 1, -1), groups=channels)


def _fold_snakes(layers: nn.Sequential) -> None:
    """Leave sin(u)^2 + u of every Snake; its frequency goes to the convolution before, its inverse to the one after."""
    for index, layer in enumerate(layers):
        if not isinstance(layer, Snake):
            continue
        before, after = layers[index - 1] if index else None, layers[index + 1]
        assert isinstance(after, WeightNormConv1d)
        alpha = layer.alpha.data.float().flatten()
        alpha = torch.where(alpha.abs() < 1e-6, 1e-6, alpha)
        after.scale(inputs=alpha.reciprocal())
        if isinstance(before, WeightNormConv1d):
            before.scale(outputs=alpha)
            layers[index] = FoldedSnake(None)
        else:
            layers[index] = FoldedSnake(alpha.view(1, -1, 1))


def _run(layers: list[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _convolutions(layers: list[nn.Module]) -> list[WeightNormConv1d]:
    return [m for layer in layers for m in layer.modules() if isinstance(m, WeightNormConv1d)]


def _check_chunks(frames: int) -> None:
    if frames < 1:
        raise ValueError(f"chunk_frames must be at least 1, got {frames}")


def _reach(layers: list[nn.Module]) -> int:
    """Input samples on each side of an output sample's own position that it depends on (one-sided receptive field)."""
    reach = 0
    for conv in reversed(_convolutions(layers)):
        if conv.transposed:
            reach = math.ceil((reach + conv.kernel_size - conv.padding) / conv.stride)
        else:
            reach = reach * conv.stride + max(conv.padding, conv.dilation * (conv.kernel_size - 1) - conv.padding)
    return reach
