"""Denoisers made from trained networks, and classifier-free guidance.

A denoiser is a callable (x, sigma) -> x0 with x (B, ...) = x0 + sigma * eps and sigma (B,). A sampler knows nothing
else about the model.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from stable_audio_lite.diffusion.process import Process, append_dims
from stable_audio_lite.diffusion.replay import Recorder, launched
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
    """A network under one prepared `context`, as a denoiser; `process` is the one that it was trained with.

    Forwards without gradients go through the network's `recorder` where one is given.
    """

    def __init__(
        self, network: Network, process: Process, context: Any = None, *, recorder: Recorder | None = None
    ) -> None:
        self.network, self.process, self.context, self.recorder = network, process, context, recorder
        if recorder is not None:
            recorder.refresh()

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Estimate x0 from x (B, ...) = x0 + sigma eps, sigma (B,)."""
        x_t = x * append_dims((1 + sigma**2).rsqrt(), x)
        return self.process.to_x0(self.predict(x_t, self.process.time(sigma)), x_t, sigma)

    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Predict from x_t (B, ...) at times t (B,)."""
        if torch.is_grad_enabled():
            return self.network(x_t, t, self.context)
        if self.recorder is not None:
            return self.recorder(x_t, t, self.context)
        return launched(self.network, x_t, t, self.context)


class Forward(NamedTuple):
    """One forward of a guided step: which condition, at what scale as the network's input, and its weight."""

    condition: Literal["wanted", "negative", "null"]
    scale: float
    weight: float


def plan_forwards(scale: float, largest: float, negative: bool) -> list[Forward]:
    """Choose the forwards whose weighted sum is the guided prediction, the weights adding up to 1.

    That is null + s (wanted - null) + (1 - s) (negative - null), where the nulls cancel if there is a negative. A
    network that takes scales up to `largest` gives null + s (condition - null) by itself: it is asked for as much of
    either difference as it takes, and extrapolated from there. One that takes none has a largest scale of 1.
    """
    amounts: list[tuple[Literal["wanted", "negative"], float]] = [("wanted", scale)]
    if negative:
        amounts.append(("negative", 1 - scale))
    forwards = []
    for condition, amount in amounts:
        taken = min(max(abs(amount), 1.0), largest)
        forwards.append(Forward(condition, taken, amount / taken))
    forwards.append(Forward("null", 1.0, 1 - sum(f.weight for f in forwards)))
    return [f for f in forwards if abs(f.weight) > 1e-9]


class Guidance(NetworkDenoiser):
    """Classifier-free guidance (Ho & Salimans 2022) with rescaling (Lin et al. 2023, arXiv 2305.08891).

    All conditions go through the network as one batch, and are projected to keys and values once, here. A network that
    takes the scale as an input (Meng et al. 2023, arXiv 2210.03142) needs one forward. With a negative condition it
    needs three, and what that adds is held, frame by frame, to the standard deviation of the prediction without it.

    Args:
        network, process: as for `NetworkDenoiser`.
        cond: condition to move towards, of B items.
        negative: condition to move away from, of B items; None is the learned null.
        scale: 1 is no guidance (and one plain forward).
        rescale: phi in 0..1, how far each frame's standard deviation returns to the unguided one.
        start: (B,) frames of the piece before the window; None: none.
        recorder: as for `NetworkDenoiser`.

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
        recorder: Recorder | None = None,
    ) -> None:
        if not 0 <= rescale <= 1:
            raise ValueError(f"rescale must be in 0..1, got {rescale}")
        if negative is not None and negative.tokens.shape != cond.tokens.shape:
            shapes = f"{tuple(cond.tokens.shape)} and {tuple(negative.tokens.shape)}"
            raise ValueError(f"condition and negative must have the same shape, got {shapes}")
        self.rescale = rescale if scale != 1 else 0.0
        self.forwards = plan_forwards(scale, network.largest_scale, negative is not None)
        self.steadied = negative is not None and self.forwards[0].scale > 1
        if self.rescale and self._unguided is None:
            self.forwards.append(Forward("wanted", 1.0, 0.0))
        conditions = [self._condition(network, f, cond, negative) for f in self.forwards]
        taken = None
        if any(f.scale != 1 for f in self.forwards):
            scales = torch.tensor([f.scale for f in self.forwards], device=cond.mask.device)
            taken = scales.repeat_interleave(len(cond.mask))
        start = None if start is None else start.repeat(len(conditions))
        context = network.context(Condition.concatenate(conditions), taken, start)
        super().__init__(network, process, context, recorder=recorder)

    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Guided prediction from x_t (B, ...) at times t (B,)."""
        count = len(self.forwards)
        if count == 1:
            return super().predict(x_t, t)
        several = super().predict(torch.cat([x_t] * count), torch.cat([t] * count)).chunk(count)
        weighted = [(f.weight, out) for f, out in zip(self.forwards, several, strict=True) if f.weight]
        base = weighted[-1][1]
        guided = base + sum(weight * (out - base) for weight, out in weighted[:-1])
        if self.steadied:
            guided = restore_deviation(guided, several[0], 1.0)
        return guided if self._unguided is None else restore_deviation(guided, several[self._unguided], self.rescale)

    @property
    def _unguided(self) -> int | None:
        """Index of the unguided forward, if there is one."""
        return next((i for i, f in enumerate(self.forwards) if f.condition == "wanted" and f.scale == 1), None)

    @staticmethod
    def _condition(network: Conditional, forward: Forward, cond: Condition, negative: Condition | None) -> Condition:
        if forward.condition == "wanted":
            return cond
        return network.unwanted(cond, negative if forward.condition == "negative" else None)


def guide(wanted: Tensor, unwanted: Tensor, scale: float | Tensor) -> Tensor:
    """Extrapolate predictions from `unwanted` past `wanted` (B, ..., T)."""
    return unwanted + scale * (wanted - unwanted)


def restore_deviation(guided: Tensor, unguided: Tensor, share: float) -> Tensor:
    """Return predictions (B, ..., T) by a share of the way to unguided deviations (Lin et al., equations 14-16).

    Standard deviations are those of each frame, as in stable-audio-tools.
    """
    if not share:
        return guided
    axes = tuple(range(1, guided.ndim - 1))
    ratio = unguided.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp(min=1e-8)
    return guided * (share * ratio + (1 - share))
