"""The 1-D U-Net of Stable Audio (Evans et al. 2024, arXiv 2402.04825), which predicts v from noisy latents.

Residual blocks see the diffusion time through FiLM, transformers see the condition through cross-attention.
At paper size it has 906,679,744 parameters. Inside, activations are (B, T, C) throughout: a convolution is one matrix
product over stacked shifts, or of an image with C innermost, and a transformer needs no transposing, so both run at the
speed of matrix products.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stable_audio_lite.nn.attention import Condition, KeysValues, TransformerBlock, attention_mask, linear, rotations_of
from stable_audio_lite.nn.frames import Conv, GroupNorm, TimeFeatures, Upsample
from stable_audio_lite.nn.guidance import GuidanceEmbedding, check_largest_scale

_TIME_MULTIPLIER = 4  # width of the time embedding, in units of the base width
SKIP_SCALE = 0.5**0.5
PULSE_PERIOD, PULSE_HARMONICS = 512, 96
"""Frames of the slowest sine of a `Pulse`, and how many sines it has.

At 1,024 samples of 44.1 kHz a frame they lie 5 beats a minute apart, up to 8 a second.
"""
PULSE_FEATURES = 256
_TYPICAL_TOKENS = 8  # of a prompt: the scale of sums over tokens
Run = Callable[..., Tensor]
"""Calls its first argument with the others, perhaps with gradient checkpointing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Shape of the U-Net; the defaults are the paper's.

    Attributes:
        width: base width; level i has `width * multipliers[i]` channels.
        multipliers: one per level, outermost first, the last also of the bottleneck.
        factors: strides in time of the steps between levels (len(multipliers) - 1 of them).
        blocks: residual blocks of each such step.
        attentions: transformer layers of each step (0: none), then of the bottleneck.
        heads: attention heads, of (channels // heads) features each.
        feed_forward: hidden width of the feed-forwards, in units of their channels.
        groups: groups of the residual blocks' norms; a transformer's norm has twice as many.
        rotary: rotary positions in self-attention; in the paper only the convolutions know the order of frames.
        pooled_context: the mean of the condition's tokens is added to the time embedding, so that FiLM sees it too.
        pulse: the condition chooses among sines over the piece's frames, from which a tempo can be counted: `Pulse`.
        attend_padding: masked tokens stay in cross-attention, with keys and values of zero, and what guidance moves
            away from has the prompt's mask, as in stable-audio-tools.
        guidance: the largest guidance scale that the network takes as an input, with which one forward is guided
            (training.distill); 0 where it takes none.
    """

    width: int = 256
    multipliers: tuple[int, ...] = (4, 4, 4, 5, 5)
    factors: tuple[int, ...] = (1, 2, 2, 4)
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    attentions: tuple[int, ...] = (1, 3, 3, 3, 3)
    heads: int = 16
    feed_forward: int = 4
    groups: int = 16
    rotary: bool = False
    pooled_context: bool = False
    pulse: bool = False
    attend_padding: bool = False
    guidance: float = 0.0

    def __post_init__(self) -> None:
        steps = len(self.multipliers) - 1
        if steps < 1:
            raise ValueError(f"multipliers needs at least 2 entries, got {self.multipliers}")
        for name, wanted in (("factors", steps), ("blocks", steps), ("attentions", steps + 1)):
            if len(getattr(self, name)) != wanted:
                raise ValueError(
                    f"{name} needs {wanted} entries for {steps + 1} multipliers, got {getattr(self, name)}"
                )
        for name in ("width", "heads", "feed_forward", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("multipliers", "factors", "blocks"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1 each, got {getattr(self, name)}")
        if min(self.attentions) < 0:
            raise ValueError(f"attentions must be at least 0 each, got {self.attentions}")
        if self.width % 2:
            raise ValueError(f"width must be even, got {self.width}")
        check_largest_scale(self.guidance)
        for channels in self.level_channels:
            if channels % (2 * self.groups) or channels % self.heads:
                raise ValueError(
                    f"width * multiplier = {channels} must be divisible by 2 * groups = {2 * self.groups} "
                    f"and by heads = {self.heads}"
                )

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level, outermost first."""
        return tuple(self.width * m for m in self.multipliers)


class UNetContext(NamedTuple):
    """A condition as the U-Net's cross-attentions read it.

    Attributes:
        layers: for each transformer (down, bottleneck, up), for each of its layers, keys and values.
        mask: (B, 1, 1, S) bool, True = attend, or None where nothing is masked.
        pooled: (B, E), what it and the guidance scale add to the time embedding, or None.
        gates: (B, harmonics), its gates of the pulse, or None.
        start: (B,), frames of the piece before the window, or None for none.
    """

    layers: tuple[tuple[KeysValues, ...], ...]
    mask: Tensor | None
    pooled: Tensor | None = None
    gates: Tensor | None = None
    start: Tensor | None = None


LayersMask = tuple[tuple[KeysValues, ...], Tensor | None]
"""One transformer's layers of a `UNetContext`, and its mask."""


# Blocks


class ResidualBlock(nn.Module):
    """Two of (norm, SiLU, convolution), the second modulated by the diffusion time, around a skip."""

    def __init__(
        self, channels: int, out_channels: int, groups: int, time_width: int, *, zero_skip: bool = False
    ) -> None:
        super().__init__()
        self.norm_in = GroupNorm(groups, channels)
        self.conv_in = Conv(channels, out_channels, kernel=3)
        self.film = linear(time_width, 2 * out_channels)
        self.norm_out = GroupNorm(groups, out_channels)
        self.conv_out = Conv(out_channels, out_channels, kernel=3, zero=True)
        same = channels == out_channels
        self.skip = nn.Identity() if same else Conv(channels, out_channels, kernel=1, zero=zero_skip)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Transform x (B, T, C) given the time embedding (B, E), SiLU applied."""
        hidden = self.conv_in(F.silu(self.norm_in(x)))
        hidden = self.conv_out(F.silu(self.norm_out(hidden, self.film(embedding))))
        return self.skip(x) + hidden


class Transformer(nn.Module):
    """Group norm, a projection, transformer blocks and a projection, with no skip around the whole."""

    def __init__(self, config: UNetConfig, channels: int, depth: int, context_width: int) -> None:
        super().__init__()
        self.heads, self.rotary = config.heads, config.rotary
        self.norm = GroupNorm(2 * config.groups, channels, eps=1e-6)
        self.to_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(
            TransformerBlock(channels, config.heads, config.feed_forward, context_width) for _ in range(depth)
        )
        self.to_out = nn.Linear(channels, channels)
        for projection in (self.to_in, self.to_out):
            nn.init.eye_(projection.weight)
            nn.init.zeros_(projection.bias)

    def keys_values(self, tokens: Tensor) -> tuple[KeysValues, ...]:
        """Keys and values of the condition's tokens (B, S, D) for each layer."""
        blocks = cast("Iterable[TransformerBlock]", self.blocks)
        return tuple(block.cross_attention.keys_values(tokens) for block in blocks)

    def forward(self, x: Tensor, keys_values: tuple[KeysValues, ...], mask: Tensor | None) -> Tensor:
        """Transform x (B, T, C)."""
        x = self.to_in(self.norm(x))
        rotations = rotations_of(x, self.heads) if self.rotary else None
        for block, layer in zip(self.blocks, keys_values, strict=True):
            x = block(x, layer, mask, rotations)
        return self.to_out(x)


class UNetLevel(nn.Module):
    """Residual blocks and an optional transformer at one resolution, on the way down or up."""

    def __init__(
        self, config: UNetConfig, step: int, time_width: int, context_width: int, *, blocks: int, incoming: int
    ) -> None:
        super().__init__()
        channels, depth = config.level_channels[step + 1], config.attentions[step]
        self.blocks = nn.ModuleList(ResidualBlock(incoming, channels, config.groups, time_width) for _ in range(blocks))
        self.transformer = Transformer(config, channels, depth, context_width) if depth else None


class Down(UNetLevel):
    """Strided convolution, then the level's blocks; keeps a skip after each block and after the transformer."""

    def __init__(self, config: UNetConfig, step: int, time_width: int, context_width: int) -> None:
        outer, channels = config.level_channels[step : step + 2]
        super().__init__(config, step, time_width, context_width, blocks=config.blocks[step], incoming=channels)
        stride = config.factors[step]
        self.resample = Conv(outer, channels, kernel=2 * stride + 1, stride=stride)

    def forward(self, x: Tensor, embedding: Tensor, layers: LayersMask, run: Run) -> tuple[Tensor, list[Tensor]]:
        """(B, T, C) -> (B, T / stride, C') and the skips; `layers` are those of its transformer."""
        x = self.resample(x)
        skips = []
        for block in self.blocks:
            x = run(block, x, embedding)
            skips.append(x)
        if self.transformer is not None:
            x = run(self.transformer, x, *layers)
            skips.append(x)
        return x, skips


class Up(UNetLevel):
    """The level's blocks, with a skip joined to the input of each, then upsampling."""

    def __init__(self, config: UNetConfig, step: int, time_width: int, context_width: int) -> None:
        outer, channels = config.level_channels[step : step + 2]
        skips = config.blocks[step] + (1 if config.attentions[step] else 0)
        super().__init__(config, step, time_width, context_width, blocks=skips, incoming=2 * channels)
        stride = config.factors[step]
        self.resample = Upsample(channels, outer, stride) if stride > 1 else Conv(channels, outer, kernel=3)

    def forward(self, x: Tensor, skips: list[Tensor], embedding: Tensor, layers: LayersMask, run: Run) -> Tensor:
        """(B, T, C) and its level's skips -> (B, T * stride, C')."""
        for block, skip in zip(self.blocks, reversed(skips), strict=True):
            x = run(block, torch.cat((x, skip * SKIP_SCALE), dim=-1), embedding)
        if self.transformer is not None:
            x = run(self.transformer, x, *layers)
        return self.resample(x)


class Pulse(nn.Module):
    """A pulse that the condition chooses: a Fourier series over the piece's frames, with gates on its harmonics.

    The gates are a function of the set of tokens (Zaheer et al. 2017, "Deep Sets"). A projection of the gated series is
    what the condition alone says about the data, and is trained to be their mean: of a beat, which is a small part of
    the data, a network that only learns to take noise off hears too little. The network hears the series at its
    outermost level, and lets that mean sound in the prediction where it chooses to; both start as nothing.
    """

    def __init__(self, *, channels: int, hidden: int, time_width: int, context_width: int) -> None:
        super().__init__()
        self.token = linear(context_width, PULSE_FEATURES)
        self.to_gates = linear(PULSE_FEATURES, PULSE_HARMONICS)
        self.to_hidden = linear(2 * PULSE_HARMONICS, hidden, zero=True)
        self.to_mean = linear(2 * PULSE_HARMONICS, channels)
        self.norm = GroupNorm(1, hidden)
        self.film = linear(time_width, 2 * hidden)
        self.sounds = linear(hidden, channels, zero=True)

    def gates(self, cond: Condition) -> Tensor:
        """Gates (B, harmonics) of a condition."""
        features = F.relu(self.token(cond.tokens.to(self.token.weight.dtype))) * cond.mask[..., None]
        return self.to_gates(features.sum(1) / _TYPICAL_TOKENS)

    def series(self, frames: int, gates: Tensor, start: Tensor | None = None) -> Tensor:
        """Gates (B, harmonics) -> gated sines, then cosines, (B, T, 2 * harmonics), of T frames from `start` (B,)."""
        numbers = torch.arange(frames, device=gates.device)[:, None]
        if start is not None:
            numbers = numbers + start.to(gates.device, torch.float32)[:, None, None]
        turns = numbers * torch.arange(1, PULSE_HARMONICS + 1, device=gates.device) % PULSE_PERIOD / PULSE_PERIOD
        angles = 2 * math.pi * turns
        return torch.cat([wave.to(gates.dtype) * gates[:, None] for wave in (angles.sin(), angles.cos())], -1)

    def sound(self, series: Tensor, hidden: Tensor, embedding: Tensor) -> Tensor:
        """Addition to the prediction, (B, T, C), as activations (B, T, H) and the time embedding (B, E) ask."""
        return self.to_mean(series) * self.sounds(F.silu(self.norm(hidden, self.film(embedding))))


# Model


class UNet(nn.Module):
    """U-Net that predicts v from noisy latents.

    Args:
        config: its shape.
        channels: latent channels.
        context_width: width of the condition's tokens.
        context_tokens: tokens of the learned null condition, that is, of any condition.

    Attributes:
        null: (context_tokens, context_width), the learned "no condition".
        latent_mean, latent_std: (channels,) buffers by which latents have to be normalised; the network itself does
            not apply them.
        gradient_checkpointing: recompute blocks in the backward pass instead of storing their activations.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: UNetConfig, *, channels: int, context_width: int, context_tokens: int) -> None:
        super().__init__()
        sizes = {"channels": channels, "context_width": context_width, "context_tokens": context_tokens}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.config = config
        self.channels = channels
        self.gradient_checkpointing = False
        time_width = _TIME_MULTIPLIER * config.width
        outer, inner = config.level_channels[0], config.level_channels[-1]
        steps = range(len(config.factors))
        self.time = nn.Sequential(TimeFeatures(config.width), linear(config.width + 1, time_width), nn.GELU())
        self.mapping = nn.Sequential(
            linear(time_width, time_width), nn.GELU(), linear(time_width, time_width), nn.GELU()
        )
        self.pooled = linear(context_width, time_width, zero=True) if config.pooled_context else None
        self.guidance = GuidanceEmbedding(time_width) if config.guidance else None
        self.pulse = None
        if config.pulse:
            self.pulse = Pulse(channels=channels, hidden=outer, time_width=time_width, context_width=context_width)
        self.block_in = ResidualBlock(channels, outer, 1, time_width)
        self.down = nn.ModuleList(Down(config, i, time_width, context_width) for i in steps)
        self.middle_in = ResidualBlock(inner, inner, config.groups, time_width)
        depth = config.attentions[-1]
        self.middle = Transformer(config, inner, depth, context_width) if depth else None
        self.middle_out = ResidualBlock(inner, inner, config.groups, time_width)
        self.up = nn.ModuleList(Up(config, i, time_width, context_width) for i in reversed(steps))
        self.block_out = ResidualBlock(outer, channels, 1, time_width, zero_skip=True)
        self.null = nn.Parameter(torch.randn(context_tokens, context_width))
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(channels))

    @property
    def largest_scale(self) -> float:
        """The largest guidance scale that `context` takes; 1 where it takes none."""
        return max(self.config.guidance, 1.0)

    def null_condition(self, batch: int, mask: Tensor | None = None) -> Condition:
        """The learned null for `batch` items, nothing masked, or with `attend_padding` what `mask` (B, S) masks."""
        null = Condition.unmasked(self.null, batch)
        return null if mask is None or not self.config.attend_padding else Condition(null.tokens, mask)

    def unwanted(self, cond: Condition, negative: Condition | None) -> Condition:
        """Choose the condition that guidance moves away from: `negative`, or where it is None the learned null.

        With `attend_padding` a negative prompt is as long as the prompt, the null's tokens going on where it ends.
        """
        if negative is None or not self.config.attend_padding:
            return self.null_condition(len(cond.tokens), cond.mask) if negative is None else negative
        return Condition(torch.where(negative.mask[..., None], negative.tokens, self.null.to(cond.tokens)), cond.mask)

    def context(self, cond: Condition, scale: Tensor | None = None, start: Tensor | None = None) -> UNetContext:
        """Project a condition for all cross-attentions; do it once per generation.

        Args:
            cond: of B items.
            scale: (B,) guidance scales from 1 to `largest_scale`; None: no guidance, which is 1.
            start: (B,) frames of the piece before the window, from which the pulse is counted; None: none.

        Raises:
            ValueError: the tokens have another width than context_width, or the network takes no guidance scale.
        """
        if scale is not None and self.guidance is None:
            raise ValueError("this network takes no guidance scale")
        width = self.null.shape[1]
        if cond.tokens.shape[-1] != width:
            raise ValueError(f"condition tokens must be (B, S, {width}), got {tuple(cond.tokens.shape)}")
        tokens = cond.tokens.to(self.null.dtype)
        down, up = (cast("Iterable[UNetLevel]", levels) for levels in (self.down, self.up))
        transformers = [*(d.transformer for d in down), self.middle, *(u.transformer for u in up)]
        layers = tuple(() if t is None else t.keys_values(tokens) for t in transformers)
        pooled = None
        if self.pooled is not None:
            share = cond.mask / cond.mask.sum(1, keepdim=True)  # of each token in the mean
            pooled = self.pooled((share.to(tokens)[:, None] @ tokens)[:, 0])
        if scale is not None and self.guidance is not None:
            added = self.guidance(scale)
            pooled = added if pooled is None else pooled + added
        gates = None if self.pulse is None else self.pulse.gates(cond)
        mask = attention_mask(cond.mask)
        if mask is not None and self.config.attend_padding:
            seen = mask.to(tokens).transpose(2, 3)  # B, 1, S, 1
            layers, mask = tuple(tuple((k * seen, v * seen) for k, v in layer) for layer in layers), None
        return UNetContext(layers, mask, pooled, gates, start)

    def forward(self, x: Tensor, t: Tensor, context: UNetContext) -> Tensor:
        """Predict v, (B, C, T), in x's dtype whatever that of the weights.

        Takes noisy latents x (B, C, T), any T (padded to a multiple of the strides' product, then cropped), diffusion
        times t (B,) in 0..1, and `self.context(condition)`.
        """
        if x.ndim != 3 or x.shape[1] != self.channels:
            raise ValueError(f"latents must be (B, {self.channels}, T), got {tuple(x.shape)}")
        frames, dtype = x.shape[-1], self.null.dtype
        hidden = F.pad(x.to(dtype), (0, -frames % math.prod(self.config.factors))).transpose(1, 2)
        embedding = self.time[2](self.time[1](self.time[0](t).to(dtype)))
        embedding = F.silu(self.mapping(embedding if context.pooled is None else embedding + context.pooled))
        out = self._levels(hidden.contiguous(), embedding, context)
        return out[:, :frames].transpose(1, 2).contiguous().to(x.dtype)

    def expected(self, frames: int, context: UNetContext) -> Tensor | None:
        """Mean of the data, (B, C, T), less its own mean over T, as its pulse knows it from `self.context(condition)`.

        None without a pulse.
        """
        if self.pulse is None or context.gates is None:
            return None
        mean = self.pulse.to_mean(self.pulse.series(frames, context.gates, context.start)).transpose(1, 2)
        return mean - mean.mean(-1, keepdim=True)

    def _levels(self, x: Tensor, embedding: Tensor, context: UNetContext) -> Tensor:
        """Down, through the bottleneck and up again, over (B, T, C)."""
        run, middle = self._run, len(self.down)
        contexts = [(layers, context.mask) for layers in context.layers]
        x = run(self.block_in, x, embedding)
        series = None
        if self.pulse is not None and context.gates is not None:
            series = self.pulse.series(x.shape[1], context.gates, context.start)
            x = x + self.pulse.to_hidden(series)
        first = x
        skips = []
        for down, layers in zip(self.down, contexts[:middle], strict=True):
            x, level_skips = down(x, embedding, layers, run)
            skips.append(level_skips)
        x = run(self.middle_in, x, embedding)
        if self.middle is not None:
            x = run(self.middle, x, *contexts[middle])
        x = run(self.middle_out, x, embedding)
        for up, layers in zip(self.up, contexts[middle + 1 :], strict=True):
            x = up(x, skips.pop(), embedding, layers, run)
        x = x + first
        out = run(self.block_out, x, embedding)
        return out if self.pulse is None or series is None else out + self.pulse.sound(series, x, embedding)

    def _run(self, module: Callable[..., Tensor], *inputs: object) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)
