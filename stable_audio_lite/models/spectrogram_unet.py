"""The 2-D U-Net over complex spectrograms of Saito et al. 2022 (arXiv 2211.04124), which predicts the noise in them.

It is the U-Net of Dhariwal & Nichol 2021 ("guided diffusion", arXiv 2105.05233) with a layer over the frequency axis
at the end of every residual block (TDF, Choi et al. 2020, arXiv 1912.02591). At the paper's size it has 31,308,642
parameters. Inside, activations are (B, C, T, F), frequency last, so that a TDF is one matrix product.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stable_audio_lite.nn.attention import merge_heads, split_heads
from stable_audio_lite.nn.steps import step_features

_TIME_MULTIPLIER = 4  # width of the time embedding, in units of the base width
MAX_PERIOD = 10_000.0  # of the time's slowest sinusoid, in steps, over 2 pi
MIN_BOTTLENECK = 16  # narrowest bottleneck of a TDF, in bins


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectrogramUNetConfig:
    """Shape of the U-Net; the defaults are the paper's.

    Attributes:
        width: base width; level i has `width * multipliers[i]` channels.
        multipliers: one per level, outermost first; each level halves the bins and frames of the one before.
        blocks: residual blocks of each level on the way down; on the way up there is one more.
        attention: the levels with self-attention, named by their number of bins.
        heads: attention heads.
        tdf: by how much a TDF narrows frequency, never to less than 16 bins; None: no TDF.
        dropout: before the last convolution of a residual block.
        groups: groups of the norms; fewer where a group would have less than two channels.
    """

    width: int = 64
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4, 4)
    blocks: int = 2
    attention: tuple[int, ...] = (32, 16)
    heads: int = 2
    tdf: int | None = 16
    dropout: float = 0.0
    groups: int = 32

    def __post_init__(self) -> None:
        for name in ("width", "blocks", "heads", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % 2:
            raise ValueError(f"width must be even, got {self.width}")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers needs entries of at least 1, got {self.multipliers}")
        if self.tdf is not None and self.tdf < 1:
            raise ValueError(f"tdf must be at least 1, or null for none, got {self.tdf}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")

    @property
    def factor(self) -> int:
        """Total downsampling factor, by which bins and frames must be divisible."""
        return 2 ** (len(self.multipliers) - 1)

    def level_bins(self, bins: int) -> tuple[int, ...]:
        """Bins of each level of a network for `bins`, outermost first.

        Raises:
            ValueError: the levels don't divide `bins`, or `attention` or `heads` doesn't fit them.
        """
        if bins < 1 or bins % self.factor:
            raise ValueError(
                f"bins must be a multiple of {self.factor} for {len(self.multipliers)} multipliers, got {bins}"
            )
        levels = tuple(bins // 2**i for i in range(len(self.multipliers)))
        for wanted in self.attention:
            if wanted not in levels:
                raise ValueError(f"attention names {wanted} bins, but the levels have {', '.join(map(str, levels))}")
            channels = self.width * self.multipliers[levels.index(wanted)]
            if channels % self.heads:
                raise ValueError(f"heads must divide the {channels} channels at {wanted} bins, got {self.heads}")
        return levels


# Layers over (B, C, T, F)


class GroupNorm2d(nn.Module):
    """Group norm with an optional adaptive scale and shift (Dhariwal & Nichol 2021, section 4.3)."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups = math.gcd(groups, max(channels // 2, 1))
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, film: Tensor | None = None) -> Tensor:
        """Normalise x (B, C, T, F), statistics in float32; `film` (B, 2C) holds a scale around 0 and a shift."""
        batch = x.shape[0]
        if film is None:
            return F.group_norm(x, self.groups, self.weight, self.bias, self.eps).to(x.dtype)
        scale, shift = film.to(self.weight.dtype).chunk(2, dim=-1)
        weight, bias = self.weight * (1 + scale), self.bias * (1 + scale) + shift
        # The channels of all items side by side: each item has weights of its own then, and one kernel does it all.
        together = x.flatten(0, 1).unsqueeze(0)
        out = F.group_norm(together, batch * self.groups, weight.flatten(), bias.flatten(), self.eps)
        return out.view_as(x).to(x.dtype)


