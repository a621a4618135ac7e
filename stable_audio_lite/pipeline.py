"""Text to stereo sound: encode the prompts, sample latents, decode them.

    model = StableAudio.from_pretrained("starter")
    result = model.generate(["warm slow piano", "fast techno"], seconds=8, seed=1)
    result.audio  # (2, 2, 8 * 44100) float32: item, channel, sample; full scale is 1

Same prompt, settings, seed and model give the same sound, alone or in a batch (to rounding), on one machine and dtype.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stable_audio_lite import bundle
from stable_audio_lite.clap.text_encoder import TextEncoder
from stable_audio_lite.data.latents import encoder_hash
from stable_audio_lite.devices import choose_device, choose_dtype
from stable_audio_lite.errors import UserError
from stable_audio_lite.generation import Generated, Pipeline, load_part, load_text_parts
from stable_audio_lite.lora import merge_lora
from stable_audio_lite.models.conditioner import Conditioner
from stable_audio_lite.models.unet import UNet
from stable_audio_lite.models.vae import VAE
from stable_audio_lite.spectral import SpectralAudio
from stable_audio_lite.systems import StableAudioConfig, build_unet, build_vae, load_model_config, load_system

__all__ = ["Generated", "StableAudio", "load_pipeline"]

# Latent frames decoded beyond the wanted end, more than the decoder's reach, so that trimming changes no sample.
_DECODE_MARGIN = 16


class StableAudio(Pipeline):
    """A loaded bundle of the latent system, ready to generate; build it with `from_pretrained`."""

    config: StableAudioConfig
    text_encoder: TextEncoder
    conditioner: Conditioner

    def __init__(
        self,
        folder: Path,
        config: StableAudioConfig,
        *,
        vae: VAE,
        text_encoder: TextEncoder,
        conditioner: Conditioner,
        unet: UNet,
        lora: dict[str, Any] | None = None,
    ):
        """Take loaded parts of the bundle `folder`; `lora` says what was merged into the U-Net."""
        super().__init__(folder, config, unet, text_encoder, conditioner, lora)
        self.vae, self.unet = vae, unet
        self.latent_mean = unet.latent_mean.float()[:, None]  # C, 1
        self.latent_std = unet.latent_std.float()[:, None]

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: str = "auto",
        dtype: torch.dtype | str | None = None,
        lora: str | Path | None = None,
        lora_strength: float = 1.0,
    ) -> StableAudio:
        """Load a bundle for inference.

        Args:
            name: "starter", a folder, or a Hugging Face hub id.
            device: "auto" (CUDA, then MPS, then CPU) or a torch device.
            dtype: of the VAE's and U-Net's weights and activations; None or "auto" is bfloat16 where the processor
                multiplies it in hardware and float32 elsewhere. The text encoder stays float32.
            lora: folder with a LoRA that training.train_diffusion made for this model; it is merged into the U-Net.
            lora_strength: 1 is as trained, 0 without.

        Raises:
            UserError: there is no such bundle, LoRA or device, or a file is damaged or doesn't fit.
        """
        folder = bundle.resolve(name)
        config = load_model_config(folder)
        where = choose_device(device)
        kind = choose_dtype(dtype, where)
        vae = load_part(folder, "vae", lambda: build_vae(config.vae)).float().prepare_for_inference()
        unet = load_part(folder, "unet", lambda: build_unet(config))
        merged = None
        if lora is not None:
            latents = encoder_hash(bundle.read_part(folder, "vae"))
            merge_lora(unet.float(), lora, latents, lora_strength)
            merged = {"lora": str(lora), "lora_strength": lora_strength}
        text_encoder, conditioner = load_text_parts(folder, config.clap, config.timing)
        model = cls(folder, config, vae=vae, text_encoder=text_encoder, conditioner=conditioner, unet=unet, lora=merged)
        return model.to(where, kind)

    def to(self, device: torch.device, dtype: torch.dtype) -> StableAudio:
        """Move to `device`, the VAE and the U-Net in `dtype`; returns self."""
        self.vae.to(device, dtype)
        self.unet.to(device, dtype)
        self.conditioner.to(device)
        self.text_encoder.to(device)
        self.latent_mean, self.latent_std = self.latent_mean.to(device), self.latent_std.to(device)
        return self

    @property
    def sample_rate(self) -> int:
        return self.config.sample_rate

    @property
    def window_seconds(self) -> float:
        return self.config.window_seconds

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, frames) of the latents."""
        return self.config.latent_shape

    def _sample(self, *args: Any) -> Tensor:
        """Latents (B, C, F) in the VAE's scale."""
        return super()._sample(*args) * self.latent_std + self.latent_mean

    def _decode(self, x: Tensor, seconds: float) -> Tensor:
        """(C, F) latents -> (2, T); frames that lie beyond aren't decoded."""
        samples = round(seconds * self.sample_rate)
        frames = math.ceil(samples / self.config.hop) + _DECODE_MARGIN
        return self.vae.decode_chunked(x[None, :, :frames])[0, :, :samples].float().cpu()


def load_pipeline(
    name: str | Path,
    device: str = "auto",
    dtype: torch.dtype | str | None = None,
    lora: str | Path | None = None,
    lora_strength: float = 1.0,
) -> Pipeline:
    """A bundle of any system for inference; the arguments are those of `StableAudio.from_pretrained`.

    Raises:
        UserError: as there, or a LoRA is given for another system.
    """
    folder = bundle.resolve(name)
    if (kind := load_system(folder).kind) == "stable_audio":
        return StableAudio.from_pretrained(folder, device, dtype, lora, lora_strength)
    if lora is not None:
        raise UserError(f"{lora}: a LoRA is for a model of kind stable_audio, {name} is of kind {kind}; leave it out")
    return SpectralAudio.from_pretrained(folder, device, dtype)
