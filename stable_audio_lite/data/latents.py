"""Cached latents: WebDataset shards of a data set's items, and an index with the statistics of their channels.

A shard `000000.tar` holds for each item `NUMBER.npy`, its latent (C, F) in float16, and `NUMBER.json`: the file's name
and SHA-256, captions, metadata, the second of the piece at which the latent begins, how many it covers, and silences.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stable_audio_lite.config import differences
from stable_audio_lite.data.item import is_hidden
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import replacing

_INDEX, _MARK = "latents.json", "cache.json"


@dataclass(frozen=True, kw_only=True)
class LatentMetadata:
    """Facts about a cached item.

    Attributes:
        name: of its file.
        captions: texts that describe it.
        metadata: its row of the data set.
        seconds_start: second of the piece at which the latent begins.
        seconds: length of the sound that the latent covers; its last frame may cover more.
        audio: SHA-256 of the file, "" if unknown.
        silences: first frame and last frame, plus one, of each stretch of silence that is long for music.
    """

    name: str
    captions: tuple[str, ...]
    metadata: Mapping[str, Any]
    seconds_start: float
    seconds: float
    audio: str = ""
    silences: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class CachedLatent:
    """Item `number` of a data set: its latent (C, F) and the facts about it."""

    number: int
    latent: Tensor
    about: LatentMetadata


class LatentCache:
    """A folder of shards with the latents of `items` items, made by the encoder with hash `encoder`.

    Args:
        folder: of the shards; created if it doesn't exist.
        encoder: hash of the VAE's encoder.
        items: number of items in the data set.
        shard_items: number of items in each shard but the last.
        dtype: in which they are encoded.

    Raises:
        UserError: the folder holds other files, or latents of another VAE, number of items or type, or in shards of
            another size.
    """

    def __init__(self, folder: Path, encoder: str, items: int, shard_items: int = 256, dtype: str = "float32"):
        self.folder, self.encoder, self.items, self.shard_items = folder, encoder, items, shard_items
        mark = folder / _MARK
        own = {"encoder": encoder, "items": items, "shard_items": shard_items, "dtype": dtype}
        if mark.exists() and (found := differences(_mapping(mark), own)):
            other = "of another VAE" if found[0].startswith("encoder") else "made otherwise"
            raise UserError(
                f"{folder}: holds latents {other} ({'; '.join(found)}); choose a new output or remove the folder"
            )
        check_folder(folder)
        with replacing(mark) as temporary:
            temporary.write_text(json.dumps(own))

    @property
    def shards(self) -> list[range]:
        """Item numbers of each shard."""
        return [range(i, min(i + self.shard_items, self.items)) for i in range(0, self.items, self.shard_items)]

    def path(self, shard: int) -> Path:
        """Path of a shard."""
        return self.folder / f"{shard:06d}.tar"

    def held(self, shard: int, names: Sequence[str]) -> dict[int, CachedLatent] | None:
        """Read a shard's latents by item number; None where there is no shard. The data set's files are `names`.

        Raises:
            UserError: it holds the latents of other files.
        """
        if not self.path(shard).exists():
            return None
        entries = read_shard(self.path(shard))
        for entry in entries:
            if entry.about.name != names[entry.number]:
                raise UserError(
                    f"{self.path(shard)}: item {entry.number} is the latent of {entry.about.name}, not of "
                    f"{names[entry.number]}; choose a new output"
                )
        return {entry.number: entry for entry in entries}

    def write(self, shard: int, entries: Iterable[CachedLatent]) -> None:
        """Write a shard, whole or not at all; `entries` are taken one by one. The folder is unfinished then."""
        (self.folder / _INDEX).unlink(missing_ok=True)
        with replacing(self.path(shard)) as temporary, tarfile.open(temporary, "w") as tar:
            for entry in entries:
                array = io.BytesIO()
                np.save(array, entry.latent.half().cpu().numpy(), allow_pickle=False)
                _add(tar, f"{entry.number:08d}.npy", array.getvalue())
                _add(tar, f"{entry.number:08d}.json", json.dumps(_to_row(entry.about)).encode())

    def finish(self) -> None:
        """Write the index: which items have latents, and mean and deviation per channel over all frames.

        Raises:
            UserError: no item has a latent, or a shard is missing.
        """
        frames, total, squares = 0, torch.zeros(()), torch.zeros(())
        present = []
        for shard in range(len(self.shards)):
            for entry in read_shard(self.path(shard)):
                latent = entry.latent.double()
                present.append(entry.number)
                frames += latent.shape[1]
                total = total + latent.sum(1)
                squares = squares + latent.square().sum(1)
        if not present:
            raise UserError(f"{self.folder}: none of the {self.items} items could be encoded")
        mean = total / frames
        std = (squares / frames - mean.square()).clamp_min(1e-8).sqrt()
        missing = sorted(set(range(self.items)) - set(present))
        row = {"encoder": self.encoder, "items": self.items, "missing": missing, "frames": frames}
        row |= {"shards": len(self.shards), "mean": mean.tolist(), "std": std.tolist()}
        with replacing(self.folder / _INDEX) as temporary:
            temporary.write_text(json.dumps(row))


def check_folder(folder: Path) -> None:
    """Refuse a folder of other files: shards of sound may have the names of those of latents.

    Raises:
        UserError: it holds files, and no latents.
    """
    if folder.is_dir() and not (folder / _MARK).exists():
        if any(not is_hidden(PurePath(file.name)) for file in folder.iterdir()):
            raise UserError(f"{folder}: holds other files, no latents; choose a new output")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    header = tarfile.TarInfo(name)  # dated 1970 and without an owner, so that the same latents make the same bytes
    header.size = len(data)
    tar.addfile(header, io.BytesIO(data))


def read_shard(path: Path) -> list[CachedLatent]:
    """Read all latents of a shard.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        return [
            CachedLatent(
                int(name.removesuffix(".npy")),
                _array(data),
                _from_row(json.loads(files[name.replace(".npy", ".json")])),
            )
            for name, data in files.items()
            if name.endswith(".npy")
        ]
    except (
        *(tarfile.TarError, OSError, EOFError, MemoryError, ValueError),
        *(LookupError, TypeError, AttributeError, RecursionError),
    ) as error:
        raise UserError(f"{path}: missing or damaged shard; remove it and run training.pre_encode again") from error


