"""LAION-CLAP's `.pt` checkpoints under transformers' names, without the laion_clap package.

LAION's RoBERTa branch has Hugging Face's names already; its HTSAT branch has Swin's, with query, key and
value in one matrix.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from torch import Tensor

from stable_audio_lite.clap.config import MAX_TOKENS, ClapConfig
from stable_audio_lite.clap.tokenizer import PAD_TOKEN
from stable_audio_lite.errors import UserError
from stable_audio_lite.weights import read_pickle

_RENAMES = (
    (r"^text_branch\.", "text_model."),
    (r"^audio_branch\.", "audio_model.audio_encoder."),
    (r"^(text|audio)_projection\.0\.", r"\1_projection.linear1."),
    (r"^(text|audio)_projection\.2\.", r"\1_projection.linear2."),
    (r"\.bn0\.", ".batch_norm."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.relative", ".attention.self.relative"),
)
# Parts that only LAION's training used.
_UNUSED = re.compile(
    r"^(text|audio)_transform\.|(spectrogram|logmel)_extractor|tscam_conv|audio_branch\.head\.|attn_mask|_ids$"
)
_ROBERTA_HEAD = 64  # features per head in every RoBERTa size
_ROBERTA_EPS = 1e-5  # roberta-base's layer norm, which LAION trained with
_LOWEST = 50.0  # Hz, in all of LAION's audio configs


def read_laion(path: str | Path) -> dict[str, Tensor]:
    """Weights of a LAION-CLAP checkpoint under the names of transformers' `ClapModel`.

    Raises:
        UserError: as `stable_audio_lite.weights.read_pickle`.
    """
    return _rename({name.removeprefix("module."): value for name, value in read_pickle(path)[0].items()})


def _rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if _UNUSED.search(name):
            continue
        if match := re.fullmatch(r"audio_branch\.(.*)\.attn\.qkv\.(weight|bias)", name):
            prefix = f"audio_model.audio_encoder.{match[1]}.attention.self"
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[f"{prefix}.{part}.{match[2]}"] = third
            continue
        # RoBERTa's own names hold none of Swin's, so the same renames are safe for both branches.
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def infer_config(state: dict[str, Tensor], path: str | Path) -> ClapConfig:
    """Sizes of the CLAP whose weights `read_laion` read from `path`.

    Raises:
        UserError: it has no HTSAT and RoBERTa branches.
    """
    try:
        return _infer_config(state)
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path}: not a LAION-CLAP checkpoint with HTSAT and RoBERTa ({error})") from error


def _infer_config(state: dict[str, Tensor]) -> ClapConfig:
    text, audio = "text_model.", "audio_model.audio_encoder."
    vocab_size, width = state[f"{text}embeddings.word_embeddings.weight"].shape
    positions = len(state[f"{text}embeddings.position_embeddings.weight"])
    patches = state[f"{audio}patch_embed.proj.weight"]
    stages = range(_count(state, rf"{audio}layers\.(\d+)\."))
    tables = [state[f"{audio}layers.{i}.blocks.0.attention.self.relative_position_bias_table"] for i in stages]
    return ClapConfig(
        vocab_size=vocab_size,
        text_width=width,
        text_layers=_count(state, rf"{text}encoder\.layer\.(\d+)\."),
        text_heads=width // _ROBERTA_HEAD,
        text_feed_forward=len(state[f"{text}encoder.layer.0.intermediate.dense.weight"]),
        text_positions=positions,
        max_tokens=min(MAX_TOKENS, positions - PAD_TOKEN - 1),
        text_norm_eps=_ROBERTA_EPS,
        audio_width=len(patches),
        audio_patch=patches.shape[-1],
        audio_depths=tuple(_count(state, rf"{audio}layers\.{i}\.blocks\.(\d+)\.") for i in stages),
        audio_heads=tuple(table.shape[1] for table in tables),
        audio_window=(math.isqrt(len(tables[0])) + 1) // 2,  # the table has (2 window - 1)^2 rows
        audio_fusion=f"{audio}patch_embed.mel_conv2d.weight" in state,
        mel_bins=len(state[f"{audio}batch_norm.weight"]),
        mel_lowest=_LOWEST,
        embedding=len(state["text_projection.linear1.weight"]),
    )


def _count(state: dict[str, Tensor], pattern: str) -> int:
    """One more than the highest index that `pattern` finds in the names."""
    return 1 + max(int(match[1]) for name in state if (match := re.match(pattern, name)))
