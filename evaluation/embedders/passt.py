"""PaSST (Koutini et al. 2022, arXiv 2110.05069) through hear21passt: an AudioSet tagger.

Windows as stable-audio-metrics takes them: of 10 s every 5 s, the last one filled up with silence; a sound of at most
1.5 s is taken as it is.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evaluation.embedders.streams import TargetLevel, batches, mono_at, overlapping_windows
from evaluation.embedders.weights import Published, fill_network
from evaluation.result import Missing
from stable_audio_lite.audio.io import AudioSource
from stable_audio_lite.errors import UserError
from stable_audio_lite.weights import read_weights, state_hash

PASST_WEIGHTS = Published(
    file="passt-s-f128-p16-s10-ap.476-swa.pt",
    address="https://github.com/kkoutini/PaSST/releases/download/v0.0.1-audioset/passt-s-f128-p16-s10-ap.476-swa.pt",
    option="--passt",
)
_SAMPLE_RATE = 32000
_WINDOW, _HOP = 10 * _SAMPLE_RATE, 5 * _SAMPLE_RATE
_ALONE = _WINDOW * 15 // 100  # samples up to which a sound is not filled up
_SHORTEST = 16 * 320  # samples of one patch
_HEAD = 64  # features of an attention head in every PaSST


class PaSST(nn.Module):
    """Sounds (B, T) at 32 kHz, up to 10 s -> logits (B, classes) and features (B, D); the network is hear21passt's."""

    def __init__(self, *, width: int, depth: int, classes: int):
        super().__init__()
        from hear21passt.models import passt
        from hear21passt.models.preprocess import AugmentMelSTFT

        passt.first_RUN = False  # it would print every shape
        with contextlib.redirect_stdout(io.StringIO()):
            self.mel = AugmentMelSTFT(fmin_aug_range=10, fmax_aug_range=2000)
        self.net = passt.PaSST(
            img_size=(128, 998),
            stride=10,
            num_classes=classes,
            embed_dim=width,
            depth=depth,
            num_heads=width // _HEAD,
            distilled=True,
        )

    def forward(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(self.mel(audio)[:, None])


class PaSSTEmbedder:
    """Logits and features of every window; `network` is in its place."""

    name = "passt"
    unit = "windows"

    def __init__(self, network: PaSST, level: TargetLevel, batch: int):
        self.network, self.level, self.batch = network.eval(), level, batch
        self.settings: dict[str, Any] = {
            "weights": state_hash(network.net.state_dict())[:12],
            "sample_rate": _SAMPLE_RATE,
            "channels": "mean of left and right",
            "window": "10 s every 5 s",
            "level": level.of("mean"),
        }

    @torch.inference_mode()
    def embed(self, source: AudioSource) -> dict[str, Tensor]:
        """ "embedding" (windows, 768) and "logits" (windows, 527) of a file."""
        length = 0

        def counted() -> Iterator[Tensor]:
            nonlocal length
            for block in mono_at(source, _SAMPLE_RATE, self.level):
                length += block.shape[1]
                yield block

        device = self.network.mel.window.device
        logits, features = [], []
        for batch in batches(overlapping_windows(counted(), _WINDOW, _HOP, 1), self.batch):
            # A window comes when it is full or nothing follows it, so that `length` is known by then.
            used = _WINDOW if length > _ALONE else max(length, _SHORTEST)
            outputs = self.network(batch[:, 0, :used].to(device))
            logits.append(outputs[0].cpu())
            features.append(outputs[1].cpu())
        return {"embedding": torch.cat(features), "logits": torch.cat(logits)}


def load_passt(path: Path) -> PaSST:
    """Read a `.pt` of PaSST-S with stride 10, or the same tensors as safetensors; the sizes are read off them.

    Raises:
        UserError: the file is damaged or no such network.
    """
    check_installed()
    state = read_weights(path)
    blocks = [int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name))]
    token, head = state.get("cls_token"), state.get("head.1.weight")
    if not blocks or token is None or head is None or token.shape[-1] % _HEAD:
        raise UserError(f"{path}: no PaSST; fetch {PASST_WEIGHTS.address}")
    network = PaSST(width=token.shape[-1], depth=1 + max(blocks), classes=len(head))
    fill_network(network.net, state, path, "PaSST-S with stride 10")
    return network


def check_installed() -> None:
    """Find out whether hear21passt is here.

    Raises:
        Missing: it is not.
    """
    if importlib.util.find_spec("hear21passt") is None:
        raise Missing("hear21passt is not installed; pip install 'stable-audio-lite[evaluate]'")
