"""Attention over (B, T, C) sequences, and the `Condition` that cross-attention reads.

Keys and values of a condition do not depend on the noisy input, so cross-attention takes them ready-made
(`Attention.keys_values`): a sampler projects them once per generation, not once per step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROTARY_BASE = 1000.0
"""The slowest pair of features rotates once in about 2 pi times as many positions."""
KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one attention layer, each (B, heads, S, C / heads)."""
Rotations = tuple[Tensor, Tensor]
"""Cosines and sines of rotary positions, each (T, C / heads / 2)."""


@dataclasses.dataclass(frozen=True)
class Condition:
    """Tokens (B, S, D) for a network to cross-attend to where `mask` (B, S) is True, in each row once at least.

    Raises:
        ValueError: on other shapes, or a mask that isn't bool.
    """

    tokens: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3 or self.mask.shape != self.tokens.shape[:2] or self.mask.dtype != torch.bool:
            raise ValueError(
                f"expected tokens (B, S, D) and a bool mask (B, S), got {tuple(self.tokens.shape)} and "
                f"{self.mask.dtype} {tuple(self.mask.shape)}"
            )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """The same condition on `device`, its tokens in `dtype`; the mask stays bool."""
        return Condition(self.tokens.to(device=device, dtype=dtype), self.mask.to(device=device))

    @staticmethod
    def unmasked(tokens: Tensor, batch: int) -> Condition:
        """The same tokens (S, D) for `batch` items, nothing masked."""
        mask = torch.ones(batch, len(tokens), dtype=torch.bool, device=tokens.device)
        return Condition(tokens.expand(batch, -1, -1), mask)

    @staticmethod
    def concatenate(conditions: Sequence[Condition]) -> Condition:
        """Join along the batch; all must have the same S and D."""
        return Condition(torch.cat([c.tokens for c in conditions]), torch.cat([c.mask for c in conditions]))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, C) -> (B, heads, T, C / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, T, D) -> (B, T, heads * D)."""
    return x.transpose(1, 2).flatten(-2)


def linear(in_features: int, out_features: int, *, bias: bool = True, zero: bool = False) -> nn.Linear:
    """A linear layer that keeps unit variance (std 1 / sqrt(in)), or starts at zero."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    nn.init.normal_(layer.weight, std=0.0 if zero else in_features**-0.5)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Multi-head attention with one norm for the queries and one for the context.

    The output projection starts at zero, so that a new residual branch adds nothing at first.
    """

    def __init__(self, width: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(context_width)
        self.to_q = linear(width, width, bias=False)
        self.to_kv = linear(context_width, 2 * width, bias=False)
        self.to_out = linear(width, width, zero=True)

    def keys_values(self, context: Tensor) -> KeysValues:
        """Project (B, S, D) into this layer's keys and values."""
        keys, values = self.to_kv(self.norm_context(context)).chunk(2, dim=-1)
        return split_heads(keys, self.heads), split_heads(values, self.heads)

    def attend(
        self, x: Tensor, keys_values: KeysValues, mask: Tensor | None = None, rotations: Rotations | None = None
    ) -> Tensor:
        """Attend from x (B, T, C); `mask` (B, 1, 1, S) is True where a key counts, None where all do.

        With `rotations`, which need queries and keys of the same sequence, both get rotary positions.
        """
        queries = split_heads(self.to_q(self.norm(x)), self.heads)
        keys, values = keys_values
        if rotations is not None:
            queries, keys = rotate(queries, rotations), rotate(keys, rotations)
        return self.to_out(merge_heads(F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)))


def rotations_of(x: Tensor, heads: int) -> Rotations:
    """Rotations for the heads of (B, T, C) sequences, C / heads even, in x's dtype."""
    half = x.shape[-1] // heads // 2
    rates = ROTARY_BASE ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * rates
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotate(x: Tensor, rotations: Rotations) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of (B, heads, T, D), D even.

    Pairs of features rotate with their position in the sequence, so that products of queries and keys depend on their
    distance.
    """
    cos, sin = rotations
    one, other = x.chunk(2, dim=-1)
    return torch.cat((one * cos - other * sin, one * sin + other * cos), dim=-1)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and a feed-forward, each added to its input."""

    def __init__(self, width: int, heads: int, feed_forward: int, context_width: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads, width)
        self.cross_attention = Attention(width, heads, context_width)
        self.feed_forward = nn.Sequential(
            linear(width, feed_forward * width), nn.GELU(), linear(feed_forward * width, width, zero=True)
        )

    def forward(
        self, x: Tensor, keys_values: KeysValues, mask: Tensor | None, rotations: Rotations | None = None
    ) -> Tensor:
        """Transform x (B, T, C), reading the condition's keys and values; `rotations` are of self-attention."""
        x = x + self.attention.attend(x, self.attention.keys_values(x), rotations=rotations)
        x = x + self.cross_attention.attend(x, keys_values, mask)
        return x + self.feed_forward(x)


def attention_mask(mask: Tensor) -> Tensor | None:
    """Turn a (B, S) mask into (B, 1, 1, S), or into None (which is faster) if nothing is masked.

    Reading the mask waits for the device, so call this once per batch and outside a compiled forward.
    """
    if not torch.compiler.is_compiling() and not mask.is_meta and bool(mask.all()):
        return None
    return mask[:, None, None, :]
