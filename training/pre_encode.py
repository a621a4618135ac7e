"""Encode a data set once: python -m training.pre_encode --config configs/stable_audio/pre_encode.yaml.

Each item becomes one latent of its whole length, with its captions and timing, in WebDataset shards; the mean and
standard deviation per latent channel are stored beside them. A piece begins and ends where it sounds: the silence
around it is left out, long silence within it is noted, and what is silent altogether counts as unreadable. Rerunning
the command adds what is missing, and renews what belongs to audio or captions that have changed.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import Tensor

from stable_audio_lite.audio.io import audio_hash, read_audio
from stable_audio_lite.data.latents import CachedLatent, LatentCache, LatentMetadata, check_folder
from stable_audio_lite.data.manifest import Item, read_items
from stable_audio_lite.data.unreadable import Unreadable, content_hash
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import locked
from stable_audio_lite.models.vae import VAE
from stable_audio_lite.representation import load_latents
from stable_audio_lite.systems import load_model_config
from training.command import main, shared_processes
from training.frozen import check_stage

if TYPE_CHECKING:
    from tqdm import tqdm

_AUDIBLE, _LOWEST = 10 ** (-60 / 20), 10 ** (-80 / 20)  # of the highest level, and of full scale
_REST = 2.0  # seconds of silence that are no rest any more


@dataclass(frozen=True, kw_only=True)
class PreEncodeConfig:
    """Settings of an encoding run.

    Attributes:
        vae: bundle with the VAE.
        data: folder of audio with captions.
        output: folder for the latents.
        max_unreadable: share of the data's files that may be unreadable or silent; they are left out and listed in the
            output's `unreadable.jsonl`.
        shard_items: number of items in a shard.
        dtype: of the VAE's weights and activations; the posterior is float32 either way.
    """

    vae: str
    data: str
    output: str
    max_unreadable: float = 0.01
    shard_items: int = 256
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.shard_items < 1:
            raise ValueError(f"shard_items must be at least 1, got {self.shard_items}")
        if not 0 <= self.max_unreadable <= 1:
            raise ValueError(f"max_unreadable must lie in 0..1, got {self.max_unreadable}")


def run(config: PreEncodeConfig) -> Path:
    """Encode the items that are not encoded yet; returns the cache's folder.

    Raises:
        UserError: the cache was made by another VAE or from other items, an item has no caption, or too many can't be
            read.
    """
    from tqdm import tqdm

    check_stage("vae", config.vae, "training.train_vae")
    items = read_items(config.data)
    check_captioned(items, config.data)
    processes = shared_processes()
    latents = load_latents(config.vae, load_model_config(config.vae))
    vae = latents.to(processes.device, getattr(torch, config.dtype)).vae
    check_folder(Path(config.output))
    main_process, count = processes.is_main_process, processes.num_processes
    with locked(config.output) if main_process else nullcontext():
        processes.wait_for_everyone()  # for the lock
        cache = LatentCache(Path(config.output), latents.hash, len(items), config.shard_items, config.dtype)
        # Each process takes shards by number, not from those missing: another process may already be writing some.
        mine = range(processes.process_index, len(cache.shards), count)
        unreadable = Unreadable(len(items), config.max_unreadable, config.output)
        total = sum(len(cache.shards[shard]) for shard in mine)
        with tqdm(total=total, unit="item", disable=not main_process) as bar:
            encoder = _Encoder(vae, items, latents.sample_rate, unreadable, bar)
            for shard in mine:
                encoder.renew(cache, shard)
        figures = torch.tensor([encoder.kept, encoder.captioned, encoder.encoded], device=processes.device)
        kept, captioned, encoded = reduce(figures, "sum").tolist()
        if main_process:
            cache.finish()
            print(
                f"{count} process{'es' if count > 1 else ''} on {processes.device.type}, {config.dtype}, "
                f"{config.output}: {encoded} encoded, {kept} kept, {captioned} kept with new captions or metadata, "
                f"{len(items) - kept - captioned - encoded} left out as unreadable or silent",
                file=sys.stderr,
            )
    return cache.folder


def check_captioned(items: Sequence[Item], data: str) -> None:
    """Refuse items without captions.

    Raises:
        UserError: says how many there are, and what to do.
    """
    if bare := [item for item in items if not item.captions]:
        raise UserError(
            f"{bare[0].path}: has no caption ({len(bare)} of {len(items)} files of {data} have none); put one in a "
            ".txt beside it, or in metadata.jsonl, or let 'stable-audio-lite caption' write it from tags and names"
        )


class _Encoder:
    """Makes shards what the data set is now, and counts what that took."""

    def __init__(self, vae: VAE, items: Sequence[Item], sample_rate: int, unreadable: Unreadable, bar: tqdm[Any]):
        self.vae, self.items, self.sample_rate = vae, items, sample_rate
        self.names = [item.name for item in items]
        self.unreadable, self.bar = unreadable, bar
        self.kept = self.captioned = self.encoded = 0

    def renew(self, cache: LatentCache, shard: int) -> None:
        """Write a shard unless all that it holds, or could hold, is there already."""
        held = cache.held(shard, self.names)
        hashes = {n: content_hash(self.items[n].path) for n in held or ()}
        current = {n: _described(e, self.items[n]) for n, e in (held or {}).items() if e.about.audio == hashes[n]}
        same = sum(entry is (held or {})[n] for n, entry in current.items())
        self.kept, self.captioned = self.kept + same, self.captioned + len(current) - same
        self.bar.update(len(current))
        missing = (n for n in cache.shards[shard] if n not in current)
        if held is None or same < len(held):
            # In the order of the items, each encoded when its turn comes.
            new = (current.get(n) or self._encode(n) for n in cache.shards[shard])
            cache.write(shard, (entry for entry in new if entry))
        elif found := {n: entry for n in missing if (entry := self._encode(n))}:  # which could not be read before
            cache.write(shard, (entry for _, entry in sorted((current | found).items())))

    def _encode(self, number: int) -> CachedLatent | None:
        """Encode an item, or note that it can't be read."""
        self.bar.update()
        try:
            entry = encode_item(self.vae, number, self.items[number], self.sample_rate)
        except UserError as error:
            self.unreadable.add(self.items[number].path, error)
            return None
        self.encoded += 1
        return entry


