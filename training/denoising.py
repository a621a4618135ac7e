"""Parts of diffusion training: the network with its conditions, noise levels, losses by level, demos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stable_audio_lite.models.conditioner import Conditioner, drop
from stable_audio_lite.models.unet import UNet
from stable_audio_lite.nn.attention import Condition
from stable_audio_lite.pipeline import StableAudio
from training.task import Demo

_LEVELS = 4  # noise-level bins of the logged loss
_UNPROMPTED = 3  # demos without prompts


@dataclass(frozen=True, kw_only=True)
class DemosConfig:
    """Demos generated during training, from the same seeds each time.

    Attributes:
        every: steps between them.
        prompts: one sound each, at every guidance scale in `cfg`; if empty, the sounds are unprompted.
        seconds: length of each, or null for the window.
        steps: sampling steps, or null for the model's own.
    """

    every: int
    prompts: tuple[str, ...] = ()
    cfg: tuple[float, ...] = (1.0, 3.0, 6.0)
    seconds: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or not self.cfg:
            raise ValueError("every must be at least 1, and cfg not empty")

    def sounds(self, model: StableAudio) -> list[Demo]:
        """Generate the demos with `model`."""
        settings: dict[str, Any] = {"seconds": self.seconds, "steps": self.steps, "seed": 0}
        if not self.prompts:
            made = model.generate(count=_UNPROMPTED, **settings)
            return [Demo(f"sound{i}", audio, made.sample_rate) for i, audio in enumerate(made.audio, 1)]
        sounds = []
        for cfg in self.cfg:
            made = model.generate(list(self.prompts), cfg=cfg, **settings)
            rows = enumerate(made.audio, 1)
            sounds += [Demo(f"prompt{i}-cfg{cfg:g}", audio, made.sample_rate) for i, audio in rows]
        return sounds


class Conditioned(nn.Module):
    """A network with its timing embeddings: everything that is trained, in one forward pass.

    `frame_rate` is that of the data, in Hz.
    """

    def __init__(self, conditioner: Conditioner, network: nn.Module, frame_rate: float):
        super().__init__()
        self.conditioner, self.network, self.frame_rate = conditioner, network, frame_rate

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Condition,
        timing: tuple[Tensor, Tensor],
        dropped: Tensor,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Noisy data (B, ...), times, text features, (start, total) seconds, dropped (B,) bool -> prediction.

        A guidance `scale` (B,) is for networks that take one. The second result is what a network with a pulse expects
        of the data: `UNet.expected`. Seconds beyond the timing embeddings count as the last, as in stable-audio-tools.
        """
        network: Any = self.network
        context = network.context(self.condition(text, timing, dropped), scale, timing[0] * self.frame_rate)
        expected = network.expected(x.shape[-1], context) if isinstance(network, UNet) else None
        return network(x, t, context), expected

    def condition(self, text: Condition, timing: tuple[Tensor, Tensor], dropped: Tensor) -> Condition:
        """Join text features and timing, with the network's null in place of what is dropped; see `forward`."""
        network: Any = self.network
        start, total = (seconds.clamp(max=self.conditioner.config.max_seconds) for seconds in timing)
        condition = self.conditioner(text, start, total)
        return drop(condition, network.null_condition(len(dropped), condition.mask), dropped)


def stratified_shares(batch: int, draws: torch.Generator, lowest: float = 0.0, shift: float = 1.0) -> Tensor:
    """Shares in [lowest, 1] for a batch, in random order: one in each of `batch` equally likely parts.

    Uniform for shift s = 1; otherwise uniform u become s u / (1 + (s - 1) u), which has its median at s / (1 + s)
    (Esser et al. 2024, arXiv 2403.03206, section 5.3.2: the more redundant the data, the more noise it takes to
    destroy them).
    """
    first = lowest / (shift - (shift - 1) * lowest)
    u = first + (1 - first) * (torch.arange(batch) + torch.rand(batch, generator=draws)) / batch
    return (shift * u / (1 + (shift - 1) * u))[torch.randperm(batch, generator=draws)]


def loss_by_level(errors: Tensor, shares: Tensor, objective: str) -> dict[str, Tensor]:
    """Mean error of the items in each quarter of the noise levels, NaN for a quarter without items.

    All quarters are always present: processes that log together must have metrics of the same names.
    """
    level = (shares * _LEVELS).long().clamp_max(_LEVELS - 1)
    return {f"loss/{objective}_t{i}of{_LEVELS}": errors[level == i].mean() for i in range(_LEVELS)}
