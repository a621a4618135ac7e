"""Layers over (B, T, C), frames with their channels innermost in memory, of which the 1-D U-Net is made.

A convolution is one matrix product over stacked shifts, or of an image with C innermost, and so runs at that speed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MANY_FRAMES, _MANY_WEIGHTS = 512, 2**20  # from which on a convolution is faster as an image


class GroupNorm(nn.Module):
    """Group norm over (B, T, C) with an optional FiLM: statistics in float32, then one multiply-add."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, film: Tensor | None = None) -> Tensor:
        """Normalise x (B, T, C); `film` (B, 2C) holds a scale around 0 and a shift."""
        wide = x.float()
        per_group = (self.groups, -1)
        mean = wide.mean(1).unflatten(-1, per_group).mean(-1, keepdim=True)  # B, G, 1
        power = wide.square().mean(1).unflatten(-1, per_group).mean(-1, keepdim=True)
        inverse_std = torch.rsqrt((power - mean.square()).clamp(min=0) + self.eps)
        scale = self.weight.float().unflatten(-1, per_group) * inverse_std  # B, G, C/G
        shift = (self.bias.float().unflatten(-1, per_group) - mean * scale).flatten(1)
        scale = scale.flatten(1)
        if film is not None:
            film_scale, film_shift = film.float().chunk(2, dim=-1)
            scale, shift = scale * (1 + film_scale), shift * (1 + film_scale) + film_shift
        return torch.addcmul(shift[:, None].to(x.dtype), x, scale[:, None].to(x.dtype))


class Conv(nn.Module):
    """Convolution over (B, T, C) -> (B, T / stride, C'), mostly as one matrix product over stacked shifts.

    The weight (C', kernel * C) is stored as that product wants it. T must be a multiple of `stride`.
    """

    def __init__(self, channels: int, out_channels: int, *, kernel: int, stride: int = 1, zero: bool = False) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.weight = nn.Parameter(torch.empty(out_channels, kernel * channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.normal_(self.weight, std=0.0 if zero else (kernel * channels) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve; the padding keeps T / stride frames, an odd one going to the left."""
        if self._suits_image(x):
            weight = self.weight.unflatten(1, (3, -1)).transpose(1, 2).unsqueeze(2)  # C', C, 1, 3
            image = F.conv2d(x.transpose(1, 2).unsqueeze(2), weight, self.bias, padding=(0, 1))
            return image.squeeze(2).transpose(1, 2)
        if self.kernel > 1:
            frames, padding = x.shape[1] // self.stride, self.kernel - self.stride
            right = padding // 2
            x = F.pad(x, (0, 0, padding - right, right))
            last = (frames - 1) * self.stride + 1
            x = torch.cat([x[:, k : k + last : self.stride] for k in range(self.kernel)], dim=-1)
        return F.linear(x, self.weight, self.bias)

    def _suits_image(self, x: Tensor) -> bool:
        """Tell where (B, T, C) is faster convolved as an image with C innermost: on a processor, without gradients.

        Nothing is stacked then, but weights are rearranged at each call, which pays if they and the frames are many.
        """
        if x.device.type != "cpu" or torch.is_grad_enabled() or (self.kernel, self.stride) != (3, 1):
            return False
        return len(x) * x.shape[1] >= _MANY_FRAMES and self.weight.numel() >= _MANY_WEIGHTS


class Upsample(nn.Module):
    """Transposed convolution over (B, T, C) -> (B, T * factor, C') with kernel 2 * factor.

    Each frame makes 2 * factor output frames, of which the second half adds to the next frame's first half.
    The weight is (2 * factor * C', C).
    """

    def __init__(self, channels: int, out_channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.weight = nn.Parameter(torch.empty(2 * factor * out_channels, channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.normal_(self.weight, std=(2 * channels) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.shape[1]
        first, second = F.linear(x, self.weight).unflatten(-1, (2, self.factor, -1)).unbind(2)  # B, T, factor, C'
        x = (F.pad(first, (0, 0, 0, 0, 0, 1)) + F.pad(second, (0, 0, 0, 0, 1, 0))).flatten(1, 2)
        start = self.factor - self.factor // 2
        return x[:, start : start + frames * self.factor] + self.bias


class TimeFeatures(nn.Module):
    """Time t (B,) -> (B, width + 1): t itself and its sine and cosine at learned frequencies, in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(width // 2))

    def forward(self, t: Tensor) -> Tensor:
        t = t.float()[:, None]
        angles = 2 * math.pi * t * self.frequencies.float()
        return torch.cat((t, angles.sin(), angles.cos()), dim=-1)
