"""Reads LAION-CLAP `.pt` checkpoints under transformers' names, without the laion_clap package.

LAION's RoBERTa branch has Hugging Face's names already; its HTSAT branch has Swin's, with query, key and
value in one matrix. Sizes are read off the weights.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stable_audio_lite.clap.model import PAD_TOKEN, ClapConfig, ClapWeights, fetch, load_tokenizer
from stable_audio_lite.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

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


def read_laion(path: str | Path, tokenizer: str | Path = "FacebookAI/roberta-base") -> ClapWeights:
    """Read a LAION-CLAP checkpoint with an HTSAT and a RoBERTa branch.

    Args:
        path: the `.pt` file; only tensors and plain values are unpickled, and nothing in it is run.
        tokenizer: a `tokenizer.json`, a folder with one, or a hub id; LAION's models use RoBERTa's.

    Raises:
        UserError: the file is missing, broken, unsafe to load or no such checkpoint, or there's no tokenizer.
    """
    state = _rename(_tensors(path), str(path))
    try:
        config = _config(state)
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path}: not a LAION-CLAP checkpoint with HTSAT and RoBERTa ({error})") from error
    return ClapWeights(config, state, _tokenizer(tokenizer), str(path))


class _Ignored:
    """Stands in for a NumPy value, which nothing here needs."""

    def __init__(self, *_: object):
        pass

    def __setstate__(self, _: object) -> None:
        pass


class _TensorUnpickler(pickle.Unpickler):
    """Knows how tensors are rebuilt, and nothing else that a pickle could name."""

    _ALLOWED = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
        ("torch", "Size"): torch.Size,
        ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
        **{("torch", name): getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16", "int64")},
    }
    _NUMPY = {"numpy", "numpy.core.multiarray", "numpy._core.multiarray"}

    def find_class(self, module: str, name: str) -> Any:
        if module in self._NUMPY:
            return _Ignored
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"names {module}.{name}")
        return self._ALLOWED[module, name]


def _tensors(path: str | Path) -> dict[str, Tensor]:
    # torch's own `weights_only` refuses these files: they hold training figures as NumPy scalars.
    safe = ModuleType("tensors alone")  # in the place of the module pickle
    safe.__dict__.update(Unpickler=_TensorUnpickler, load=lambda file, **more: _TensorUnpickler(file, **more).load())
    try:
        if zipfile.is_zipfile(path) and any(n.endswith("/constants.pkl") for n in zipfile.ZipFile(path).namelist()):
            raise pickle.UnpicklingError("a TorchScript program, which torch.load would hand to another loader")
        data: Any = torch.load(path, map_location="cpu", weights_only=False, pickle_module=safe)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; give a LAION-CLAP .pt checkpoint") from error
    except Exception as error:  # torch raises several kinds for broken files and for code in pickles
        raise UserError(f"{path}: broken, or holds more than tensors and is not loaded") from error
    state = data.get("state_dict", data) if isinstance(data, dict) else None
    if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
        raise UserError(f"{path}: holds no state_dict; give a LAION-CLAP .pt checkpoint")
    return {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}


def _rename(state: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if _UNUSED.search(name):
            continue
        if match := re.fullmatch(r"audio_branch\.(.*)\.attn\.qkv\.(weight|bias)", name):
            prefix = f"audio_model.audio_encoder.{match[1]}.attention.self"
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[f"{prefix}.{part}.{match[2]}"] = third.contiguous()
            continue
        # RoBERTa's own names hold none of Swin's, so the same renames are safe for both branches.
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def _config(state: dict[str, Tensor]) -> ClapConfig:
    words = state["text_model.embeddings.word_embeddings.weight"]
    patches = state["audio_model.audio_encoder.patch_embed.proj.weight"]
    stages = 1 + max(_indices(state, r"audio_model\.audio_encoder\.layers\.(\d+)\."))
    tables = [
        state[f"audio_model.audio_encoder.layers.{i}.blocks.0.attention.self.relative_position_bias_table"]
        for i in range(stages)
    ]
    positions = state["text_model.embeddings.position_embeddings.weight"].shape[0]
    return ClapConfig(
        vocab_size=words.shape[0],
        text_width=words.shape[1],
        text_layers=1 + max(_indices(state, r"text_model\.encoder\.layer\.(\d+)\.")),
        text_heads=words.shape[1] // _ROBERTA_HEAD,
        text_feed_forward=state["text_model.encoder.layer.0.intermediate.dense.weight"].shape[0],
        text_positions=positions,
        max_tokens=min(77, positions - PAD_TOKEN - 1),
        text_norm_eps=_ROBERTA_EPS,
        audio_width=patches.shape[0],
        audio_patch=patches.shape[-1],
        audio_depths=tuple(
            1 + max(_indices(state, rf"audio_model\.audio_encoder\.layers\.{i}\.blocks\.(\d+)\."))
            for i in range(stages)
        ),
        audio_heads=tuple(t.shape[1] for t in tables),
        audio_window=(math.isqrt(tables[0].shape[0]) + 1) // 2,  # the table has (2 window - 1)^2 rows
        audio_fusion="audio_model.audio_encoder.patch_embed.mel_conv2d.weight" in state,
        mel_bins=len(state["audio_model.audio_encoder.batch_norm.weight"]),
        mel_lowest=_LOWEST,
        embedding=state["text_projection.linear1.weight"].shape[0],
    )


def _indices(state: dict[str, Tensor], pattern: str) -> list[int]:
    return [int(m[1]) for name in state if (m := re.match(pattern, name))]


def _tokenizer(source: str | Path) -> Tokenizer:
    path = Path(source)
    if path.is_file():
        return load_tokenizer(path)
    folder = path if path.is_dir() else fetch(str(source), ("tokenizer.json",))
    return load_tokenizer(folder / "tokenizer.json")