def _described(entry: CachedLatent, item: Item) -> CachedLatent:
    """Give a latent the captions and metadata that its item has now; without a change it is the same object."""
    metadata = json.loads(json.dumps(item.metadata))
    if (entry.about.captions, entry.about.metadata) == (item.captions, metadata):
        return entry
    return replace(entry, about=replace(entry.about, captions=item.captions, metadata=metadata))


@torch.inference_mode()
def encode_item(vae: VAE, number: int, item: Item, sample_rate: int) -> CachedLatent:
    """Encode an item, from where it begins to sound to where it ends.

    The latent is the posterior mean (latent_channels, F), float32 on the CPU.

    Raises:
        UserError: the audio can't be read, or is silent.
    """
    audio = read_audio(item.path, sample_rate)
    sounding = sounding_frames(audio, vae.hop)
    if not len(places := sounding.nonzero()):
        raise UserError(f"{item.path}: is silent throughout; leave it out")
    first, last = int(places[0]), int(places[-1]) + 1
    audio = audio[:, first * vae.hop : last * vae.hop]
    latent = vae.encode_chunked(audio[None].to(next(vae.parameters()).device)).mean[0].float().cpu()
    about = LatentMetadata(
        name=item.name,
        captions=item.captions,
        metadata=item.metadata,
        seconds_start=0.0,
        seconds=audio.shape[1] / sample_rate,
        audio=audio_hash(item.path),
        silences=silent_stretches(sounding[first:last], math.ceil(_REST * sample_rate / vae.hop)),
    )
    return CachedLatent(number, latent, about)


def sounding_frames(audio: Tensor, hop: int) -> Tensor:
    """Find which frames (F,) of (C, T) audio reach 60 dB below its highest level and -80 dB of full scale."""
    levels = F.pad(audio.abs().amax(0), (0, -audio.shape[1] % hop)).unflatten(0, (-1, hop)).amax(1)
    return levels >= max(_AUDIBLE * float(levels.max()), _LOWEST)


def silent_stretches(sounding: Tensor, least: int) -> tuple[tuple[int, int], ...]:
    """First frame and last, plus one, of each stretch of at least `least` frames that don't sound."""
    edges = F.pad((~sounding).int(), (1, 1)).diff().nonzero()[:, 0].tolist()
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return tuple((begin, end) for begin, end in pairs if end - begin >= least)


if __name__ == "__main__":
    main(__doc__, PreEncodeConfig, run)
