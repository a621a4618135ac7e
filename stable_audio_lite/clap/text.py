"""Text features for the U-Net: the next-to-last layer of a CLAP text tower, from any source of CLAP weights.

The tower is RoBERTa's encoder (Liu et al. 2019, post-norm) without its last layer and pooler, which the
features do not need. It is written out here because importing transformers takes longer than encoding a
prompt.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stable_audio_lite import bundle
from stable_audio_lite.clap.laion import read_laion
from stable_audio_lite.clap.model import (
    PAD_TOKEN,
    Clap,
    ClapConfig,
    ClapWeights,
    load_state,
    load_tokenizer,
    read_transformers,
    tokenize,
)
from stable_audio_lite.config import from_dict
from stable_audio_lite.errors import UserError
from stable_audio_lite.nn.attention import Condition

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# transformers' names -> ours, before the layers and inside one
_EMBEDDING_NAMES = {
    "word_embeddings": "tokens",
    "position_embeddings": "positions",
    "token_type_embeddings": "types",
    "LayerNorm": "norm",
}
_LAYER_NAMES = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "feed_forward_norm",
}


class TextLayer(nn.Module):
    """Self-attention, then feed-forward, each added to its input and normed after."""

    def __init__(self, config: ClapConfig):
        super().__init__()
        width = config.text_width
        self.heads = config.text_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=config.text_norm_eps)
        self.up = nn.Linear(width, config.text_feed_forward)
        self.down = nn.Linear(config.text_feed_forward, width)
        self.feed_forward_norm = nn.LayerNorm(width, eps=config.text_norm_eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, N, D), mask (B, N) True = attend -> (B, N, D)."""
        q, k, v = (self._heads(project(x)) for project in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = self.attention_norm(x + self.out(attended.transpose(1, 2).flatten(2)))
        return self.feed_forward_norm(x + self.down(F.gelu(self.up(x))))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B, heads, N, D / heads


class TextTower(nn.Module):
    """RoBERTa up to its next-to-last layer: ids (B, N), mask (B, N) -> features (B, N, D)."""

    def __init__(self, config: ClapConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.text_width)
        self.positions = nn.Embedding(config.text_positions, config.text_width)
        self.types = nn.Embedding(1, config.text_width)  # RoBERTa has a single type of token
        self.norm = nn.LayerNorm(config.text_width, eps=config.text_norm_eps)
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.text_layers - 1))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        positions = mask.cumsum(1) * mask + PAD_TOKEN
        x = self.norm(self.tokens(ids) + self.positions(positions) + self.types.weight[0])
        for layer in self.layers:
            x = layer(x, mask)
        return x


class TextEncoder(nn.Module):
    """Prompts -> condition. Frozen and in eval mode; weights and `tokenizer.json` are all that it needs."""

    def __init__(self, config: ClapConfig, tokenizer: Tokenizer):
        """Random weights; `load_state_dict` or the constructors below fill them."""
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.tower = TextTower(config).requires_grad_(False)
        self.eval()

    @classmethod
    def from_weights(cls, weights: ClapWeights) -> TextEncoder:
        """The text tower of a whole CLAP.

        Raises:
            UserError: weights are missing or of another shape.
        """
        encoder = cls(weights.config, weights.tokenizer)
        load_state(encoder.tower, _tower_state(weights.state), weights.source)
        return encoder

    @classmethod
    def from_clap(cls, clap: Clap) -> TextEncoder:
        """A copy of the text tower of `clap`."""
        return cls.from_weights(ClapWeights(clap.config, clap.model.state_dict(), clap.tokenizer, "CLAP"))

    @classmethod
    def from_transformers(cls, source: str | Path) -> TextEncoder:
        """From a transformers-format CLAP: folder or hub id. Raises UserError as `read_transformers`."""
        return cls.from_weights(read_transformers(source))

    @classmethod
    def from_laion(cls, path: str | Path, tokenizer: str | Path = "FacebookAI/roberta-base") -> TextEncoder:
        """From a LAION-CLAP `.pt`. Raises UserError as `read_laion`."""
        return cls.from_weights(read_laion(path, tokenizer))

    @property
    def width(self) -> int:
        """Features per token, D."""
        return self.config.text_width

    @property
    def max_tokens(self) -> int:
        """Tokens per prompt, N: shorter texts are padded and masked, longer ones cut."""
        return self.config.max_tokens

    def train(self, mode: bool = True) -> TextEncoder:
        """Stays in eval mode: the text encoder is never trained here."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Condition:
        """Prompts -> tokens (B, max_tokens, width), mask (B, max_tokens).

        A prompt of more than `max_tokens` tokens, counting its start and end, is cut. Features of padding
        are zero and masked. Each prompt's features depend on that prompt alone.

        Raises:
            ValueError: `prompts` is empty or a bare string.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"expected a list of at least one prompt, got {prompts!r}")
        device = self.tower.norm.weight.device
        ids, mask = tokenize(self.tokenizer, prompts, self.max_tokens)
        ids, mask = ids.to(device), mask.to(device)
        used = int(mask.sum(1).max())  # columns that are padding in every prompt need no computing
        features = self.tower(ids[:, :used], mask[:, :used]) * mask[:, :used, None]
        return Condition(F.pad(features, (0, 0, 0, self.max_tokens - used)), mask)


