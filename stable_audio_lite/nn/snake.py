"""Snake activation (Ziyin et al. 2020, arXiv 2006.08195, eq. 1) with one frequency per channel.

`SnakeBeta` has a second parameter for the height of the wave (Lee et al. 2023, arXiv 2206.04658, as implemented).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

_EPS = 1e-9  # as in descript-audio-codec, so that its weights give its output


class Snake(nn.Module):
    """x + sin(alpha x)^2 / alpha over (B, C, T); `alpha` has shape (1, C, 1)."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Frequency and divisor of the wave, each (1, C, 1)."""
        return self.alpha, self.alpha

    def forward(self, x: Tensor) -> Tensor:
        frequency, divisor = self.factors()
        if torch.compiler.is_compiling():
            # Inductor fuses the formula, forward and backward, into one pass each.
            return x + (frequency * x).sin().square() / (divisor + _EPS)
        if torch.is_grad_enabled() and (x.requires_grad or self.alpha.requires_grad):
            return _RecomputingSnake.apply(x, frequency, divisor)
        wave = (x * frequency.to(x.dtype)).sin_().square_()
        return torch.addcmul(x, wave, (divisor.float() + _EPS).reciprocal().to(x.dtype))


class SnakeBeta(Snake):
    """x + sin(exp(alpha) x)^2 / exp(beta) over (B, C, T); `alpha` and `beta` have shape (1, C, 1)."""

    def __init__(self, channels: int):
        super().__init__(channels)
        nn.init.zeros_(self.alpha)
        self.beta = nn.Parameter(torch.zeros(1, channels, 1))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.alpha.exp(), self.beta.exp()


class FoldedSnake(nn.Module):
    """Snake for inference between convolutions that absorb its factors: u + ratio sin(u)^2, u = frequency x.

    Snake is that divided by the frequency: the next convolution absorbs the division and the previous one the product,
    unless x is used elsewhere too, when `frequency` (1, C, 1) does it here. Without `frequency` the input is
    overwritten. `ratio` (1, C, 1), frequency over divisor, is only given where it isn't 1. Both stay float32 whatever
    type the module is moved to. The wave is computed in that type, at first `dtype`: in bf16 it takes half as long
    on an EPYC, and costs starter-vae a decibel of the 48 by which rounding lies below the sound.
    """

    frequency: Tensor | None
    ratio: Tensor | None
    moved: Tensor

    def __init__(self, frequency: Tensor | None, ratio: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("frequency", frequency)
        self.register_buffer("ratio", ratio)
        self.register_buffer("moved", torch.empty(0, dtype=dtype), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FoldedSnake:
        exact = {name: getattr(self, name) for name in ("frequency", "ratio")}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            if value is not None:
                self._buffers[name] = value.to(self.moved.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        u = x if self.frequency is None else (x * self.frequency).to(self.moved.dtype)
        wave = u.sin()
        if self.ratio is None:
            return u.addcmul_(wave, wave)
        return u.addcmul_(wave.square_(), self.ratio.to(u.dtype))


class _RecomputingSnake(torch.autograd.Function):
    """Snake that saves only x for the backward pass, where it recomputes sin(2 a x), instead of four tensors."""

    @staticmethod
    def forward(ctx, x: Tensor, frequency: Tensor, divisor: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, frequency, divisor)
        wave = (x * frequency.to(x.dtype)).sin_().square_()
        return torch.addcmul(x, wave, (divisor + _EPS).reciprocal().to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        x, frequency, divisor = ctx.saved_tensors
        inverse = (divisor + _EPS).reciprocal()
        a = frequency.to(x.dtype)
        # With frequency a and divisor b: d/dx = 1 + sin(2 a x) a / (b + eps)
        double = (x * (2 * a)).sin_()
        grad_x = torch.addcmul(grad, grad * double, (frequency * inverse).to(x.dtype))
        # d/da = x sin(2 a x) / (b + eps), d/db = -sin(a x)^2 / (b + eps)^2
        first = (grad * x * double).sum((0, 2), keepdim=True, dtype=torch.float32) * inverse
        wave = (x * a).sin_().square_()
        second = (grad * wave).sum((0, 2), keepdim=True, dtype=torch.float32) * inverse.square()
        return grad_x, first.to(frequency.dtype), -second.to(divisor.dtype)
