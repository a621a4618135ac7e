"""CLAP: one embedding space for texts and sounds (HTSAT audio tower, RoBERTa text tower), at any size.

The network is transformers' `ClapModel`; this module gives it mel features in torch, a tokenizer and the losses.
Sources: Wu et al. 2023, "Large-scale Contrastive Language-Audio Pretraining with Feature Fusion and Keyword-to-Caption
Augmentation"; Chen et al. 2022, "HTS-AT".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stable_audio_lite.clap.config import ClapConfig, transformers_config
from stable_audio_lite.clap.mel import CLIP_FRAMES, SAMPLE_RATE, log_mel, mel_views, repeat_pad
from stable_audio_lite.clap.tokenizer import tokenize

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Clap(nn.Module):
    """Both towers with their tokenizer; `model` is transformers' `ClapModel`, embeddings are of unit length."""

    def __init__(self, config: ClapConfig, tokenizer: Tokenizer, dropout: float = 0.1):
        """Start from random weights; `stable_audio_lite.clap.checkpoints.load_clap` loads trained ones."""
        super().__init__()
        from transformers import ClapModel

        self.config = config
        self.tokenizer = tokenizer
        self.model = ClapModel(transformers_config(config, dropout))

    def forward(
        self, ids: Tensor, mask: Tensor, mels: Tensor, longer: Tensor, corrupted: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute text and audio embeddings (B, embedding), and the language loss where `corrupted` ids are given.

        Takes token ids and mask (B, N), `mel_views` (B, 1 or 4, 1001, bins), and whether a spectrogram is longer than
        those (B,).
        """
        language = None if corrupted is None else self._language_loss(ids, mask, corrupted)
        return self._embed_tokens(ids, mask), self._embed_views(mels, longer), language

    def _language_loss(self, ids: Tensor, mask: Tensor, corrupted: Tensor) -> Tensor:
        """Cross-entropy (a scalar) of `ids` as predicted by the next-to-last text layer from `corrupted` ones.

        It is the masked language model that RoBERTa is before it becomes a CLAP's text tower (Liu et al. 2019), here
        over all tokens: with the contrastive loss alone, the layer that generators read forgets what the audio tower
        can't hear.
        """
        hidden = self.model.text_model(
            input_ids=corrupted, attention_mask=mask.long(), output_hidden_states=True
        ).hidden_states[-2]
        logits = hidden[mask] @ self.model.text_model.get_input_embeddings().weight.T
        return F.cross_entropy(logits.float(), ids[mask])

    @torch.no_grad()
    def embed_text(self, prompts: list[str]) -> Tensor:
        """Prompts -> unit vectors (B, embedding)."""
        ids, mask = tokenize(self.tokenizer, prompts, self.config.max_tokens)
        return self._embed_tokens(ids.to(self.device), mask.to(self.device))

    @torch.no_grad()
    def embed_audio(self, waveform: Tensor, sample_rate: int = SAMPLE_RATE) -> Tensor:
        """Sounds (B, T) or (B, C, T), full scale 1 -> unit vectors (B, embedding).

        Channels are averaged, other rates resampled. Sounds under 10 s are repeated; over 10 s a fusion
        model takes the shrunk whole and crops at its start, middle and end, another model the middle 10 s.

        Raises:
            ValueError: T is 0.
        """
        import torchaudio.functional

        mono = waveform.mean(1) if waveform.ndim == 3 else waveform
        if sample_rate != SAMPLE_RATE:
            mono = torchaudio.functional.resample(mono.float(), sample_rate, SAMPLE_RATE)
        return self.embed_mels([log_mel(self.config, repeat_pad(row)) for row in mono.to(self.device)])

    @torch.no_grad()
    def embed_mels(self, mels: Sequence[Tensor]) -> Tensor:
        """Log-mel spectrograms of at least 10 s, each (frames, mel_bins) -> unit vectors (B, embedding)."""
        views = torch.stack([mel_views(self.config, mel) for mel in mels])
        longer = torch.tensor([len(mel) > CLIP_FRAMES for mel in mels])
        return self._embed_views(views.to(self.device), longer.to(self.device))

    def loss(self, text: Tensor, audio: Tensor) -> Tensor:
        """Symmetric contrastive loss of matching unit vectors (B, embedding).

        Inverse temperatures are learned, one for each direction, and stay under 100.
        """
        labels = torch.arange(len(text), device=text.device)
        similarity = audio.float() @ text.float().T
        by_audio, by_text = (s.clamp(max=math.log(100.0)).exp() for s in self.logit_scales)
        return (F.cross_entropy(by_audio * similarity, labels) + F.cross_entropy(by_text * similarity.T, labels)) / 2

    @property
    def logit_scales(self) -> tuple[Tensor, Tensor]:
        """Logarithms of the inverse temperatures: sound to text, text to sound."""
        return self.model.logit_scale_a, self.model.logit_scale_t

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return self.model.logit_scale_a.device

    def _embed_tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        pooled = self.model.text_model(input_ids=ids, attention_mask=mask.long()).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)

    def _embed_views(self, mels: Tensor, longer: Tensor) -> Tensor:
        pooled = self.model.audio_model(input_features=mels, is_longer=longer[:, None]).pooler_output
        return F.normalize(self.model.audio_projection(pooled), dim=-1)


def retrieval(text: Tensor, audio: Tensor) -> dict[str, float]:
    """Recall at 1 and 10 in percent of matching unit vectors (N, D), from text to audio and back.

    A match that ties with others counts as found after them.
    """
    similarity = text @ audio.T  # N texts, N sounds
    recalls: dict[str, float] = {}
    for name, scores in (("text_to_audio", similarity), ("audio_to_text", similarity.T)):
        rank = (scores >= scores.diag()[:, None]).sum(1) - 1
        recalls |= {f"{name}/R@{k}": 100 * float((rank < k).float().mean()) for k in (1, 10)}
    return recalls