class TDF(nn.Module):
    """A bottleneck over the frequency axis, the same for every channel and frame (Choi et al. 2020, section 3.3)."""

    def __init__(self, bins: int, divisor: int) -> None:
        super().__init__()
        width = max(bins // divisor, MIN_BOTTLENECK)
        self.layers = nn.Sequential(
            nn.Linear(bins, width),
            nn.LayerNorm(width),
            nn.ReLU(),
            nn.Linear(width, bins),
            nn.LayerNorm(bins),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Transform x (B, C, T, F) and add the result to it."""
        return x + self.layers(x).to(x.dtype)


class Attention2d(nn.Module):
    """Self-attention over all bins and frames, added to its input; adds nothing at first."""

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm2d(groups, channels)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Transform x (B, C, T, F)."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # B, T * F, C
        q, k, v = (split_heads(part, self.heads) for part in self.to_qkv(tokens).chunk(3, dim=-1))
        out = self.to_out(merge_heads(F.scaled_dot_product_attention(q, k, v)))
        return x + out.transpose(1, 2).reshape(x.shape)


class Downsample2d(nn.Module):
    """Strided convolution that halves bins and frames."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, C, T, F) -> (B, C, T / 2, F / 2)."""
        return self.conv(x)


class Upsample2d(nn.Module):
    """Repetition and a convolution, which double bins and frames."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, C, T, F) -> (B, C, 2 T, 2 F)."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def zeroed(layer: nn.Module) -> nn.Module:
    """Set all parameters of a layer to zero; returns the layer."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


# Blocks


class ResidualBlock2d(nn.Module):
    """Two of (norm, SiLU, convolution), the second modulated by the diffusion time, around a skip; then a TDF.

    `bins` is the number of bins of its output.
    """

    def __init__(self, config: SpectrogramUNetConfig, channels: int, out_channels: int, bins: int) -> None:
        super().__init__()
        self.norm_in = GroupNorm2d(config.groups, channels)
        self.conv_in = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.film = nn.Linear(_TIME_MULTIPLIER * config.width, 2 * out_channels)
        self.norm_out = GroupNorm2d(config.groups, out_channels)
        self.dropout = nn.Dropout(config.dropout)
        self.conv_out = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        self.tdf = nn.Identity() if config.tdf is None else TDF(bins, config.tdf)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Transform x (B, C, T, F) given the time embedding (B, E)."""
        hidden = self.conv_in(F.silu(self.norm_in(x)))
        hidden = F.silu(self.norm_out(hidden, self.film(F.silu(embedding))))
        return self.tdf(self.skip(x) + self.conv_out(self.dropout(hidden)))


class Stage(nn.Module):
    """A residual block, attention where the config names the level, and a step to the next level where one follows."""

    def __init__(
        self,
        config: SpectrogramUNetConfig,
        channels: int,
        out_channels: int,
        bins: int,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.block = ResidualBlock2d(config, channels, out_channels, bins)
        attend = bins in config.attention
        self.attention = Attention2d(out_channels, config.heads, config.groups) if attend else nn.Identity()
        self.resample = resample

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Transform x (B, C, T, F) given the time embedding (B, E)."""
        x = self.attention(self.block(x, embedding))
        return x if self.resample is None else self.resample(x, embedding)


# Model


class SpectrogramUNet(nn.Module):
    """U-Net that predicts the noise in noisy spectrograms.

    The TDFs fix the frequency `bins` of its spectrograms, frames are free; `channels` are the real and imaginary part.

    Raises:
        ValueError: the config doesn't fit `bins`.
    """

    def __init__(self, config: SpectrogramUNetConfig, bins: int = 512, channels: int = 2) -> None:
        super().__init__()
        self.config, self.bins, self.channels = config, bins, channels
        time_width = _TIME_MULTIPLIER * config.width
        self.mapping = nn.Sequential(nn.Linear(config.width, time_width), nn.SiLU(), nn.Linear(time_width, time_width))
        levels = list(zip(config.level_bins(bins), (config.width * m for m in config.multipliers), strict=True))

        self.conv_in = nn.Conv2d(channels, config.width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        width, skips = config.width, [config.width]
        for level_bins, level_width in levels:
            for _ in range(config.blocks):
                self.down.append(Stage(config, width, level_width, level_bins))
                width = level_width
                skips.append(width)
            if level_bins > levels[-1][0]:
                self.down.append(Downsample2d(width))
                skips.append(width)
        middle = Stage(config, width, width, level_bins), ResidualBlock2d(config, width, width, level_bins)
        self.middle = nn.ModuleList(middle)
        for level_bins, level_width in reversed(levels):
            for left in reversed(range(config.blocks + 1)):
                step = left == 0 and level_bins < bins
                resample = Upsample2d(level_width) if step else None
                self.up.append(Stage(config, width + skips.pop(), level_width, level_bins, resample))
                width = level_width
        self.norm_out = GroupNorm2d(config.groups, width)
        self.conv_out = zeroed(nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, context: None = None) -> Tensor:
        """Predict the noise, in x's dtype whatever that of the weights; the network is unconditional.

        Takes noisy spectrograms x (B, channels, bins, T) of unit variance, T a multiple of `config.factor`, and step
        indices t (B,), fractions allowed.

        Raises:
            ValueError: x has another shape, or a context is given.
        """
        self._check(x, context)
        dtype = self.conv_in.weight.dtype
        embedding = self.mapping(step_features(t, self.config.width, MAX_PERIOD).to(dtype))
        hidden = self.conv_in(x.to(dtype).transpose(2, 3).contiguous())
        skips = [hidden]
        for layer in self.down:
            hidden = layer(hidden, embedding)
            skips.append(hidden)
        for layer in self.middle:
            hidden = layer(hidden, embedding)
        for layer in self.up:
            hidden = layer(torch.cat((hidden, skips.pop()), dim=1), embedding)
        out = self.conv_out(F.silu(self.norm_out(hidden)))
        return out.transpose(2, 3).contiguous().to(x.dtype)

    def _check(self, x: Tensor, context: object) -> None:
        if context is not None:
            raise ValueError("the spectrogram U-Net takes no context")
        if x.ndim != 4 or x.shape[1:3] != (self.channels, self.bins):
            raise ValueError(f"spectrograms must be (B, {self.channels}, {self.bins}, T), got {tuple(x.shape)}")
        if x.shape[3] < 1 or x.shape[3] % self.config.factor:
            raise ValueError(f"frames must be a multiple of {self.config.factor}, got {x.shape[3]}")
