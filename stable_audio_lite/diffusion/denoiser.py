"""Denoisers made from trained networks, and classifier-free guidance.

A denoiser is a callable (x, sigma) -> x0 with x (B, ...) = x0 + sigma * eps and sigma (B,). A sampler knows nothing
else about the model.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from stable_audio_lite.diffusion.process import Process, append_dims
from stable_audio_lite.nn.attention import Condition


class Network(Protocol):
    """A network that predicts from noisy data, times and a prepared context."""

    def __call__(self, x: Tensor, t: Tensor, context: Any) -> Tensor: ...


class Conditional(Network, Protocol):
    """A network that can be guided: it prepares conditions and has a learned null condition."""

    @property
    def largest_scale(self) -> float:
        """The largest guidance scale that the network takes as an input; 1 where it takes none."""
        ...

    def context(self, condition: Condition, scale: Tensor | None = None, start: Tensor | None = None) -> Any:
        """Prepare `condition` for the forward pass, with guidance of `scale` (B,) where the network takes it.

        The window begins `start` (B,) frames after the piece does.
        """
        ...

    def null_condition(self, batch: int, mask: Tensor | None = None) -> Condition:
        """The learned null for `batch` items, in place of prompts with `mask` (B, S)."""
        ...

    def unwanted(self, cond: Condition, negative: Condition | None) -> Condition:
        """Choose the condition that guidance moves away from: `negative`, or where it is None the learned null."""
        ...


class NetworkDenoiser:
    """A network under one prepared `context`, as a denoiser; `process` is the one that it was trained with."""

    def __init__(self, network: Network, process: Process, context: Any = None) -> None:
        self.network, self.process, self.context = network, process, context

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Estimate x0 from x (B, ...) = x0 + sigma eps, sigma (B,)."""
        x_t = x * append_dims((1 + sigma**2).rsqrt(), x)
        return self.process.to_x0(self.predict(x_t, self.process.time(sigma)), x_t, sigma)

    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Predict from x_t (B, ...) at times t (B,)."""
        return self.network(x_t, t, self.context)


class Guidance(NetworkDenoiser):
    """Classifier-free guidance (Ho & Salimans 2022) with rescaling (Lin et al. 2023, arXiv 2305.08891).

    Both conditions go through the network as one batch, and are projected to keys and values once, here. A network that
    takes the scale as an input (Meng et al. 2023, arXiv 2210.03142) needs one condition and one forward, unless there
    is a negative condition or rescaling.

    Args:
        network, process: as for `NetworkDenoiser`.
        cond: condition to move towards, of B items.
        negative: condition to move away from, of B items; None is the learned null.
        scale: 1 is no guidance (and one plain forward).
        rescale: phi in 0..1, how far each frame's standard deviation returns to the unguided one.
        start: (B,) frames of the piece before the window; None: none.

    Raises:
        ValueError: rescale is outside 0..1, or cond and negative differ in shape.
    """

    def __init__(
        self,
        network: Conditional,
        process: Process,
        cond: Condition,
        negative: Condition | None = None,
        *,
        scale: float,
        rescale: float = 0.0,
        start: Tensor | None = None,
    ) -> None:
        if not 0 <= rescale <= 1:
            raise ValueError(f"rescale must be in 0..1, got {rescale}")
        self.scale, self.rescale, taken = scale, rescale, None
        if negative is None and not rescale and 1 < scale <= network.largest_scale:
            taken = torch.full((len(cond.mask),), scale, device=cond.mask.device)
        self.extrapolates = scale != 1 and taken is None
        if self.extrapolates:
            if negative is not None and negative.tokens.shape != cond.tokens.shape:
                shapes = f"{tuple(cond.tokens.shape)} and {tuple(negative.tokens.shape)}"
                raise ValueError(f"condition and negative must have the same shape, got {shapes}")
            cond = Condition.concatenate([cond, network.unwanted(cond, negative)])
            start = None if start is None else torch.cat((start, start))
        super().__init__(network, process, network.context(cond, taken, start))

    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Guided prediction from x_t (B, ...) at times t (B,)."""
        if not self.extrapolates:
            return super().predict(x_t, t)
        wanted, unwanted = super().predict(torch.cat((x_t, x_t)), torch.cat((t, t))).chunk(2)
        return guide(wanted, unwanted, self.scale, self.rescale)


def guide(wanted: Tensor, unwanted: Tensor, scale: float | Tensor, rescale: float = 0.0) -> Tensor:
    """Extrapolate predictions from `unwanted` past `wanted` (B, ..., T), then rescale (Lin et al., equations 14-16).

    Standard deviations are those of each frame, as in stable-audio-tools.
    """
    guided = unwanted + scale * (wanted - unwanted)
    if not rescale:
        return guided
    axes = tuple(range(1, wanted.ndim - 1))
    ratio = wanted.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp(min=1e-8)
    return guided * (rescale * ratio + (1 - rescale))
