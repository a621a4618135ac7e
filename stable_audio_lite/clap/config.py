"""Sizes of a CLAP, under our names and under those of transformers' configuration."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from stable_audio_lite.clap.tokenizer import PAD_TOKEN

MAX_TOKENS = 77
"""Tokens of the texts that every published CLAP was trained on."""

_MAY_BE_ZERO = ("audio_fusion", "mel_lowest")
# Our fields and the keys of transformers' `text_config` and `audio_config`.
_TEXT_KEYS = {
    "vocab_size": "vocab_size",
    "text_width": "hidden_size",
    "text_layers": "num_hidden_layers",
    "text_heads": "num_attention_heads",
    "text_feed_forward": "intermediate_size",
    "text_positions": "max_position_embeddings",
    "text_norm_eps": "layer_norm_eps",
}
_AUDIO_KEYS = {
    "audio_width": "patch_embeds_hidden_size",
    "audio_patch": "patch_size",
    "audio_depths": "depths",
    "audio_heads": "num_attention_heads",
    "audio_window": "window_size",
    "audio_fusion": "enable_fusion",
    "mel_bins": "num_mel_bins",
    "image_size": "spec_size",
}


@dataclass(frozen=True, kw_only=True)
class ClapConfig:
    """Sizes of both towers; the defaults are those of laion/clap-htsat-fused, the paper's size.

    Attributes:
        text_positions: rows of the position table; at least max_tokens + 2, since RoBERTa counts from 2.
        max_tokens: texts are cut and padded to this many tokens.
        audio_width: channels of the first HTSAT stage; they double with each stage.
        audio_patch: size and stride of the patches of the square image that the mel spectrogram is folded
            into.
        audio_fusion: whether sounds over 10 s enter as a shrunk whole plus three crops, fused by attention.
        mel_lowest: where the mel filters begin, in Hz: 0 in transformers' CLAPs, 50 in LAION's own.
        embedding: width of the shared space.
    """

    vocab_size: int = 50265
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    text_feed_forward: int = 3072
    text_positions: int = 514
    text_norm_eps: float = 1e-12
    max_tokens: int = MAX_TOKENS
    audio_width: int = 96
    audio_patch: int = 4
    audio_depths: tuple[int, ...] = (2, 2, 6, 2)
    audio_heads: tuple[int, ...] = (4, 8, 16, 32)
    audio_window: int = 8
    audio_fusion: bool = True
    mel_bins: int = 64
    mel_lowest: float = 0.0
    image_size: int = 256
    embedding: int = 512

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            sizes = value if isinstance(value, tuple) else (value,)
            if field.name not in _MAY_BE_ZERO and (not sizes or min(sizes) <= 0):
                raise ValueError(f"{field.name} must be above 0, got {value}")
        if self.text_layers < 2:
            raise ValueError(f"text_layers must be at least 2 (the next-to-last is used), got {self.text_layers}")
        if self.text_width % self.text_heads:
            raise ValueError(f"text_width {self.text_width} must be a multiple of text_heads {self.text_heads}")
        if self.text_positions < self.max_tokens + PAD_TOKEN + 1:
            raise ValueError(f"text_positions must be at least max_tokens + 2, got {self.text_positions}")
        if len(self.audio_depths) != len(self.audio_heads):
            raise ValueError(f"audio_depths {self.audio_depths} and audio_heads {self.audio_heads} differ in length")
        widths = [self.audio_width * 2**i for i in range(len(self.audio_depths))]
        if any(width % heads for width, heads in zip(widths, self.audio_heads, strict=True)):
            raise ValueError(f"audio_heads must divide the stages' widths {widths}, got {self.audio_heads}")
        smallest = self.audio_patch * 2 ** (len(widths) - 1) * self.audio_window
        if self.image_size % smallest:
            raise ValueError(f"image_size must divide by {smallest} (patch, halvings, window): {self.image_size}")


def transformers_config(config: ClapConfig, dropout: float = 0.1) -> Any:
    """Build the `transformers.ClapConfig` of the same network; `dropout` only matters in training."""
    from transformers import ClapConfig as HubConfig

    text = {theirs: getattr(config, ours) for ours, theirs in _TEXT_KEYS.items()} | {
        "pad_token_id": PAD_TOKEN,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    audio = {theirs: getattr(config, ours) for ours, theirs in _AUDIO_KEYS.items()} | {
        "depths": list(config.audio_depths),
        "num_attention_heads": list(config.audio_heads),
        "num_hidden_layers": len(config.audio_depths),
        "hidden_size": config.audio_width * 2 ** (len(config.audio_depths) - 1),
        "patch_stride": [config.audio_patch] * 2,
        "fusion_type": "aff_2d" if config.audio_fusion else None,
        "hidden_dropout_prob": dropout,
    }
    return HubConfig(text_config=text, audio_config=audio, projection_dim=config.embedding)


def config_from_transformers(data: dict[str, Any], max_tokens: int = MAX_TOKENS, mel_lowest: float = 0.0) -> ClapConfig:
    """Read our configuration from a transformers `config.json`; missing keys take transformers' defaults.

    Raises:
        ValueError: it describes no CLAP, or one with parts that this project does not build.
    """
    if data.get("model_type") != "clap":
        raise ValueError(f"model_type is {data.get('model_type')!r}, expected 'clap'")
    text, audio = data.get("text_config") or {}, data.get("audio_config") or {}
    if text.get("hidden_act", "gelu") != "gelu" or text.get("pad_token_id", PAD_TOKEN) != PAD_TOKEN:
        raise ValueError("only text towers with gelu and padding token 1 are supported")
    sizes: dict[str, Any] = {"audio_fusion": False, "embedding": data.get("projection_dim", 512)}
    for keys, theirs in ((_TEXT_KEYS, text), (_AUDIO_KEYS, audio)):
        sizes |= {ours: theirs[key] for ours, key in keys.items() if key in theirs}
    if not isinstance(patch := sizes.get("audio_patch", 4), int):
        sizes["audio_patch"] = patch[0]
    for name in ("audio_depths", "audio_heads"):
        sizes[name] = tuple(sizes.get(name, getattr(ClapConfig, name)))
    return ClapConfig(**sizes, max_tokens=max_tokens, mel_lowest=mel_lowest)