def _array(data: bytes) -> Tensor:
    latent = torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False))
    if latent.ndim != 2 or latent.dtype != torch.float16:
        raise ValueError(f"no latent: {latent.dtype} {tuple(latent.shape)}")
    return latent


def _to_row(about: LatentMetadata) -> dict[str, Any]:
    """Plain JSON of an item's facts; `metadata` is stored under the key "truth"."""
    return {"truth" if key == "metadata" else key: value for key, value in asdict(about).items()}


def _from_row(row: dict[str, Any]) -> LatentMetadata:
    facts = {"metadata" if key == "truth" else key: value for key, value in row.items()}
    silences = tuple((int(begin), int(end)) for begin, end in row.get("silences", ()))
    return LatentMetadata(**facts | {"captions": tuple(row["captions"]), "silences": silences})


@dataclass(frozen=True, kw_only=True)
class CacheIndex:
    """The index of a finished folder.

    Attributes:
        items: number of items in the data set, those without latents included.
        shards, frames: total numbers.
        mean, std: of each channel over all frames.
    """

    items: int
    shards: int
    frames: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def is_finished(folder: str | Path) -> bool:
    """Check whether all that a folder's latents are made of has been encoded."""
    return (Path(folder) / _INDEX).is_file()


def read_index(folder: str | Path, encoder: str) -> CacheIndex:
    """Read the index of a finished folder.

    Raises:
        UserError: the folder is unfinished, its VAE is not the one with the hash `encoder`, or the index is damaged.
    """
    path = Path(folder) / _INDEX
    if not path.exists():
        raise UserError(f"{folder}: no finished latents here; run training.pre_encode to its end")
    row = _mapping(path)
    if row.get("encoder") != encoder:
        raise UserError(f"{folder}: holds latents of another VAE; encode the data again with this one")
    if "shards" not in row:
        raise UserError(f"{folder}: latents of an earlier version; encode the data again into a new folder")
    try:
        sizes = {name: int(row[name]) for name in ("items", "shards", "frames")}
        mean, std = (tuple(map(float, row[name])) for name in ("mean", "std"))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _damaged(path) from error
    return CacheIndex(mean=mean, std=std, **sizes)


def _mapping(path: Path) -> dict[str, Any]:
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path) from error
    if not isinstance(row, dict):
        raise _damaged(path)
    return row


def _damaged(path: Path) -> UserError:
    return UserError(f"{path}: damaged; remove it and run training.pre_encode again")


def read_cache(folder: str | Path, encoder: str) -> tuple[CacheIndex, list[CachedLatent]]:
    """Read everything in a finished folder.

    Raises:
        UserError: the folder is unfinished, of another VAE, or damaged.
    """
    index = read_index(folder, encoder)
    entries = [e for shard in range(index.shards) for e in read_shard(Path(folder) / f"{shard:06d}.tar")]
    if sum(entry.latent.shape[1] for entry in entries) != index.frames:
        raise UserError(f"{folder}: its shards don't hold what {_INDEX} says; run training.pre_encode again")
    return index, entries
