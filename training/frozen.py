"""Networks that earlier stages trained: whether they are there, and the frozen CLAP that a U-Net is trained with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stable_audio_lite.bundle import SHIPPED
from stable_audio_lite.clap.checkpoints import read_checkpoint
from stable_audio_lite.clap.config import ClapConfig
from stable_audio_lite.clap.text_encoder import TextEncoder
from stable_audio_lite.errors import UserError
from stable_audio_lite.weights import state_hash


def check_stage(key: str, path: str | None, trainers: str, *, hub: bool = False) -> None:
    """Refuse the path of a bundle that is not trained yet; with `hub`, a/b may be an id on the hub.

    Raises:
        UserError: names the key and the `trainers` to run first.
    """
    if path is None or path in SHIPPED or Path(path).suffix in (".pt", ".pth", ".ckpt"):
        return
    if (Path(path) / "bundle").is_dir():
        raise UserError(f"{key}: {path} is the folder of a run; give {Path(path) / 'bundle'}")
    if not Path(path).exists() and not (hub and len(Path(path).parts) == 2):
        raise UserError(f"{key}: {path} is not there yet; run {trainers} to its end first, or give another bundle")


@dataclass(frozen=True)
class FrozenClap:
    """The text encoder to condition on, and the parts that the exported bundle takes over."""

    text: TextEncoder
    parts: Mapping[str, dict[str, Tensor]]

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits that identify the text encoder, tokenizer included."""
        tokenizer = json.loads(self.text.tokenizer.to_str())
        words = json.dumps({key: value for key, value in tokenizer.items() if key not in ("truncation", "padding")})
        return hashlib.sha256((state_hash(self.parts["text_encoder"]) + words).encode()).hexdigest()[:12]

    def check_same(self, theirs: Mapping[str, Tensor], bundle: str, source: str) -> None:
        """Refuse to continue from `bundle` if its text encoder isn't this one, which came from `source`.

        Raises:
            UserError: weights differ by more than rounding to bfloat16, as which shipped bundles store them.
        """
        ours = self.parts["text_encoder"]
        if theirs.keys() != ours.keys() or not all(
            v.shape == ours[k].shape and torch.allclose(v.float(), ours[k].float(), rtol=1e-2, atol=1e-3)
            for k, v in theirs.items()
        ):
            raise UserError(f"initial: {bundle} was trained with another text encoder than that of {source}")


def load_frozen_clap(source: str, clap: ClapConfig) -> FrozenClap:
    """Load the CLAP at `source`, any that `stable_audio_lite.clap.checkpoints` reads.

    Raises:
        UserError: it can't be read, or its sizes differ from the model config's `clap`.
    """
    checkpoint = read_checkpoint(source, clap)
    return FrozenClap(checkpoint.text_encoder(), checkpoint.parts)
