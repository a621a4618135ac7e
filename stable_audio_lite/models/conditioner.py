"""The condition that the U-Net attends to: text features joined with two timing tokens.

Source: Evans et al. 2024, "Fast Timing-Conditioned Latent Audio Diffusion": `seconds_start` and
`seconds_total` are each one learned embedding per whole second, appended to the text tokens along the
sequence. Between whole seconds the two nearest embeddings are mixed: with rounding, 3.5 and 4.5 s would be
the same request, and sounds would end half a second off.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stable_audio_lite.nn.attention import Condition


def drop(condition: Condition, null: Condition, dropped: Tensor) -> Condition:
    """Replace the conditions of items that are `dropped` (B,), bool, by `null`'s, for classifier-free guidance.

    `null` is of B items or of one, with the same S and D; gradients reach it.
    """
    expected, got = tuple(condition.tokens.shape[1:]), tuple(null.tokens.shape[1:])
    if got != expected:
        raise ValueError(f"the null condition should be {expected} like the condition, got {got}")
    dropped = dropped[:, None]
    tokens = torch.where(dropped[..., None], null.tokens.to(condition.tokens.dtype), condition.tokens)
    return Condition(tokens, torch.where(dropped, null.mask, condition.mask))


@dataclass(frozen=True, kw_only=True)
class TimingConfig:
    """Timing embeddings: one per whole second, 0..max_seconds."""

    max_seconds: int = 512

    def __post_init__(self) -> None:
        if self.max_seconds < 1:
            raise ValueError(f"max_seconds must be at least 1, got {self.max_seconds}")


class Conditioner(nn.Module):
    """Timing conditioner: appends a `seconds_start` and a `seconds_total` token to text features.

    Its only parameters are the two embedding tables, which are trained with the U-Net, unlike the text encoder.
    """

    def __init__(self, config: TimingConfig, width: int):
        """`width` is the text encoder's, so that all tokens have one width D."""
        super().__init__()
        self.config = config
        self.width = width
        self.seconds_start = nn.Embedding(config.max_seconds + 1, width)
        self.seconds_total = nn.Embedding(config.max_seconds + 1, width)

    def forward(self, text: Condition, seconds_start: Tensor, seconds_total: Tensor) -> Condition:
        """Text (B, N, D) and seconds (B,) each -> condition (B, N + 2, D).

        A whole second is its embedding; in between, the two nearest are mixed linearly.

        Raises:
            ValueError: seconds outside 0..max_seconds or not finite, or another batch size or width.
        """
        batch, _, width = text.tokens.shape
        if width != self.width:
            raise ValueError(f"text features are {width} wide, the conditioner {self.width}")
        start = self._embed("seconds_start", seconds_start, batch)
        total = self._embed("seconds_total", seconds_total, batch)
        timing = torch.stack([start, total], dim=1)  # B, 2, D
        attend = text.mask.new_ones(batch, 2)
        tokens = torch.cat([text.tokens.to(timing.dtype), timing], dim=1)
        return Condition(tokens, torch.cat([text.mask, attend], dim=1))

    def _embed(self, name: str, seconds: Tensor, batch: int) -> Tensor:
        """(B, D) for seconds (B,) of the table `name`."""
        table: nn.Embedding = getattr(self, name)
        seconds = torch.as_tensor(seconds).detach().cpu().double()  # some devices have no float64
        if seconds.shape != (batch,):
            raise ValueError(f"{name} must hold one value per prompt, ({batch},), got {tuple(seconds.shape)}")
        if not bool(((seconds >= 0) & (seconds <= self.config.max_seconds)).all()):
            raise ValueError(f"{name} must lie in 0..{self.config.max_seconds} s, got {seconds.tolist()}")
        whole = seconds.floor()
        share = (seconds - whole)[:, None].to(table.weight)
        low, high = (i.long().to(table.weight.device) for i in (whole, seconds.ceil()))
        return table(low).lerp(table(high), share)
