"""Snake activation (Ziyin et al. 2020, arXiv 2006.08195, eq. 1) with one frequency per channel."""

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

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            # Inductor fuses the formula, forward and backward, into one pass each.
            return x + (self.alpha * x).sin().square() / (self.alpha + _EPS)
        if torch.is_grad_enabled() and (x.requires_grad or self.alpha.requires_grad):
            return _RecomputingSnake.apply(x, self.alpha)
        wave = (x * self.alpha.to(x.dtype)).sin_().square_()
        return torch.addcmul(x, wave, (self.alpha.float() + _EPS).reciprocal().to(x.dtype))


class FoldedSnake(nn.Module):
    """Snake for inference between convolutions that absorb its factors: u + sin(u)^2, u = alpha x.

    Snake is (u + sin(u)^2) / alpha: the next convolution absorbs the division and the previous one the product, unless
    x is used elsewhere too, when `frequency` (1, C, 1) does it here: two or three passes over memory, not four.
    Without `frequency` the input is overwritten. `frequency` stays float32 whatever type the module is moved to.
    """

    frequency: Tensor | None

    def __init__(self, frequency: Tensor | None):
        super().__init__()
        self.register_buffer("frequency", frequency)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FoldedSnake:
        exact = self.frequency
        super()._apply(fn, recurse)
        if exact is not None and self.frequency is not None:
            self.frequency = exact.to(self.frequency.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        u = x if self.frequency is None else x * self.frequency
        wave = u.sin()
        return u.addcmul_(wave, wave)


class _RecomputingSnake(torch.autograd.Function):
    """Snake that saves only x for the backward pass, where it recomputes sin(2 alpha x), instead of four tensors."""

    @staticmethod
    def forward(ctx, x: Tensor, alpha: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, alpha)
        wave = (x * alpha.to(x.dtype)).sin_().square_()
        return torch.addcmul(x, wave, (alpha + _EPS).reciprocal().to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, alpha = ctx.saved_tensors
        inverse = (alpha + _EPS).reciprocal()
        frequency = alpha.to(x.dtype)
        # d/dx = 1 + sin(2 alpha x) alpha / (alpha + eps)
        double = (x * (2 * frequency)).sin_()
        grad_x = torch.addcmul(grad, grad * double, (alpha * inverse).to(x.dtype))
        # d/dalpha = x sin(2 alpha x) / (alpha + eps) - sin(alpha x)^2 / (alpha + eps)^2
        first = (grad * x * double).sum((0, 2), keepdim=True, dtype=torch.float32)
        wave = (x * frequency).sin_().square_()
        second = (grad * wave).sum((0, 2), keepdim=True, dtype=torch.float32)
        return grad_x, (first * inverse - second * inverse.square()).to(alpha.dtype)
