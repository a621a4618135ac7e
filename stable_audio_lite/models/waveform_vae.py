"""The paper's VAE, on waveforms: descript-audio-codec's encoder and decoder without a quantizer.

Kumar et al. 2023 (arXiv 2306.06546) describe the blocks, Evans et al. 2024 (arXiv 2402.04825, section 3.1) the
bottleneck; `blocks: oobleck` is the variant of Evans et al. 2024b (arXiv 2407.14358), Stable Audio Open's. Reads
upward: residual unit, blocks, encoder and decoder, VAE.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from stable_audio_lite.models.vae import VAE, Posterior, check_chunks
from stable_audio_lite.nn.conv import WeightNormConv1d, WeightNormConvTranspose1d, channels_last
from stable_audio_lite.nn.snake import FoldedSnake, Snake, SnakeBeta

_DILATIONS = (1, 3, 9)
_AT_ONCE, _AT_ONCE_ON_GPU = 32, 256  # latent frames: their activations stay in the cache; a GPU is kept busy
_LOW_AT_ONCE = 512  # of which the layers of the lowest rate decode more


@dataclass(frozen=True, kw_only=True)
class WaveformVAEConfig:
    """Shape of the VAE.

    Attributes:
        kind: which VAE this is.
        audio_channels: channels of the waveform, 2 for stereo.
        encoder_width: channels after the encoder's first convolution; they double at each stride.
        decoder_width: channels after the decoder's first convolution; they halve at each stride.
        strides: of the encoder's blocks, all even; the decoder uses them in reverse order.
        latent_channels: channels of the latent.
        blocks: "dac" as above; "oobleck": the outermost stride keeps the channels, Snakes have two parameters, the
            encoder ends in its last convolution, and the decoder's last has no bias.
        tanh: whether the decoder ends in a tanh, which keeps the sound within -1..1.
    """

    kind: Literal["waveform"] = "waveform"
    audio_channels: int = 2
    encoder_width: int = 128
    decoder_width: int = 1536
    strides: tuple[int, ...] = (4, 4, 8, 8)
    latent_channels: int = 64
    blocks: Literal["dac", "oobleck"] = "dac"
    tanh: bool = False

    def __post_init__(self) -> None:
        if not self.strides or any(s < 2 or s % 2 for s in self.strides):
            raise ValueError(f"strides must be even and at least 2, got {self.strides}")
        if min(self.audio_channels, self.encoder_width, self.latent_channels) < 1:
            raise ValueError("audio_channels, encoder_width and latent_channels must be at least 1")
        if self.decoder_width < 1 or self.decoder_width % self.multipliers[-1]:
            raise ValueError(f"decoder_width must be a multiple of {self.multipliers[-1]}, got {self.decoder_width}")

    @property
    def hop(self) -> int:
        """Samples per latent frame."""
        return math.prod(self.strides)

    @property
    def multipliers(self) -> tuple[int, ...]:
        """Channels before the first stride and after each, in units of the outermost."""
        doubled = tuple(2**i for i in range(len(self.strides) + 1))
        return doubled if self.blocks == "dac" else (1, *doubled[:-1])

    @property
    def snake(self) -> type[Snake]:
        """The activation."""
        return Snake if self.blocks == "dac" else SnakeBeta


class ResidualUnit(nn.Module):
    """Snake, dilated k7 convolution, Snake, k1 convolution, added to the input."""

    def __init__(self, channels: int, dilation: int, snake: type[Snake]):
        super().__init__()
        self.layers = nn.Sequential(
            snake(channels),
            WeightNormConv1d(channels, channels, 7, dilation=dilation, padding=3 * dilation),
            snake(channels),
            # Near the identity at the start, so that depth does not amplify the signal.
            WeightNormConv1d(channels, channels, 1, gain=0.125),
        )

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layers[0], Snake):
            return x + self.layers(x)
        # Prepared for inference, the sum stays float32 with bf16 weights too: rounding it in each unit would cost 3 dB.
        return self.layers(x).float().add_(x)


class EncoderBlock(nn.Module):
    """Encoder block: three residual units, Snake, strided convolution."""

    def __init__(self, channels: int, out_channels: int, stride: int, snake: type[Snake]):
        super().__init__()
        self.layers = nn.Sequential(
            *(ResidualUnit(channels, d, snake) for d in _DILATIONS),
            snake(channels),
            WeightNormConv1d(channels, out_channels, 2 * stride, stride=stride, padding=stride // 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class DecoderBlock(nn.Module):
    """Decoder block: Snake, transposed convolution, three residual units."""

    def __init__(self, channels: int, out_channels: int, stride: int, snake: type[Snake]):
        super().__init__()
        self.layers = nn.Sequential(
            snake(channels),
            WeightNormConvTranspose1d(channels, out_channels, 2 * stride, stride=stride, padding=stride // 2),
            *(ResidualUnit(out_channels, d, snake) for d in _DILATIONS),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class WaveformEncoder(nn.Module):
    """(B, audio_channels, T) -> (B, 2 latent_channels, T / hop): mean and scale."""

    def __init__(self, config: WaveformVAEConfig):
        super().__init__()
        widths = [config.encoder_width * m for m in config.multipliers]
        # Music is far below full scale: amplify it to where Snake is nonlinear.
        layers: list[nn.Module] = [WeightNormConv1d(config.audio_channels, widths[0], 7, padding=3, gain=8.0)]
        for stride, (channels, out_channels) in zip(config.strides, pairwise(widths), strict=True):
            layers.append(EncoderBlock(channels, out_channels, stride, config.snake))
        width, out_channels = widths[-1], 2 * config.latent_channels
        last = WeightNormConv1d(width, width if config.blocks == "dac" else out_channels, 3, padding=1)
        self.layers = nn.Sequential(*layers, config.snake(width), last)
        # At first the noise must not drown the mean: unit gain for the mean, std = softplus(-3) = 0.05.
        bias = torch.zeros(out_channels)
        bias[config.latent_channels :] = -3.0
        if config.blocks == "oobleck":
            self.project: nn.Module = nn.Identity()
            last.bias = nn.Parameter(bias)
            nn.init.zeros_(last.weight_g.data[config.latent_channels :])
            return
        self.project = project = nn.Conv1d(width, out_channels, 1)
        means, scales = project.weight.data.chunk(2)
        nn.init.normal_(means, std=2 / math.sqrt(width))
        nn.init.zeros_(scales)
        project.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.layers(channels_last(x)))


class WaveformDecoder(nn.Module):
    """(B, latent_channels, F) -> (B, audio_channels, F * hop)."""

    def __init__(self, config: WaveformVAEConfig):
        super().__init__()
        widths = [config.decoder_width * m // config.multipliers[-1] for m in reversed(config.multipliers)]
        layers: list[nn.Module] = [WeightNormConv1d(config.latent_channels, widths[0], 7, padding=3)]
        for stride, (channels, out_channels) in zip(reversed(config.strides), pairwise(widths), strict=True):
            layers.append(DecoderBlock(channels, out_channels, stride, config.snake))
        # Untrained output at the level of music rather than of full scale.
        bias = config.blocks == "dac"
        layers += [
            config.snake(widths[-1]),
            WeightNormConv1d(widths[-1], config.audio_channels, 7, padding=3, gain=0.1, bias=bias),
        ]
        if config.tanh:
            layers.append(nn.Tanh())
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(channels_last(z))


class WaveformVAE(VAE):
    """The paper's VAE; its training compares waveforms."""

    config: WaveformVAEConfig
    encoder: WaveformEncoder
    encode_frames = 512  # long beside the context on both sides, nine frames at the paper's size, that is encoded again

    def __init__(self, config: WaveformVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = WaveformEncoder(config)
        self.decoder = WaveformDecoder(config)

    def forward(self, audio: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        posterior = self.encode(audio)
        return self.decode(posterior.mean + posterior.std * noise), posterior.mean, posterior.std

    def target(self, audio: Tensor) -> Tensor:
        return audio

    def _encode(self, audio: Tensor) -> Posterior:
        """As `VAE._encode`; without gradients the layers of the higher rates run over pieces, as in `decode_stream`."""
        x, layers = audio.to(self._dtype), self.encoder.layers
        if torch.is_grad_enabled():
            return Posterior.of(self.encoder(x))
        high, low, pieces = layers[:-3], layers[-3:], []
        frames, rate = x.shape[2] // self.hop, self.config.strides[-1]
        halo, at_once = math.ceil(_receptive_field(high) / self.hop), _at_once(x)
        for start in range(0, frames, at_once):
            stop = min(start + at_once, frames)
            left, right = max(start - halo, 0), min(stop + halo, frames)
            hidden = high(channels_last(x[:, :, left * self.hop : right * self.hop]))
            pieces.append(hidden[:, :, (start - left) * rate : (stop - left) * rate])
        return Posterior.of(self.encoder.project(low(channels_last(torch.cat(pieces, 2)))))

    def decode(self, latents: Tensor) -> Tensor:
        self.check_latents(latents)
        return self.decoder(latents.to(self._dtype))

    def decode_stream(
        self, latents: Tensor, chunk_frames: int | None = None, frames: int | None = None
    ) -> Iterator[Tensor]:
        """Yield what `decode` returns in successive pieces (B, audio_channels, chunk_frames * hop), in float32.

        By default a piece is of 32 frames, or on a GPU up to 256.

        The layers of the lowest rate, whose receptive field spans whole frames, run over long pieces; the others, whose
        receptive field is a fraction of a frame but whose activations are large, run over pieces of `chunk_frames`
        frames. Each piece is computed with all the context that it depends on, so the pieces equal the whole.
        """
        chunk_frames = _at_once(latents) if chunk_frames is None else chunk_frames
        check_chunks(chunk_frames)
        self.check_latents(latents)
        x = latents.to(self._dtype)
        low, high = self.decoder.layers[:2], self.decoder.layers[2:]
        rate = self.config.strides[-1]
        halo_low, halo_high = _receptive_field(low), _receptive_field(high)
        outer = chunk_frames * max(_LOW_AT_ONCE // chunk_frames, 1)
        total = x.shape[2] if frames is None else min(frames, x.shape[2])
        for start in range(0, total, outer):
            stop = min(start + outer, total)
            # Rate-`rate` context that the second stage will need on both sides of this piece.
            first = max(start * rate - halo_high, 0)
            last = min(stop * rate + halo_high, x.shape[2] * rate)
            left, right = max(first // rate - halo_low, 0), min(-(-last // rate) + halo_low, x.shape[2])
            hidden = low(channels_last(x[:, :, left:right]))
            hidden = hidden[:, :, first - left * rate : last - left * rate]
            for inner in range(start * rate, stop * rate, chunk_frames * rate):
                end = min(inner + chunk_frames * rate, stop * rate)
                left, right = max(inner - halo_high, first), min(end + halo_high, last)
                y = high(channels_last(hidden[:, :, left - first : right - first]))
                scale = self.hop // rate
                yield y[:, :, (inner - left) * scale : (end - left) * scale].float()

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def encoder_halo(self) -> int:
        return math.ceil(_receptive_field(self.encoder.layers) / self.hop)

    def prepare_for_inference(self) -> WaveformVAE:
        """Fold weight norm and Snake's frequencies into the convolutions and stop gradients; returns self."""
        for module in list(self.modules()):
            if isinstance(module, WeightNormConv1d):
                module.fold()
        for module in list(self.modules()):
            if isinstance(module, nn.Sequential):
                _fold_snakes(module)
        return self.eval().requires_grad_(False)


def _at_once(x: Tensor) -> int:
    """Latent frames of (B, ..., T) data whose higher rates are computed at once."""
    return max(_AT_ONCE, _AT_ONCE_ON_GPU // len(x)) if x.is_cuda else _AT_ONCE


def _fold_snakes(layers: nn.Sequential) -> None:
    """Reduce every Snake to one of u: its frequency moves to the convolution before, the inverse to that after."""
    for index, layer in enumerate(layers):
        if not isinstance(layer, Snake):
            continue
        before, after = layers[index - 1] if index else None, layers[index + 1]
        assert isinstance(after, WeightNormConv1d)
        frequency, divisor = (factor.detach().float().flatten() for factor in layer.factors())
        alpha = torch.where(frequency.abs() < 1e-6, 1e-6, frequency)
        ratio = (alpha / divisor).view(1, -1, 1) if isinstance(layer, SnakeBeta) else None
        after.scale(inputs=alpha.reciprocal())
        if isinstance(before, WeightNormConv1d):
            before.scale(outputs=alpha)
            layers[index] = FoldedSnake(None, ratio, after.folded.dtype)
        else:
            layers[index] = FoldedSnake(alpha.view(1, -1, 1), ratio, after.folded.dtype)


def _receptive_field(layers: nn.Module) -> int:
    """One-sided receptive field: the input samples on each side of an output sample's position that it depends on."""
    context = 0
    for conv in reversed([m for m in layers.modules() if isinstance(m, WeightNormConv1d)]):
        if conv.transposed:
            context = math.ceil((context + conv.kernel_size - conv.padding) / conv.stride)
        else:
            context = context * conv.stride + max(conv.padding, conv.dilation * (conv.kernel_size - 1) - conv.padding)
    return context
