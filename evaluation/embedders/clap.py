"""CLAP, any of the project: LAION's `.pt`, a transformers folder or hub id, or a bundle with a whole CLAP."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation.embedders.streams import TargetLevel, mono_at
from evaluation.embedders.weights import Published, state_hash
from stable_audio_lite import bundle
from stable_audio_lite.audio.io import AudioSource
from stable_audio_lite.clap.mel import CLIP_SAMPLES, HOP, SAMPLE_RATE, log_mel
from stable_audio_lite.clap.model import Clap, ClapConfig, clap_mel
from stable_audio_lite.clap.text import load_clap, load_whole_clap
from stable_audio_lite.errors import UserError

PUBLISHED = Published(
    file="630k-audioset-fusion-best.pt",
    address="https://huggingface.co/lukewys/laion_clap/resolve/main/630k-audioset-fusion-best.pt",
    option="--clap",
)
_PIECE, _MARGIN = 1000, 2  # frames computed at once, and those on each side that a frame's window reaches into
_TEXTS = 64  # prompts embedded at once


class ClapEmbedder:
    """One unit vector for a whole file; `clap` is in its place."""

    name = "clap"
    unit = ""

    def __init__(self, clap: Clap, level: TargetLevel):
        self.clap, self.level = clap.eval(), level
        longer = "shrunk whole, begin, middle and end" if clap.config.audio_fusion else "middle"
        self.settings: dict[str, Any] = {
            "weights": state_hash(clap.state_dict()),
            "tokenizer": hashlib.sha256(clap.tokenizer.to_str().encode()).hexdigest()[:12],
            "sample_rate": SAMPLE_RATE,
            "mel": f"{clap.config.mel_bins} bands from {clap.config.mel_lowest:g} Hz",
            "channels": "mean of left and right",
            "window": f"10 s: shorter ones repeated, of longer ones {longer}",
            "level": level.of("mean"),
        }

    @torch.inference_mode()
    def embed(self, source: AudioSource) -> dict[str, Tensor]:
        """ "embedding" (1, D) of a file.

        Raises:
            UserError: it can't be read.
        """
        mel, longer = whole_mel(self.clap.config, mono_at(source, SAMPLE_RATE, self.level))
        return {"embedding": self.clap.embed_mel(mel, longer).cpu()}

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (B, D)."""
        parts = [self.clap.embed_text(list(prompts[i : i + _TEXTS])) for i in range(0, len(prompts), _TEXTS)]
        return torch.cat(parts).cpu()


def whole_mel(config: ClapConfig, blocks: Iterable[Tensor]) -> tuple[Tensor, bool]:
    """What `clap_mel` gives of all 48 kHz (1, T) blocks together, (frames, mel_bins), and whether they are over 10 s.

    The audio is not held: a frame takes 256 bytes, 25 kB for a second of sound.
    """
    held, lead, total = torch.zeros(0), 0, 0
    frames: list[Tensor] = []
    for block in blocks:
        held, total = torch.cat((held, block[0])), total + block.shape[1]
        while len(held) >= (lead + _PIECE + _MARGIN) * HOP:
            piece = _log_mel(config, held[: (lead + _PIECE + _MARGIN) * HOP])
            frames.append(piece[lead : lead + _PIECE])
            held, lead = held[(lead + _PIECE - _MARGIN) * HOP :], _MARGIN
    if not frames:
        return clap_mel(config, held if total else torch.zeros(1)), total > CLIP_SAMPLES
    return torch.cat([*frames, _log_mel(config, held)[lead:]]), total > CLIP_SAMPLES


def _log_mel(config: ClapConfig, waveform: Tensor) -> Tensor:
    return log_mel(waveform, config.mel_bins, config.mel_lowest, config.audio_fusion)


def load_any_clap(source: str | Path) -> Clap:
    """A CLAP: a shipped model, a bundle's folder, or what `load_clap` reads.

    A LAION `.pt` takes the `tokenizer.json` beside it; where there is none, RoBERTa's from the hub.

    Raises:
        UserError: there is no such thing, it is damaged, or the bundle has no audio tower.
    """
    path = Path(source)
    if str(source) in bundle.SHIPPED or (path / bundle.CONFIG_FILE).is_file():
        if (clap := load_whole_clap(bundle.resolve(source))) is None:
            raise UserError(f"{source}: has no audio_encoder.safetensors; give a bundle with both CLAP towers")
        return clap
    tokenizer = path.with_name(bundle.TOKENIZER_FILE)
    return Clap.from_weights(load_clap(source, tokenizer if path.is_file() and tokenizer.is_file() else None))
