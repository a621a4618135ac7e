"""Text features for generators: the next-to-last layer of a CLAP's text tower.

The tower is RoBERTa's encoder (Liu et al. 2019, post-norm) without its last layer and pooler, which the features do
not need. It is written out here because importing transformers takes longer than encoding a prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stable_audio_lite.clap.config import ClapConfig
from stable_audio_lite.clap.tokenizer import PAD_TOKEN, ran_out, tokenize, unlearned_words, unread_parts
from stable_audio_lite.nn.attention import Condition, merge_heads, split_heads

if TYPE_CHECKING:
    from tokenizers import Tokenizer


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
        q, k, v = (split_heads(project(x), self.heads) for project in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = self.attention_norm(x + self.out(merge_heads(attended)))
        return self.feed_forward_norm(x + self.down(F.gelu(self.up(x))))


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
    """The frozen text tower, from prompts to a condition; it only needs its weights and `tokenizer.json`."""

    def __init__(self, config: ClapConfig, tokenizer: Tokenizer):
        """Start from random weights; `stable_audio_lite.clap.checkpoints.load_text_encoder` loads trained ones."""
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.tower = TextTower(config).requires_grad_(False)
        self.eval()

    @property
    def width(self) -> int:
        """Features per token, D."""
        return self.config.text_width

    @property
    def max_tokens(self) -> int:
        """Tokens per prompt, N: shorter texts are padded and masked, longer ones cut."""
        return self.config.max_tokens

    def train(self, mode: bool = True) -> TextEncoder:
        """Stay in eval mode: the text encoder is never trained here."""
        return super().train(False)

    def remarks(self, prompt: str) -> list[str]:
        """Say what of a prompt is cut off, and, where that is known, which words were in no caption in training."""
        (unread,) = unread_parts(self.tokenizer, [prompt], self.max_tokens)
        found = [f"not read, for prompts end after {self.max_tokens} tokens: {unread!r}"] if unread else []
        known = ran_out(self.tokenizer, self.config.vocab_size)
        if known and (unlearned := unlearned_words(self.tokenizer, prompt.removesuffix(unread))):
            found.append(f"in no text that the text encoder learned from: {', '.join(unlearned)}")
        return found

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
        ids, mask = (x.to(device) for x in tokenize(self.tokenizer, prompts, self.max_tokens))
        features = self.tower(ids, mask) * mask[..., None]
        padding = self.max_tokens - mask.shape[1]
        return Condition(F.pad(features, (0, 0, 0, padding)), F.pad(mask, (0, padding)))
