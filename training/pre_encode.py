"""Encode a data set once: python -m training.pre_encode --config configs/stable_audio/pre_encode.yaml.

Each item becomes one latent of its whole length, with its captions and timing, in WebDataset shards; the mean and
standard deviation per latent channel are stored beside them. Rerunning the command adds the missing shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import Accelerator

from stable_audio_lite.audio.io import audio_hash, read_audio
from stable_audio_lite.data.latents import CachedLatent, LatentCache, LatentMetadata
from stable_audio_lite.data.manifest import Item, read_items
from stable_audio_lite.data.unreadable import Unreadable
from stable_audio_lite.errors import UserError
from stable_audio_lite.models.vae import VAE
from stable_audio_lite.representation import load_latents
from stable_audio_lite.systems import load_model_config
from training.command import main

if TYPE_CHECKING:
    from tqdm import tqdm


@dataclass(frozen=True, kw_only=True)
class PreEncodeConfig:
    """Settings of an encoding run.

    Attributes:
        vae: bundle with the VAE.
        data: folder of audio with captions.
        output: folder for the latents.
        max_unreadable: share of the data's files that may be unreadable; they are left out and listed in the output's
            `unreadable.jsonl`.
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


def run(config: PreEncodeConfig) -> Path:
    """Encode the items that are not encoded yet; returns the cache's folder.

    Raises:
        UserError: the cache was made by another VAE or from other items, an item has no caption, or too many can't be
            read.
    """
    from tqdm import tqdm

    items = read_items(config.data)
    if bare := next((item for item in items if not item.captions), None):
        raise UserError(f"{bare.path}: has no caption; list it in metadata.jsonl with a 'text'")
    accelerator = Accelerator()
    latents = load_latents(config.vae, load_model_config(config.vae))
    vae = latents.to(accelerator.device, getattr(torch, config.dtype)).vae
    cache = LatentCache(Path(config.output), latents.hash, len(items), config.shard_items)
    # Each process takes shards by number, not from those missing: another process may already be writing some.
    mine = range(accelerator.process_index, len(cache.shards), accelerator.num_processes)
    names = [item.name for item in items]
    todo = [shard for shard in mine if not cache.holds(shard, names)]
    unreadable = Unreadable(len(items), config.max_unreadable, config.output)
    count = sum(len(cache.shards[shard]) for shard in todo)
    with tqdm(total=count, unit="item", disable=not accelerator.is_main_process) as bar:
        for shard in todo:
            cache.write(shard, _encoded(cache.shards[shard], items, vae, latents.sample_rate, unreadable, bar))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        cache.finish()
    return cache.folder


def _encoded(
    numbers: range, items: Sequence[Item], vae: VAE, sample_rate: int, unreadable: Unreadable, bar: tqdm[Any]
) -> Iterator[CachedLatent]:
    """Encode the items that can be read."""
    for number in numbers:
        item = items[number]
        try:
            yield encode_item(vae, number, item, sample_rate)
        except UserError as error:
            unreadable.add(item.path, error)
        bar.update()


@torch.inference_mode()
def encode_item(vae: VAE, number: int, item: Item, sample_rate: int) -> CachedLatent:
    """Encode an item's whole audio: the posterior mean (latent_channels, F), float32 on the CPU, and facts about it.

    Raises:
        UserError: the audio can't be read.
    """
    audio = read_audio(item.path, sample_rate)
    latent = vae.encode_chunked(audio[None].to(next(vae.parameters()).device)).mean[0].float().cpu()
    about = LatentMetadata(
        name=item.name,
        captions=item.captions,
        metadata=item.metadata,
        seconds_start=0.0,
        seconds=audio.shape[1] / sample_rate,
        audio=audio_hash(item.path),
    )
    return CachedLatent(number, latent, about)


if __name__ == "__main__":
    main(__doc__, PreEncodeConfig, run)