def bundle_config(folder: str | Path) -> ClapConfig:
    """The sizes of the CLAP in a bundle.

    Raises:
        UserError: the bundle's config is missing or wrong, or has no `clap`.
    """
    file, data = bundle.read_config(folder)
    if not isinstance(data.get("clap"), dict):
        raise UserError(f"{file}: has no key 'clap', so this model reads no text; give one that does")
    return from_dict(ClapConfig, data["clap"], str(file))


def load_whole_clap(folder: str | Path) -> Clap | None:
    """Both towers of a bundle's CLAP in float32, or None where the bundle lacks the audio tower.

    Raises:
        UserError: a file is missing or damaged, or its weights don't fit.
    """
    if not bundle.part_path(folder, "audio_encoder").is_file():
        return None
    text, audio = (
        {k: v.float() if v.is_floating_point() else v for k, v in bundle.read_part(folder, part).items()}
        for part in ("text_encoder", "audio_encoder")
    )
    tokenizer = load_tokenizer(Path(folder) / bundle.TOKENIZER_FILE)
    return join_clap(bundle_config(folder), tokenizer, text, audio, str(folder))


def load_clap(source: str | Path, tokenizer: str | Path | None = None) -> ClapWeights:
    """Weights from any source: a LAION-CLAP `.pt`, a transformers-format folder or a hub id.

    `tokenizer` is for `.pt` files, which hold none; the default is RoBERTa's from the hub.

    Raises:
        UserError: as `read_laion` and `read_transformers`.
    """
    if Path(source).suffix in {".pt", ".pth", ".ckpt"}:
        return read_laion(source, tokenizer) if tokenizer else read_laion(source)
    return read_transformers(source)


def split_clap(clap: Clap) -> dict[str, dict[str, Tensor]]:
    """State dicts of a bundle's two CLAP parts: `text_encoder`, and `audio_encoder` with all else of the CLAP.

    A generator needs the first alone; `join_clap` takes both.
    """
    rest = {name: value for name, value in clap.model.state_dict().items() if not in_text_encoder(name, clap.config)}
    return {"text_encoder": TextEncoder.from_clap(clap).state_dict(), "audio_encoder": rest}


def in_text_encoder(name: str, config: ClapConfig) -> bool:
    """Whether the weight that transformers calls `name` is part of the features that a U-Net sees."""
    ours = _our_name(name)
    return ours is not None and not ours.startswith(f"layers.{config.text_layers - 1}.")  # the tower ends before it


def join_clap(
    config: ClapConfig,
    tokenizer: Tokenizer,
    text_encoder: dict[str, Tensor],
    audio_encoder: dict[str, Tensor],
    source: str,
) -> Clap:
    """The whole CLAP of the two parts that `split_clap` made; `source` names them in messages.

    Raises:
        UserError: weights are missing or of another shape.
    """
    clap = Clap(config, tokenizer)
    state = dict(audio_encoder)
    for name in clap.model.state_dict():
        if (ours := _our_name(name)) and f"tower.{ours}" in text_encoder:
            state[name] = text_encoder[f"tower.{ours}"]
    load_state(clap.model, state, source)
    return clap.eval()


def _tower_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' `text_model.*` weights under the names of `TextTower`."""
    return {ours: value for name, value in state.items() if (ours := _our_name(name))}


def _our_name(name: str) -> str | None:
    """transformers' name of a weight -> that in `TextTower`; None for weights of another part."""
    match = re.fullmatch(r"text_model\.(?:encoder\.layer\.(\d+)|(embeddings))\.(.+)\.(weight|bias)", name)
    if match is None:
        return None
    layer, _, part, kind = match.groups()
    known = _EMBEDDING_NAMES if layer is None else _LAYER_NAMES
    prefix = "" if layer is None else f"layers.{layer}."
    return f"{prefix}{known[part]}.{kind}"
