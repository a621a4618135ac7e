"""The guidance scale as an input of a network (Meng et al. 2023, arXiv 2210.03142, section 3.1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from stable_audio_lite.nn.attention import linear


class GuidanceEmbedding(nn.Module):
    """Guidance scales (B,) -> (B, width), zero for 1, which is no guidance; it starts as zero for all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_hidden = linear(1, width, bias=False)
        self.to_out = linear(width, width, bias=False, zero=True)

    def forward(self, scale: Tensor) -> Tensor:
        return self.to_out(F.gelu(self.to_hidden(scale.log()[:, None].to(self.to_hidden.weight))))


def check_largest_scale(scale: float) -> None:
    """Check the largest scale that a network takes: 0, where it takes none, or above 1.

    Raises:
        ValueError: it is something else.
    """
    if scale != 0 and not 1 < scale < float("inf"):
        raise ValueError(f"guidance must be 0 or above 1, got {scale}")
