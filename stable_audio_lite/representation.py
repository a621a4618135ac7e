"""Sound as the data that a diffusion network denoises, and back: one interface for latents and spectrograms.

Data are normalised here and nowhere else: networks, samplers and trainers see what `encode` returns.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from stable_audio_lite import bundle
from stable_audio_lite.audio.spectrogram import Spectrogram, SpectrogramConfig
from stable_audio_lite.models.vae import VAE, first_samples
from stable_audio_lite.systems import StableAudioConfig, SystemConfig, build_vae
from stable_audio_lite.weights import read_safetensors, state_hash

# Latent frames beyond the wanted end that a decoder sees, more than its receptive field.
_DECODE_MARGIN = 32


class Representation(ABC):
    """Sound as data, normalised for a network.

    Attributes:
        sample_rate: Hz.
        audio_channels: of the sound.
        shape: of one window's data: (channels, frames) or (2, bins, frames).
        hop: samples per frame.
        hash: identifies what the data mean; a network belongs to one hash.
    """

    sample_rate: int
    audio_channels: int
    shape: tuple[int, ...]
    hop: int
    hash: str

    @property
    def window_samples(self) -> int:
        """Samples of one window."""
        return self.shape[-1] * self.hop

    @property
    def window_seconds(self) -> float:
        """Seconds of one window."""
        return self.window_samples / self.sample_rate

    @abstractmethod
    def encode(self, audio: Tensor) -> Tensor:
        """Encode sound (B, audio_channels, T) as data (B, ..., ceil(T / hop)), with silence beyond its end."""

    @abstractmethod
    def decode(self, x: Tensor, samples: int) -> Tensor:
        """Decode data (B, ..., frames) to the first `samples` of their sound (B, audio_channels, samples), float32."""

    def decode_stream(self, x: Tensor, samples: int) -> Iterator[Tensor]:
        """Yield what `decode` returns in successive pieces (B, audio_channels, any)."""
        yield self.decode(x, samples)

    def decode_between(self, x: Tensor, source: Tensor, first: int, last: int) -> Tensor:
        """Decode data whose frames but first..last are of `source` (B, audio_channels, frames * hop).

        The result is as long as the source. Frames far from those in between may be anything.
        """
        return self.decode(x[..., : source.shape[2] // self.hop], source.shape[2])

    @abstractmethod
    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Move to `device`, networks in `dtype`; returns self."""


class LatentRepresentation(Representation):
    """The latents of a VAE, of unit variance per channel.

    Args:
        vae: prepared for inference.
        config: of the system.
        encoder: hash of the VAE's encoder, see `encoder_hash`.
        mean, std: (C,), by which latents are normalised.
    """

    def __init__(
        self, vae: VAE, config: StableAudioConfig, encoder: str, mean: Tensor | None = None, std: Tensor | None = None
    ):
        channels = config.vae.latent_channels
        self.vae, self.hash = vae, encoder
        self.sample_rate, self.hop, self.shape = config.sample_rate, vae.hop, (channels, config.latent_frames)
        self.audio_channels = config.vae.audio_channels
        self.mean = (torch.zeros(channels) if mean is None else mean.float())[:, None]
        self.std = (torch.ones(channels) if std is None else std.float())[:, None]

    @property
    def device(self) -> torch.device:
        """Device of the VAE."""
        return next(self.vae.parameters()).device

    def encode(self, audio: Tensor) -> Tensor:
        """Encode as the posterior mean, normalised; any length will do."""
        return self.normalise(self.vae.encode_chunked(audio).mean)

    def decode(self, x: Tensor, samples: int) -> Tensor:
        return torch.cat(list(self.decode_stream(x, samples)), 2)

    def decode_stream(self, x: Tensor, samples: int) -> Iterator[Tensor]:
        frames = math.ceil(samples / self.hop)
        latents = x[..., : frames + _DECODE_MARGIN] * self.std + self.mean
        for piece in first_samples(self.vae.decode_stream(latents, frames=frames), samples):
            yield piece.float()

    def decode_between(self, x: Tensor, source: Tensor, first: int, last: int) -> Tensor:
        latents = x[..., : source.shape[2] // self.hop] * self.std + self.mean
        return self.vae.decode_between(latents, source, first, last).float()

    def normalise(self, latents: Tensor) -> Tensor:
        """Normalise the VAE's latents (..., C, F) for a network."""
        return (latents - self.mean) / self.std

    @cached_property
    @torch.no_grad()
    def silence(self) -> Tensor:
        """Normalised latents (C, window) of digital silence, on the CPU."""
        quiet = torch.zeros(1, self.audio_channels, self.window_samples, device=self.device)
        return self.encode(quiet)[0].float().cpu()

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        self.vae.to(device, torch.float32 if self.vae.float32 else dtype)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self


class SpectrogramRepresentation(Representation):
    """Complex spectrograms of mono sound; see `stable_audio_lite.audio.spectrogram`."""

    audio_channels = 1

    def __init__(self, config: SpectrogramConfig):
        self.spectrogram = Spectrogram(config)
        self.sample_rate, self.hop, self.shape = config.sample_rate, config.hop, config.shape
        self.hash = hashlib.sha256(repr(config).encode()).hexdigest()

    def encode(self, audio: Tensor) -> Tensor:
        if audio.ndim != 3 or audio.shape[1] != 1:
            raise ValueError(f"expected mono (B, 1, T), got {tuple(audio.shape)}")
        return self.spectrogram.encode(torch.nn.functional.pad(audio[:, 0], (0, -audio.shape[2] % self.hop)))

    def decode(self, x: Tensor, samples: int) -> Tensor:
        return self.spectrogram.decode(x.float())[:, None, :samples]

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        return self


def load_representation(folder: str | Path, config: SystemConfig) -> Representation:
    """Load the representation of a bundle of any system, on the CPU, ready for inference.

    Raises:
        UserError: as `load_latents`.
    """
    if isinstance(config, StableAudioConfig):
        return load_latents(folder, config)
    return SpectrogramRepresentation(config.spectrogram)


def outline_representation(config: SystemConfig) -> Representation:
    """Build the representation of a system with the lengths and rates of a loaded one, but without its weights."""
    if isinstance(config, StableAudioConfig):
        return LatentRepresentation(build_vae(config.vae), config, "")
    return SpectrogramRepresentation(config.spectrogram)


def load_latents(folder: str | Path, config: StableAudioConfig) -> LatentRepresentation:
    """Load the VAE of a bundle, with the latent statistics of its U-Net where it has one.

    Raises:
        UserError: the VAE's file is missing or damaged, or doesn't fit `config`.
    """
    vae = bundle.load_module(folder, "vae", lambda: build_vae(config.vae))
    encoder, statistics = encoder_hash(vae.state_dict()), {}
    if (unet := bundle.part_path(folder, "unet")).is_file():
        found = read_safetensors(unet, ("latent_mean", "latent_std"))[0]
        statistics = {"mean": found.get("latent_mean"), "std": found.get("latent_std")}
    return LatentRepresentation(vae.float().prepare_for_inference(), config, encoder, **statistics)


def encoder_hash(vae_state: Mapping[str, Tensor]) -> str:
    """Identify a latent space by the SHA-256 of the encoder's weights in a VAE's state; the decoder may change."""
    return state_hash({key: value for key, value in vae_state.items() if key.startswith("encoder.")})
