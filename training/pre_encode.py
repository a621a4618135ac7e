"""Encode a data set once: python -m training.pre_encode --config configs/stable_audio/pre_encode.yaml.

Each item becomes one latent of its whole length with its captions and timing; the mean and standard deviation per
latent channel are stored beside them. Rerunning the command goes on where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from stable_audio_lite.audio.io import read_audio
from stable_audio_lite.bundle import load_model_config, load_part, read_part
from stable_audio_lite.data.latents import LatentCache, encoder_hash, finish_cache, write_latent
from stable_audio_lite.data.manifest import Item, read_items
from stable_audio_lite.data.unreadable import Unreadable
from stable_audio_lite.errors import UserError
from stable_audio_lite.models.vae import VAE
from training.command import main


@dataclass(frozen=True, kw_only=True)
class PreEncodeConfig:
    """What to encode.

    Attributes:
        vae: bundle with the VAE.
        data: folder of audio with captions.
        output: folder for the latents.
        max_unreadable: share of the data's files that may be unreadable; they are left out and listed in the output's
            `unreadable.jsonl`.
        dtype: of the VAE's weights and activations; the posterior is float32 either way.
    """

    vae: str
    data: str
    output: str
    max_unreadable: float = 0.01
    dtype: Literal["float32", "bfloat16"] = "float32"


def run(config: PreEncodeConfig) -> Path:
    """Encode what is not encoded yet; returns the cache's folder.

    Raises:
        UserError: the cache was made by another VAE or of other items, an item has no caption, or too many can't be
            read.
    """
    from tqdm import tqdm

    items = read_items(config.data)
    if bare := next((item for item in items if not item.captions), None):
        raise UserError(f"{bare.path}: has no caption; list it in metadata.jsonl with a 'text'")
    accelerator = Accelerator()
    model = load_model_config(config.vae)
    vae = VAE(model.vae)
    load_part(config.vae, "vae", vae)
    vae.prepare_for_inference().to(accelerator.device, getattr(torch, config.dtype))
    cache = LatentCache(Path(config.output), encoder_hash(read_part(config.vae, "vae"), model.vae.slow_channels))
    # Items belong to a process by number, not by what is left: another one may already be writing.
    mine = range(accelerator.process_index, len(items), accelerator.num_processes)
    todo = [i for i in mine if not cache.holds(i, items[i].name)]
    unreadable = Unreadable(len(items), config.max_unreadable, config.output)
    for index in tqdm(todo, unit="item", disable=not accelerator.is_main_process):
        item = items[index]
        try:
            latent = encode_item(vae, item, model.sample_rate)
        except UserError as error:
            unreadable.add(item.path, error)
        else:
            write_latent(cache, index, latent, item.name, item.captions, item.truth)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish_cache(cache, len(items))
    return cache.folder


@torch.inference_mode()
def encode_item(vae: VAE, item: Item, sample_rate: int) -> Tensor:
    """Posterior mean (latent_channels, F) float32 of an item's whole audio on the CPU."""
    audio = read_audio(item.path, sample_rate)
    return vae.encode_chunked(audio[None].to(next(vae.parameters()).device)).mean[0].float().cpu()


if __name__ == "__main__":
    main(__doc__, PreEncodeConfig, run)
