"""From a trained network to a denoiser, and classifier-free guidance.

A denoiser is a callable (x, sigma) -> x0 with x (B, ...) = x0 + sigma * eps and sigma (B,), all that a sampler knows.
Whatever the network predicts becomes x0 in one place, `to_x0`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from stable_audio_lite.diffusion.schedule import like, sigma_to_t
from stable_audio_lite.nn.attention import Condition

Objective = Literal["v", "eps", "x0"]


class Network(Protocol):
    """What a denoiser asks of a network: a prediction for data, times and a ready context."""

    def __call__(self, x: Tensor, t: Tensor, context: Any) -> Tensor: ...


class Conditional(Network, Protocol):
    """A network that can be guided: it prepares conditions and has learned one that says nothing."""

    def context(self, condition: Condition) -> Any:
        """What its forward takes for `condition`."""
        ...

    def null_condition(self, batch: int) -> Condition:
        """The learned null for `batch` items."""
        ...


def to_x0(objective: Objective, prediction: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    """The clean signal that a prediction stands for.

    Args:
        objective: what was predicted.
        prediction: (B, ...).
        x_t: (B, ...) variance-preserving noisy input, alpha x0 + alpha sigma eps with alpha = 1/sqrt(1 + sigma^2).
        sigma: (B,) noise-to-signal ratios.

    Raises:
        ValueError: the objective is none of v, eps, x0.
    """
    sigma = like(sigma, x_t)
    # From sigma itself: by way of t, cos(pi t/2) would lose its digits where t is near 1.
    alpha = (1 + sigma**2).rsqrt()
    if objective == "v":
        return alpha * x_t - alpha * sigma * prediction
    if objective == "eps":
        return x_t / alpha - sigma * prediction
    if objective == "x0":
        return prediction
    raise ValueError(f"objective must be v, eps or x0, got {objective!r}")


class NetworkDenoiser:
    """A network under one context, as a denoiser.

    Args:
        network: what predicts.
        context: the network's condition, ready for it.
        objective: what it predicts.
        time: from sigma (B,) to the times that it was trained with.
    """

    def __init__(
        self,
        network: Network,
        context: Any = None,
        objective: Objective = "v",
        time: Callable[[Tensor], Tensor] = sigma_to_t,
    ) -> None:
        self.network, self.context = network, context
        self.objective: Objective = objective
        self.time = time

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Estimate x0 from x (B, ...) = x0 + sigma eps, sigma (B,)."""
        x_t = x * like((1 + sigma**2).rsqrt(), x)
        return to_x0(self.objective, self.network(x_t, self.time(sigma), self.context), x_t, sigma)


class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022) with rescaling (Lin et al. 2023, arXiv 2305.08891).

    Both conditions go through the network as one batch, and are projected to keys and values once, here.

    Args:
        network: what predicts.
        cond: what is asked for, of B items.
        negative: what to move away from, of B items; the learned null where None.
        scale: 1 is no guidance (and one plain forward).
        rescale: phi in 0..1, how far each item's standard deviation returns to the unguided one.
        objective: what the network predicts.
        time: from sigma to the times that it was trained with.

    Raises:
        ValueError: rescale is outside 0..1, or cond and negative differ in shape.
    """

    def __init__(
        self,
        network: Conditional,
        cond: Condition,
        negative: Condition | None = None,
        *,
        scale: float,
        rescale: float = 0.0,
        objective: Objective = "v",
        time: Callable[[Tensor], Tensor] = sigma_to_t,
    ) -> None:
        if not 0 <= rescale <= 1:
            raise ValueError(f"rescale must be in 0..1, got {rescale}")
        self.scale, self.rescale = scale, rescale
        if scale != 1:
            other = network.null_condition(len(cond.tokens)) if negative is None else negative
            if other.tokens.shape != cond.tokens.shape:
                shapes = f"{tuple(cond.tokens.shape)} and {tuple(other.tokens.shape)}"
                raise ValueError(f"condition and negative must have the same shape, got {shapes}")
            cond = Condition.concatenate([cond, other])
        self.denoiser = NetworkDenoiser(network, network.context(cond), objective, time)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Estimate x0 from x (B, ...), guided."""
        if self.scale == 1:
            return self.denoiser(x, sigma)
        wanted, unwanted = self.denoiser(torch.cat((x, x)), torch.cat((sigma, sigma))).chunk(2)
        return guide(wanted, unwanted, self.scale, self.rescale)


def guide(wanted: Tensor, unwanted: Tensor, scale: float, rescale: float) -> Tensor:
    """Extrapolate from `unwanted` past `wanted` (B, ...), then rescale per item (Lin et al., equations 14-16)."""
    guided = unwanted + scale * (wanted - unwanted)
    if not rescale:
        return guided
    axes = tuple(range(1, wanted.ndim))
    ratio = wanted.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp(min=1e-8)
    return guided * (rescale * ratio + (1 - rescale))
