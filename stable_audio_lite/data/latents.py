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
from stable_audio_lite.files import replacing, save_tensors

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
        return _path(self.folder, index)

    def holds(self, index: int, name: str) -> bool:
        """Whether the latent of item `index`, the file `name`, is there.

        Raises:
            UserError: another file's is.
        """
        if not self.path(index).exists():
            return False
        if (other := _load(self.path(index))[1].get("name") or name) != name:
            raise UserError(f"{self.path(index)}: is the latent of {other}, not of {name}; choose a new output")
        return True


def write_latent(
    cache: LatentCache, index: int, latent: Tensor, name: str, captions: Sequence[str], truth: Mapping[str, Any]
) -> None:
    """Store the latent (C, F) of item `index`, the file `name`, with its captions and metadata."""
    about = {"name": json.dumps(name), "captions": json.dumps(captions), "truth": json.dumps(truth)}
    with replacing(cache.path(index)) as temporary:
        save_tensors(temporary, {"latent": latent.half()}, about)


def finish_cache(cache: LatentCache, count: int) -> None:
    """Write the index: which of `count` items have latents, and mean and deviation per channel over all frames.

    Raises:
        UserError: none has.
    """
    frames, total, squares = 0, torch.zeros(()), torch.zeros(())
    present = [index for index in range(count) if cache.path(index).exists()]
    if not present:
        raise UserError(f"{cache.folder}: none of the {count} items could be encoded")
    for index in present:
        latent = _load(cache.path(index))[0].double()
        frames += latent.shape[1]
        total = total + latent.sum(1)
        squares = squares + latent.square().sum(1)
    mean = total / frames
    std = (squares / frames - mean.square()).clamp_min(1e-8).sqrt()
    missing = sorted(set(range(count)) - set(present))
    row = {"encoder": cache.encoder, "items": count, "missing": missing, "mean": mean.tolist(), "std": std.tolist()}
    with replacing(cache.folder / _INDEX) as temporary:
        temporary.write_text(json.dumps(row))


@dataclass(frozen=True)
class Window:
    """A training example: standardised `latent` (C, window), one of the item's captions, and its timing in seconds.

    The first `frames` frames are the item's, the rest is silence.
    """

    latent: Tensor
    frames: int
    caption: str
    seconds_start: float
    seconds_total: float


class LatentWindows:
    """Windows of `frames` frames from cached latents held in memory, normalised to unit variance per channel.

    Where an item is shorter than the window, the rest is `silence`'s latent: what the VAE gives for digital silence.
    `numbers` has each entry's place in its data set.

    Args:
        folders: what runs of `training.pre_encode` wrote; their items follow one another.
        frames: length of a window.
        silence: latent (C, window) of silence, not normalised.
        encoder: hash of the VAE encoder whose decoder generation will use.
        frame_seconds: seconds per latent frame.
        statistics: mean and standard deviation (C,) to normalise by; those of all frames where None.

    Raises:
        UserError: a folder is unfinished or of another VAE.
    """

    def __init__(
        self,
        folders: Sequence[str | Path],
        frames: int,
        silence: Tensor,
        encoder: str,
        frame_seconds: float,
        statistics: tuple[Tensor, Tensor] | None = None,
    ):
        indices = {Path(folder): _index(Path(folder), encoder) for folder in folders}
        self.items = sum(index["items"] for index in indices.values())
        self.numbers = [number for index in indices.values() for number in _numbers(index)]
        groups = [[_load(_path(f, i)) for i in _numbers(index)] for f, index in indices.items()]
        lengths = [sum(latent.shape[1] for latent, _ in group) for group in groups]
        self.mean, self.std = statistics or _pooled(list(indices.values()), lengths)
        self.frames, self.frame_seconds, self.silence = frames, frame_seconds, self._normal(silence)
        self.entries = [entry for group in groups for entry in group]

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
        frames = piece.shape[1]
        if rest := self.frames - frames:
            piece = torch.cat((piece, self.silence[:, -rest:]), 1)
        total = float(about["truth"].get("seconds", latent.shape[1] * self.frame_seconds))
        return Window(piece, frames, caption, start * self.frame_seconds, total)

    def _normal(self, latent: Tensor) -> Tensor:
        return (latent - self.mean[:, None]) / self.std[:, None]


def stack(windows: list[Window]) -> dict[str, Any]:
    """Latents (B, C, T), the frames that are no padding (B,), captions, and timing (B,) of a batch."""
    return {
        "latents": torch.stack([w.latent for w in windows]),
        "frames": torch.tensor([w.frames for w in windows]),
        "captions": [w.caption for w in windows],
        "seconds_start": torch.tensor([w.seconds_start for w in windows]),
        "seconds_total": torch.tensor([w.seconds_total for w in windows]),
    }


def read_latents(folder: str | Path, encoder: str, names: Sequence[str]) -> dict[int, Tensor]:
    """The latents (C, F) of a finished folder by the number of the item, of which `names` are the files' names.

    Raises:
        UserError: the folder is unfinished, of another VAE or of other items.
    """
    index = _index(Path(folder), encoder)
    if index["items"] != len(names):
        raise UserError(f"{folder}: holds latents of {index['items']} items, the data has {len(names)}")
    found = {number: _load(_path(Path(folder), number)) for number in _numbers(index)}
    for number, (_, about) in found.items():
        if (other := about.get("name") or names[number]) != names[number]:
            raise UserError(f"{folder}: item {number} is {other} there, and {names[number]} in the data; encode again")
    return {number: latent for number, (latent, _) in found.items()}


def _path(folder: Path, index: int) -> Path:
    return folder / f"{index:08d}.safetensors"


def _numbers(index: dict[str, Any]) -> list[int]:
    """Of the items that have latents."""
    missing = set(index.get("missing", ()))
    return [number for number in range(index["items"]) if number not in missing]


def _index(folder: Path, encoder: str) -> dict[str, Any]:
    if not (folder / _INDEX).exists():
        raise UserError(f"{folder}: no finished latents here; run training.pre_encode to its end")
    index = json.loads((folder / _INDEX).read_text())
    if index["encoder"] != encoder:
        raise UserError(f"{folder}: holds latents of another VAE; encode the data again with this one")
    return index


def _pooled(indices: list[dict[str, Any]], frames: list[int]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) over the frames of several caches."""
    share = torch.tensor(frames, dtype=torch.float64)[:, None] / sum(frames)
    means = torch.tensor([index["mean"] for index in indices], dtype=torch.float64)
    squares = torch.tensor([index["std"] for index in indices], dtype=torch.float64).square() + means.square()
    mean = (share * means).sum(0)
    return mean.float(), ((share * squares).sum(0) - mean.square()).sqrt().float()


def _load(path: Path) -> tuple[Tensor, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
            entry = file.get_tensor("latent"), {k: json.loads(v) for k, v in about.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged latent; remove the file and run training.pre_encode again") from error
    return entry
