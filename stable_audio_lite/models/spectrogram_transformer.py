"""A diffusion transformer over patches of spectrograms (Bojescu 2025), which predicts the clean spectrogram.

Patches become tokens, the diffusion step is added to them, pre-norm blocks let all tokens of an item attend to one
another, and each token becomes its patch again. At its author's size it has 5,388,802 parameters. With `text`, each
block also cross-attends to a condition, which at first changes nothing.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stable_audio_lite.nn.attention import (
    Attention,
    Condition,
    KeysValues,
    attention_mask,
    linear,
    merge_heads,
    split_heads,
)
from stable_audio_lite.nn.guidance import GuidanceEmbedding, check_largest_scale
from stable_audio_lite.nn.steps import step_features

_TIME_MULTIPLIER = 4  # hidden width of the time embedding, in units of the width
POSITION_STD = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectrogramTransformerConfig:
    """Shape of the transformer; the defaults are its author's.

    Attributes:
        width: features of a token.
        blocks: number of blocks.
        heads: attention heads, of (width // heads) features each.
        patch: bins and frames on the side of a square patch.
        feed_forward: hidden width of the feed-forwards, in units of the width.
        time_base: base of the sinusoidal features of a step index, see `step_features`.
        text: whether the blocks cross-attend to a condition.
        guidance: the largest guidance scale that the network takes as an input, with which one forward is guided
            (training.distill); 0 where it takes none.
    """

    width: int = 256
    blocks: int = 4
    heads: int = 4
    patch: int = 4
    feed_forward: int = 4
    time_base: float = 1000.0
    text: bool = False
    guidance: float = 0.0

    def __post_init__(self) -> None:
        for name in ("width", "blocks", "heads", "patch", "feed_forward"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % 2 or self.width % self.heads:
            raise ValueError(f"width must be even and divisible by heads = {self.heads}, got {self.width}")
        check_largest_scale(self.guidance)
        if self.guidance and not self.text:
            raise ValueError("guidance needs text")
        if not self.time_base > 1:
            raise ValueError(f"time_base must be above 1, got {self.time_base}")


class TransformerContext(NamedTuple):
    """A condition as the transformer's cross-attentions read it.

    Attributes:
        layers: keys and values for each block.
        mask: (B, 1, 1, S) bool, True = attend, or None where nothing is masked.
        guidance: (B, C), what the guidance scale adds to the time embedding, or None.
    """

    layers: tuple[KeysValues, ...]
    mask: Tensor | None
    guidance: Tensor | None = None


# Blocks


class SelfAttention(nn.Module):
    """Multi-head attention of tokens (B, N, C) to one another; it starts at zero."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = linear(width, 3 * width)
        self.to_out = linear(width, width, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (split_heads(part, self.heads) for part in self.to_qkv(x).chunk(3, dim=-1))
        return self.to_out(merge_heads(F.scaled_dot_product_attention(queries, keys, values)))


class PatchBlock(nn.Module):
    """Attention, cross-attention where there is text, and a feed-forward, each behind a norm and added to its input."""

    def __init__(self, config: SpectrogramTransformerConfig, context_width: int | None) -> None:
        super().__init__()
        width, hidden = config.width, config.feed_forward * config.width
        self.norm_attention = nn.LayerNorm(width)
        self.attention = SelfAttention(width, config.heads)
        self.cross_attention = None if context_width is None else Attention(width, config.heads, context_width)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(linear(width, hidden), nn.LeakyReLU(), linear(hidden, width, zero=True))

    def forward(self, x: Tensor, keys_values: KeysValues | None, mask: Tensor | None) -> Tensor:
        """Transform tokens x (B, N, C), reading the condition's keys and values."""
        x = x + self.attention(self.norm_attention(x))
        if self.cross_attention is not None and keys_values is not None:
            x = x + self.cross_attention.attend(x, keys_values, mask)
        return x + self.feed_forward(self.norm_feed_forward(x))


# Model


class SpectrogramTransformer(nn.Module):
    """Transformer that predicts the clean spectrogram from a noisy one of a fixed size.

    Args:
        bins, frames: of the spectrograms, multiples of the patch.
        channels: 2, the real and the imaginary part.
        context_width: width of the condition's tokens, with `config.text` only.
        context_tokens: tokens of the learned null condition, that is, of any condition; with `config.text` only.

    Attributes:
        null: (context_tokens, context_width), the learned "no condition", or None without text.

    Raises:
        ValueError: sizes don't fit the patch, or those of the context are missing with text or given without it.
    """

    def __init__(
        self,
        config: SpectrogramTransformerConfig,
        bins: int = 412,
        frames: int = 256,
        channels: int = 2,
        context_width: int | None = None,
        context_tokens: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("bins", bins), ("frames", frames)):
            if value < 1 or value % config.patch:
                raise ValueError(f"{name} must be a multiple of patch = {config.patch}, got {value}")
        if {context_width is not None, context_tokens is not None} != {config.text}:
            raise ValueError(
                "context_width and context_tokens go with text = true, "
                f"got {context_width} and {context_tokens} with text = {str(config.text).lower()}"
            )
        self.config, self.shape = config, (channels, bins, frames)
        width, patch, hidden = config.width, config.patch, _TIME_MULTIPLIER * config.width
        grid = (bins // patch, frames // patch)
        self.patch_in = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Parameter(POSITION_STD * torch.randn(grid[0] * grid[1], width))
        self.time = nn.Sequential(linear(width, hidden), nn.Tanh(), linear(hidden, width))
        self.guidance = GuidanceEmbedding(width) if config.guidance else None
        self.blocks = nn.ModuleList(PatchBlock(config, context_width) for _ in range(config.blocks))
        self.patch_out = nn.ConvTranspose2d(width, channels, patch, stride=patch)
        self.null = None
        if context_width is not None and context_tokens is not None:
            self.null = nn.Parameter(torch.randn(context_tokens, context_width))

    @property
    def largest_scale(self) -> float:
        """The largest guidance scale that `context` takes; 1 where it takes none."""
        return max(self.config.guidance, 1.0)

    def null_condition(self, batch: int, mask: Tensor | None = None) -> Condition:
        """The learned null for `batch` items, nothing masked, whatever `mask` says of the prompts.

        Raises:
            ValueError: the transformer has no text.
        """
        if self.null is None:
            raise ValueError("a transformer without text has no null condition")
        return Condition.unmasked(self.null, batch)

    def unwanted(self, cond: Condition, negative: Condition | None) -> Condition:
        """Choose the condition that guidance moves away from: `negative`, or where it is None the learned null."""
        return self.null_condition(len(cond.tokens)) if negative is None else negative

    def context(self, cond: Condition, scale: Tensor | None = None, start: Tensor | None = None) -> TransformerContext:
        """Project a condition for all cross-attentions; do it once per generation.

        Args:
            cond: of B items.
            scale: (B,) guidance scales from 1 to `largest_scale`; None: no guidance, which is 1.
            start: not used: where in a piece the window begins.

        Raises:
            ValueError: the transformer has no text or takes no scale, or the tokens have another width than
                context_width.
        """
        if self.null is None:
            raise ValueError("a transformer without text takes no condition")
        if scale is not None and self.guidance is None:
            raise ValueError("this network takes no guidance scale")
        width = self.null.shape[1]
        if cond.tokens.shape[-1] != width:
            raise ValueError(f"condition tokens must be (B, S, {width}), got {tuple(cond.tokens.shape)}")
        tokens = cond.tokens.to(self.null.dtype)
        layers = tuple(block.cross_attention.keys_values(tokens) for block in self.blocks)  # type: ignore[union-attr, operator]
        guidance = None if scale is None or self.guidance is None else self.guidance(scale)
        return TransformerContext(layers, attention_mask(cond.mask), guidance)

    def forward(self, x: Tensor, t: Tensor, context: TransformerContext | None = None) -> Tensor:
        """Predict the clean spectrogram, in x's dtype whatever that of the weights.

        Takes noisy spectrograms x (B, channels, bins, frames) of about unit variance, diffusion step indices t (B,),
        fractions allowed, and `self.context(condition)`; None is the null condition of a transformer with text.

        Raises:
            ValueError: x has another shape, or a context is given without text.
        """
        if x.shape[1:] != self.shape:
            raise ValueError(f"spectrograms must be (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        if self.null is None and context is not None:
            raise ValueError("a transformer without text takes no context")
        if self.null is not None and context is None:
            context = self.context(self.null_condition(len(x)))
        layers = [None] * len(self.blocks) if context is None else context.layers
        mask = None if context is None else context.mask
        patches = self.patch_in(x.to(self.positions.dtype))  # B, C, bins / patch, frames / patch
        time = self.time(step_features(t, self.config.width, self.config.time_base).to(self.positions.dtype))
        if context is not None and context.guidance is not None:
            time = time + context.guidance
        tokens = patches.flatten(2).transpose(1, 2) + self.positions + time[:, None]  # B, N, C
        for block, keys_values in zip(self.blocks, layers, strict=True):
            tokens = block(tokens, keys_values, mask)
        out = self.patch_out(tokens.transpose(1, 2).unflatten(2, patches.shape[2:]))
        return out.to(x.dtype)
