"""Cached latents: one safetensors file per item, the channel statistics, and windows cut from them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stable_audio_lite.errors import UserError
from stable_audio_lite.files import replacing

_INDEX = "latents.json"


def encoder_hash(vae_state: Mapping[str, Tensor], slow_channels: int) -> str:
    """Name of a latent space: SHA-256 over the encoder's weights and smoothing, since a decoder may be trained on."""
    digest = hashlib.sha256(f"slow {slow_channels}".encode() if slow_channels else b"")
    for key in sorted(k for k in vae_state if k.startswith("encoder.")):
        value = vae_state[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class LatentCache:
    """A folder of latents that the encoder with hash `encoder` made.

    Raises:
        UserError: the folder holds another VAE's latents.
    """

    def __init__(self, folder: Path, encoder: str):
        self.folder, self.encoder = folder, encoder
        mark = folder / "encoder.sha256"
        if mark.exists() and mark.read_text() != encoder:
            raise UserError(f"{folder}: holds latents of another VAE; choose a new output or remove the folder")
        with replacing(mark) as temporary:
            temporary.write_text(encoder)

    def path(self, index: int) -> Path:
        """File of item `index`."""
        return self.folder / f"{index:08d}.safetensors"


def write_latent(
    cache: LatentCache, index: int, latent: Tensor, captions: Sequence[str], truth: Mapping[str, Any]
) -> None:
    """Store the latent (C, F) of item `index` with its captions and metadata."""
    from safetensors.torch import save_file

    about = {"captions": json.dumps(captions), "truth": json.dumps(truth)}
    with replacing(cache.path(index)) as temporary:
        save_file({"latent": latent.half().contiguous()}, temporary, metadata=about)


def finish_cache(cache: LatentCache, count: int) -> None:
    """Write the index: number of items, and mean and standard deviation per channel over all frames."""
    frames, total, squares = 0, torch.zeros(()), torch.zeros(())
    for index in range(count):
        latent = _load(cache.path(index))[0].double()
        frames += latent.shape[1]
        total = total + latent.sum(1)
        squares = squares + latent.square().sum(1)
    mean = total / frames
    std = (squares / frames - mean.square()).clamp_min(1e-8).sqrt()
    row = {"encoder": cache.encoder, "items": count, "mean": mean.tolist(), "std": std.tolist()}
    with replacing(cache.folder / _INDEX) as temporary:
        temporary.write_text(json.dumps(row))


@dataclass(frozen=True)
class Window:
    """A training example: standardised `latent` (C, window), one of the item's captions, and its timing in seconds."""

    latent: Tensor
    caption: str
    seconds_start: float
    seconds_total: float


class LatentWindows:
    """Windows of `frames` frames from cached latents held in memory, normalised to unit variance per channel.

    Where an item is shorter than the window, the rest is `silence`'s latent: what the VAE gives for digital silence.

    Args:
        folder: what `training.pre_encode` wrote.
        frames: length of a window.
        silence: latent (C, window) of silence, not normalised.
        encoder: hash of the VAE encoder whose decoder generation will use.
        frame_seconds: seconds per latent frame.
        statistics: mean and standard deviation (C,) to normalise by; the cache's own where None.

    Raises:
        UserError: the cache is unfinished or of another VAE.
    """

    def __init__(
        self,
        folder: str | Path,
        frames: int,
        silence: Tensor,
        encoder: str,
        frame_seconds: float,
        statistics: tuple[Tensor, Tensor] | None = None,
    ):
        folder = Path(folder)
        index = _index(folder, encoder)
        self.mean, self.std = statistics or (torch.tensor(index["mean"]), torch.tensor(index["std"]))
        self.frames, self.frame_seconds, self.silence = frames, frame_seconds, self._normal(silence)
        self.entries = [_load(folder / f"{i:08d}.safetensors") for i in range(index["items"])]

    def __len__(self) -> int:
        return len(self.entries)

    def window(self, index: int, rng: random.Random) -> Window:
        """A uniformly placed window of item `index`, with one of its captions."""
        latent, about = self.entries[index]
        start = rng.randint(0, max(latent.shape[1] - self.frames, 0))
        return self.cut(index, start, rng.choice(about["captions"]))

    def cut(self, index: int, start: int, caption: str) -> Window:
        """The window of item `index` that begins with frame `start`."""
        latent, about = self.entries[index]
        piece = self._normal(latent[:, start : start + self.frames].float())
        rest = self.frames - piece.shape[1]
        if rest:
            piece = torch.cat((piece, self.silence[:, -rest:]), 1)
        total = float(about["truth"].get("seconds", latent.shape[1] * self.frame_seconds))
        return Window(piece, caption, start * self.frame_seconds, total)

    def _normal(self, latent: Tensor) -> Tensor:
        return (latent - self.mean[:, None]) / self.std[:, None]


def stack(windows: list[Window]) -> dict[str, Any]:
    """Latents (B, C, T), captions, and timing (B,) of a batch."""
    return {
        "latents": torch.stack([w.latent for w in windows]),
        "captions": [w.caption for w in windows],
        "seconds_start": torch.tensor([w.seconds_start for w in windows]),
        "seconds_total": torch.tensor([w.seconds_total for w in windows]),
    }


def read_latents(folder: str | Path, encoder: str) -> list[Tensor]:
    """The latents (C, F) of a finished folder, in the order of the items.

    Raises:
        UserError: the folder is unfinished or of another VAE.
    """
    folder = Path(folder)
    return [_load(folder / f"{i:08d}.safetensors")[0] for i in range(_index(folder, encoder)["items"])]


def _index(folder: Path, encoder: str) -> dict[str, Any]:
    if not (folder / _INDEX).exists():
        raise UserError(f"{folder}: no finished latents here; run training.pre_encode to its end")
    index = json.loads((folder / _INDEX).read_text())
    if index["encoder"] != encoder:
        raise UserError(f"{folder}: holds latents of another VAE; encode the data again with this one")
    return index


def _load(path: Path) -> tuple[Tensor, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
            entry = file.get_tensor("latent"), {k: json.loads(v) for k, v in about.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged latent; remove the file and run training.pre_encode again") from error
    return entry
