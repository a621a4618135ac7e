"""CLAP as an embedder, from any source that `stable_audio_lite.clap.checkpoints` reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation.embedders.streams import TargetLevel, mono_at
from evaluation.embedders.weights import Published
from evaluation.result import Missing
from stable_audio_lite.audio.io import AudioSource
from stable_audio_lite.clap.checkpoints import LAION_SUFFIXES, load_clap
from stable_audio_lite.clap.config import ClapConfig
from stable_audio_lite.clap.mel import HOP, SAMPLE_RATE, log_mel, repeat_pad
from stable_audio_lite.clap.model import Clap
from stable_audio_lite.errors import UserError
from stable_audio_lite.weights import state_hash

CLAP_WEIGHTS = Published(
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
            "weights": state_hash(clap.state_dict())[:12],
            "tokenizer": hashlib.sha256(clap.tokenizer.to_str().encode()).hexdigest()[:12],
            "sample_rate": SAMPLE_RATE,
            "mel": f"{clap.config.mel_bins} bands from {clap.config.mel_lowest:g} Hz",
            "channels": "mean of left and right",
            "window": f"10 s: shorter ones repeated, of longer ones {longer}",
            "level": level.of("mean"),
        }

    @torch.inference_mode()
    def embed(self, source: AudioSource) -> dict[str, Tensor]:
        """ "embedding" (1, D) of a file."""
        mel = streamed_log_mel(self.clap.config, mono_at(source, SAMPLE_RATE, self.level))
        return {"embedding": self.clap.embed_mels([mel]).cpu()}

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (B, D)."""
        parts = [self.clap.embed_text(list(prompts[i : i + _TEXTS])) for i in range(0, len(prompts), _TEXTS)]
        return torch.cat(parts).cpu()


def streamed_log_mel(config: ClapConfig, blocks: Iterable[Tensor]) -> Tensor:
    """`log_mel` (frames, mel_bins) of consecutive 48 kHz blocks (1, T), repeated to fill 10 s.

    The audio is not held: a frame takes 256 bytes, 25 kB for a second of sound.
    """
    held, lead = torch.zeros(0), 0
    frames: list[Tensor] = []
    for block in blocks:
        held = torch.cat((held, block[0]))
        while len(held) >= (lead + _PIECE + _MARGIN) * HOP:
            piece = log_mel(config, held[: (lead + _PIECE + _MARGIN) * HOP])
            frames.append(piece[lead : lead + _PIECE])
            held, lead = held[(lead + _PIECE - _MARGIN) * HOP :], _MARGIN
    if not frames:
        return log_mel(config, repeat_pad(held if len(held) else torch.zeros(1)))
    return torch.cat([*frames, log_mel(config, held)[lead:]])


def load_clap_embedder(source: str | None, folder: Path, device: torch.device, level: TargetLevel) -> ClapEmbedder:
    """The embedder at `source`; None is LAION's in `folder`, or else the shipped starter's, which needs no download.

    Raises:
        Missing: none is given, and this installation has no starter.
        UserError: there is no such thing, it is damaged, or the bundle has no audio tower.
    """
    if source is None and not (folder / CLAP_WEIGHTS.file).is_file():
        try:
            return ClapEmbedder(load_clap("starter").to(device), level)
        except UserError as error:
            raise Missing(f"{error}; or give --clap SOURCE") from error
    if source is None or source.endswith(LAION_SUFFIXES):
        source = str(CLAP_WEIGHTS.find(source, folder))
    return ClapEmbedder(load_clap(source).to(device), level)
