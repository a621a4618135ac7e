"""Weight-normalised 1-D convolutions that keep activations channels-last in memory.

A convolution over (B, C, T) runs as a 2-D one over (B, C, 1, T): the fast bf16 kernels of oneDNN and cuDNN take
channels-last images, and on 16 to 64 channels they are two to six times as fast as the 1-D path. The layout travels in
the strides of the (B, C, T) tensors, so element-wise layers need not know of it; `channels_last` sets it once at entry.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def channels_last(x: Tensor) -> Tensor:
    """The same (B, C, T) tensor with C innermost in memory."""
    return x.unsqueeze(2).contiguous(memory_format=torch.channels_last).squeeze(2)


class WeightNormConv1d(nn.Module):
    """Convolution with weight = g v / |v| per output channel (Salimans & Kingma 2016, eq. 2).

    Parameters are named `weight_g`, `weight_v` and `bias`, as in torch's classic weight norm and so in DAC's files.
    `fold` replaces g and v by one `weight` for inference. `gain` scales g at the start.
    """

    transposed = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        padding: int = 0,
        gain: float = 1.0,
    ):
        super().__init__()
        self.stride, self.dilation, self.padding, self.kernel_size = stride, dilation, padding, kernel_size
        shape = (in_channels, out_channels) if self.transposed else (out_channels, in_channels)
        v = torch.empty(*shape, kernel_size)
        # A fixed spread would starve narrow networks of signal and flood wide ones; fan-in scaling fits both.
        fan_in = in_channels * kernel_size / (stride if self.transposed else 1)
        nn.init.trunc_normal_(v, std=0.8 / math.sqrt(fan_in), a=-2.0, b=2.0)
        self.weight_g = nn.Parameter(gain * v.flatten(1).norm(dim=1).view(-1, 1, 1))
        self.weight_v = nn.Parameter(v)
        self.bias = nn.Parameter(torch.zeros(out_channels))

    @property
    def weight(self) -> Tensor:
        """The normalised weight, (out, in, k), or (in, out, k) of a transposed convolution."""
        folded = self._parameters.get("folded")
        if folded is not None:
            return folded
        return torch._weight_norm(self.weight_v, self.weight_g, 0)

    def fold(self) -> None:
        """Replace g and v by their product, channels-last; training can't go on after that."""
        if "folded" in self._parameters:
            return
        weight = torch._weight_norm(self.weight_v.detach().float(), self.weight_g.detach().float(), 0)
        weight = channels_last(weight.to(self.weight_v.dtype))
        del self.weight_g, self.weight_v
        self.folded = nn.Parameter(weight, requires_grad=False)

    def scale(self, *, inputs: Tensor | None = None, outputs: Tensor | None = None) -> None:
        """Multiply the folded weight so that inputs come, or outputs leave, multiplied by (C,) factors."""
        into, out = (0, 1) if self.transposed else (1, 0)
        weight, bias = self.folded.data.float(), self.bias.data.float()
        if inputs is not None:
            weight = weight * inputs.view([-1 if axis == into else 1 for axis in range(3)])
        if outputs is not None:
            weight = weight * outputs.view([-1 if axis == out else 1 for axis in range(3)])
            bias = bias * outputs
        self.folded.data = channels_last(weight.to(self.folded.dtype))
        self.bias.data = bias.to(self.bias.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, T) -> (B, out, T')."""
        y = F.conv2d(
            x.unsqueeze(2),
            self.weight.unsqueeze(2),
            self.bias,
            (1, self.stride),
            (0, self.padding),
            (1, self.dilation),
        )
        return y.squeeze(2)


class WeightNormConvTranspose1d(WeightNormConv1d):
    """Transposed convolution; as in torch, the norm is taken per input channel."""

    transposed = True

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, T) -> (B, out, T * stride), for kernel_size = 2 * stride and padding = stride / 2."""
        y = F.conv_transpose2d(x.unsqueeze(2), self.weight.unsqueeze(2), self.bias, (1, self.stride), (0, self.padding))
        return y.squeeze(2)
