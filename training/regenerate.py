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
from torch import Tensor

from stable_audio_lite.bundle import read_part
from stable_audio_lite.data.latents import LatentCache, LatentWindows, Window, encoder_hash, finish_cache, write_latent
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
    cache = LatentCache(Path(config.output), encoder)
    batches = [range(i, min(i + config.batch_size, len(windows))) for i in range(0, len(windows), config.batch_size)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    names = [about.get("name", "") for _, about in windows.entries]
    todo = [entries for entries in mine if not all(cache.holds(windows.numbers[i], names[i]) for i in entries)]
    for entries in tqdm(todo, unit="batch", disable=not accelerator.is_main_process):
        drawn = [windows.cut(i, 0, windows.entries[i][1]["captions"][0]) for i in entries]
        for index, latent in zip(entries, denoise_again(model, drawn, entries, config), strict=True):
            about = windows.entries[index][1]
            write_latent(cache, windows.numbers[index], latent, names[index], about["captions"], about["truth"])
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish_cache(cache, windows.items)
    return cache.folder


@torch.inference_mode()
def denoise_again(model: StableAudio, drawn: list[Window], numbers: range, config: RegenerateConfig) -> Tensor:
    """Latents (B, C, F) in the VAE's scale, on the CPU; the draws are the numbers' own."""
    x0 = torch.stack([w.latent for w in drawn]).to(model.device)
    place = torch.rand((), generator=generator(config.seed, numbers[0]))
    level = config.lowest * (config.highest / config.lowest) ** float(place)
    noise = ItemNoise([config.seed * 1_000_003 + n for n in numbers], x0.shape[1:], model.device)
    starts = torch.tensor([w.seconds_start for w in drawn], device=model.device)
    totals = torch.tensor([w.seconds_total for w in drawn], device=model.device)
    condition = model.conditioner(model.text_encoder.encode([w.caption for w in drawn]), starts, totals)
    sigmas = polyexponential_sigmas(config.steps, model.config.generation.sigma_min, level, 1.0)
    denoiser = Guidance(model.unet, condition, scale=config.cfg)
    latents = SAMPLERS["dpmpp-2m"](denoiser, x0 + level * noise(), sigmas, noise=noise)
    return (latents * model.latent_std + model.latent_mean).float().cpu()


if __name__ == "__main__":
    main(__doc__, RegenerateConfig, run)
