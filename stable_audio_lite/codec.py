"""Audio files to latent files and back, in memory that does not grow with their length.

codec = Codec.from_pretrained("starter-vae")
codec.encode_file("song.flac", "song.safetensors")
codec.decode_file("song.safetensors", "again.wav")
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stable_audio_lite import bundle
from stable_audio_lite.audio.io import AudioSource, stereo_blocks, write_audio_blocks
from stable_audio_lite.devices import choose_device, choose_dtype
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import check_apart, check_place, replacing, save_tensors
from stable_audio_lite.representation import LatentRepresentation, load_latents
from stable_audio_lite.systems import load_model_config
from stable_audio_lite.weights import read_safetensors


@dataclass(frozen=True)
class Encoded:
    """Result of `encode_file`: latent `channels` and `frames`, for `seconds` of sound."""

    channels: int
    frames: int
    seconds: float


class Codec:
    """A bundle's VAE, applied to files; build it with `from_pretrained`."""

    def __init__(self, representation: LatentRepresentation):
        self.vae, self.sample_rate, self.encoder = representation.vae, representation.sample_rate, representation.hash

    @classmethod
    def from_pretrained(cls, name: str | Path, device: str = "auto", dtype: torch.dtype | str | None = None) -> Codec:
        """Load the VAE of a bundle; the arguments are those of `StableAudio.from_pretrained`.

        Raises:
            UserError: there is no such bundle or device, or a file is damaged or doesn't fit its config.
        """
        folder = bundle.resolve(name)
        where = choose_device(device)
        representation = load_latents(folder, load_model_config(folder))
        return cls(representation.to(where, choose_dtype(dtype, where)))

    @torch.inference_mode()
    def encode_file(self, path: AudioSource, output: str | Path) -> Encoded:
        """Write the posterior mean of an audio file as safetensors: "latent" (C, F) float32.

        Raises:
            UserError: the audio can't be read or the latents can't be written.
        """
        check_apart([path], [output])
        check_place(output)
        samples = 0

        def blocks() -> Iterator[Tensor]:
            nonlocal samples
            for block in stereo_blocks(path, self.sample_rate):
                samples += block.shape[1]
                yield block[None].to(self._device)
            if not samples:
                raise UserError(f"{path}: too short, it has no samples at the model's {self.sample_rate} Hz")

        latent = torch.cat([piece.mean[0].float().cpu() for piece in self.vae.encode_stream(blocks())], 1)
        about = {"encoder": self.encoder, "samples": str(samples), "sample_rate": str(self.sample_rate)}
        with replacing(output) as temporary:
            save_tensors(temporary, {"latent": latent}, about)
        return Encoded(latent.shape[0], latent.shape[1], samples / self.sample_rate)

    @torch.inference_mode()
    def decode_file(self, path: str | Path, output: str | Path) -> float:
        """Write the sound of a latent file as 24-bit WAV or FLAC; returns the gain applied (1 unless it clipped).

        Raises:
            UserError: the file is no latent of this VAE, or the audio can't be written.
        """
        check_apart([path], [output])
        latent, samples = self._read(path)
        return write_audio_blocks(output, self._sound(latent, samples), self.sample_rate)

    def _sound(self, latent: Tensor, samples: int) -> Iterator[Tensor]:
        left = samples
        for piece in self.vae.decode_stream(latent[None].to(self._device)):
            if left > 0:
                yield piece[0, :, :left].cpu()
            left -= piece.shape[2]

    def _read(self, path: str | Path) -> tuple[Tensor, int]:
        tensors, about = read_safetensors(path)
        latent = tensors.get("latent")
        samples = int(text) if re.fullmatch(r"[0-9]{1,15}", text := about.get("samples", "")) else 0
        if latent is None or not latent.is_floating_point() or not samples:
            raise UserError(f"{path}: no latents of stable-audio-lite encode; encode the sound again")
        channels = self.vae.config.latent_channels
        if (
            about.get("encoder") != self.encoder
            or latent.ndim != 2
            or latent.shape[0] != channels
            or latent.shape[1] == 0
        ):
            raise UserError(f"{path}: latents of another VAE; give the model that encoded them")
        if latent.shape[1] != math.ceil(samples / self.vae.hop):
            raise UserError(f"{path}: damaged, its {latent.shape[1]} frames don't make {samples} samples; encode again")
        return latent.float(), samples

    @property
    def _device(self) -> torch.device:
        return next(self.vae.parameters()).device
