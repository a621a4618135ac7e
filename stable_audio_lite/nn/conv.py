"""Weight-normalised 1-D convolutions that keep activations channels-last in memory.

A convolution over (B, C, T) runs as a 2-D one over (B, C, 1, T): the fast bf16 kernels of oneDNN and cuDNN take
channels-last images, and on 16 to 64 channels they are two to six times as fast as the 1-D path. The layout travels in
the strides of the (B, C, T) tensors, so element-wise layers need not know of it; `channels_last` sets it once at entry.
cuDNN's take channels in eights alone; for the two of a waveform in bf16 it has a kernel that takes twenty times as long
as all others of the paper's encoder.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def channels_last(x: Tensor) -> Tensor:
    """The same (B, C, T) tensor with C innermost in memory."""
    return x.unsqueeze(2).contiguous(memory_format=torch.channels_last).squeeze(2)


def _suits_images(x: Tensor) -> bool:
    """Tell whether (B, C, T) can be convolved fast with C innermost."""
    return not x.is_cuda or x.shape[1] % 8 == 0


class WeightNormConv1d(nn.Module):
    """Convolution with weight = g v / |v| per output channel (Salimans & Kingma 2016, eq. 2).

    Parameters are named `weight_g`, `weight_v` and `bias`, as in torch's classic weight norm and so in DAC's files.
    `fold` replaces g and v by one `weight` for inference. `gain` scales g at the start. Without `bias` it stays zero.
    """

    bias: Tensor
    transposed = False
    _axes = (1, 0)  # of inputs and outputs in the folded weight

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        padding: int = 0,
        gain: float = 1.0,
        bias: bool = True,
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
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_channels))
        else:
            self.register_buffer("bias", torch.zeros(out_channels), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The normalised weight, (out, in, k), or (in, out, k) of a transposed convolution."""
        return torch._weight_norm(self.weight_v, self.weight_g, 0)

    @property
    def is_folded(self) -> bool:
        """True once `fold` has been called."""
        return "folded" in self._parameters

    def fold(self) -> None:
        """Replace g and v by one weight, laid out for speed; there is no training after that."""
        if self.is_folded:
            return
        weight = torch._weight_norm(self.weight_v.detach().float(), self.weight_g.detach().float(), 0)
        weight = self._arrange(weight.to(self.weight_v.dtype))
        del self.weight_g, self.weight_v
        self.folded = nn.Parameter(weight, requires_grad=False)

    def scale(self, *, inputs: Tensor | None = None, outputs: Tensor | None = None) -> None:
        """Scale the folded weight as if inputs or outputs were multiplied by (C,) factors."""
        weight, bias = self.folded.data.float(), self.bias.data.float()
        for factors, axis in zip((inputs, outputs), self._axes, strict=True):
            if factors is not None:
                weight = weight * factors.view([-1 if i == axis else 1 for i in range(weight.ndim)])
        if outputs is not None:
            bias = bias * outputs
        self.folded.data, self.bias.data = weight.to(self.folded.dtype), bias.to(self.bias.dtype)

    def _arrange(self, weight: Tensor) -> Tensor:
        return channels_last(weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, T) -> (B, out, T')."""
        # Element-wise layers may pass float32 on to folded bf16 weights.
        weight, x = (self.folded, x.to(self.folded.dtype)) if self.is_folded else (self.weight, x)
        if not _suits_images(x):
            return channels_last(self._as_1d(x, weight))
        y = F.conv2d(
            x.unsqueeze(2), weight.unsqueeze(2), self.bias, (1, self.stride), (0, self.padding), (1, self.dilation)
        )
        return y.squeeze(2)

    def _as_1d(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve with T innermost in memory."""
        return F.conv1d(x.contiguous(), weight.contiguous(), self.bias, self.stride, self.padding, self.dilation)


class WeightNormConvTranspose1d(WeightNormConv1d):
    """Transposed convolution with kernel_size = 2 * stride; as in torch, the norm is taken per input channel."""

    transposed = True
    _axes = (3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, T) -> (B, out, T * stride), for padding = stride / 2."""
        if not self.is_folded:
            y = F.conv_transpose2d(
                x.unsqueeze(2), self.weight.unsqueeze(2), self.bias, (1, self.stride), (0, self.padding)
            )
            return y.squeeze(2)
        y = self._neighbours(x.to(self.folded.dtype))  # B, T + 1, stride * out
        y = y.unflatten(-1, (self.stride, -1)).flatten(1, 2)
        return y[:, self.padding : self.padding + x.shape[2] * self.stride].transpose(1, 2)

    def _arrange(self, weight: Tensor) -> Tensor:
        # (stride, out, 2, in): for each of `stride` outputs, the taps of the input before and of the present one.
        return weight.unflatten(2, (2, self.stride)).flip(2).permute(3, 1, 2, 0).contiguous()

    def _neighbours(self, x: Tensor) -> Tensor:
        """Convolve (B, in, T) with two taps, since `stride` outputs depend on two neighbouring inputs.

        Libraries take several times as long for the few long kernels of a decoder, mostly to rearrange weights.
        """
        weight, bias = self.folded.flatten(0, 1), self.bias.repeat(self.stride)  # (stride * out, 2, in)
        if self._is_long(x):
            as_image = weight.transpose(1, 2).unsqueeze(2)
            return F.conv2d(x.unsqueeze(2), as_image, bias, padding=(0, 1)).squeeze(2).transpose(1, 2)
        frames = F.pad(x.transpose(1, 2), (0, 0, 1, 1))  # B, T + 2, in
        return F.linear(torch.cat((frames[:, :-1], frames[:, 1:]), -1), weight.flatten(1), bias)

    def _is_long(self, x: Tensor) -> bool:
        """Tell whether rearranging the weights for two taps costs less than stacking (B, in, T) for one product.

        It takes a share of the product's time that falls with the data's length, and is larger where products are fast.
        """
        enough = x.shape[1] // 4 if x.dtype == torch.float32 else 2 * x.shape[1]
        return not x.is_cuda and len(x) * x.shape[2] > enough
