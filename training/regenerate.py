"""Latents as the U-Net makes them: python -m training.regenerate --config configs/stable_audio/regenerate.yaml.

Each cached latent is noised to a random level and denoised by the U-Net under its own caption and timing (Meng et al.
2022, arXiv 2108.01073), which keeps what plays when and replaces what the level has drowned by the U-Net's idea. A
decoder trained to make the recording of such a latent (`latents` of training.train_vae) learns to sound right on what
it is given in generation, as vocoders are tuned on the mel spectrograms that their acoustic model predicts (Shen et al.
2018, arXiv 1712.05884, section 3.3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from stable_audio_lite.bundle import read_part
from stable_audio_lite.data.latents import CachedLatent, LatentCache, encoder_hash
from stable_audio_lite.data.windows import LatentWindows
from stable_audio_lite.diffusion.denoiser import Guidance
from stable_audio_lite.diffusion.samplers import SAMPLERS, ItemNoise
from stable_audio_lite.diffusion.schedule import polyexponential_sigmas
from stable_audio_lite.errors import UserError
from stable_audio_lite.pipeline import StableAudio
from training.command import main
from training.noise import generator
from training.train_diffusion import silence_latent


@dataclass(frozen=True, kw_only=True)
class RegenerateConfig:
    """What to regenerate.

    Attributes:
        bundle: a complete bundle; its VAE made the latents.
        latents: folder written by training.pre_encode.
        output: folder for the new latents: the first window of each item.
        lowest: smallest noise level, relative to latents of unit standard deviation.
        highest: largest; levels are drawn log-uniformly in between, one for each batch.
        steps: sampling steps.
        cfg: guidance scale.
        batch_size: items denoised at once.
    """

    bundle: str
    latents: str
    output: str
    lowest: float = 0.5
    highest: float = 4.0
    steps: int = 8
    cfg: float = 1.0
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.lowest <= self.highest:
            raise ValueError(f"expected 0 < lowest <= highest, got {self.lowest} and {self.highest}")
        if min(self.steps, self.batch_size) < 1:
            raise ValueError("steps and batch_size must be at least 1")


def run(config: RegenerateConfig) -> Path:
    """Regenerate what is not there yet; returns the cache's folder.

    Raises:
        UserError: the latents are another VAE's, or the output holds other latents.
    """
    from tqdm import tqdm

    accelerator = Accelerator()
    model = StableAudio.from_pretrained(config.bundle, device=str(accelerator.device))
    if config.lowest <= (least := model.config.generation.sigma_min):
        raise UserError(f"lowest: {config.lowest} should lie above the level at which {config.bundle} ends, {least}")
    encoder = encoder_hash(read_part(config.bundle, "vae"), model.config.vae.slow_channels)
    windows = LatentWindows(
        (config.latents,),
        model.config.latent_frames,
        silence_latent(config.bundle),
        encoder,
        model.config.hop / model.config.sample_rate,
        (model.latent_mean[:, 0].cpu(), model.latent_std[:, 0].cpu()),
    )
    cache = LatentCache(Path(config.output), encoder, windows.items)
    names = dict.fromkeys(range(windows.items), "") | {e.number: e.about.name for e in windows.entries}
    places = {entry.number: place for place, entry in enumerate(windows.entries)}
    for shard in range(accelerator.process_index, len(cache.shards), accelerator.num_processes):
        if not cache.holds(shard, list(names.values())):
            own = [places[number] for number in cache.shards[shard] if number in places]
            parts = [own[i : i + config.batch_size] for i in range(0, len(own), config.batch_size)]
            bar = tqdm(parts, unit="batch", desc=f"shard {shard}", disable=not accelerator.is_main_process)
            cache.write(shard, (entry for part in bar for entry in denoise_again(model, windows, part, config)))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        cache.finish()
    return cache.folder


@torch.inference_mode()
def denoise_again(
    model: StableAudio, windows: LatentWindows, places: list[int], config: RegenerateConfig
) -> list[CachedLatent]:
    """New latents (C, F) in the VAE's scale, on the CPU, of the windows that entries begin with."""
    entries = [windows.entries[place] for place in places]
    drawn = [windows.cut(p, 0, e.about.captions[0]) for p, e in zip(places, entries, strict=True)]
    x0 = torch.stack([w.latent for w in drawn]).to(model.device)
    place = torch.rand((), generator=generator(config.seed, places[0]))
    level = config.lowest * (config.highest / config.lowest) ** float(place)
    noise = ItemNoise([config.seed * 1_000_003 + place for place in places], x0.shape[1:], model.device)
    starts = torch.tensor([w.seconds_start for w in drawn], device=model.device)
    totals = torch.tensor([w.seconds_total for w in drawn], device=model.device)
    condition = model.conditioner(model.text_encoder.encode([w.caption for w in drawn]), starts, totals)
    sigmas = polyexponential_sigmas(config.steps, model.config.generation.sigma_min, level, 1.0)
    denoiser = Guidance(model.unet, condition, scale=config.cfg)
    latents = SAMPLERS["dpmpp-2m"](denoiser, x0 + level * noise(), sigmas, noise=noise)
    latents = (latents * model.latent_std + model.latent_mean).float().cpu()
    return [CachedLatent(e.number, latent, e.about) for e, latent in zip(entries, latents, strict=True)]


if __name__ == "__main__":
    main(__doc__, RegenerateConfig, run)
