"""The interface of variational autoencoders: stereo sound to latents and back, whole or as a stream.

`waveform_vae` has the paper's, after descript-audio-codec; `spectrogram_vae` one on magnitudes, small enough for a CPU.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Posterior:
    """Diagonal Gaussian over latents; `mean` and `std` are (B, latent_channels, F)."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, hidden: Tensor) -> Posterior:
        """Build it from means and scales (B, 2 latent_channels, F): std = softplus(scale) + 1e-4, in float32."""
        mean, scale = hidden.float().chunk(2, dim=1)  # softplus and the KL's logarithm lose too much in bf16
        return cls(mean, F.softplus(scale) + 1e-4)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * eps, (B, latent_channels, F)."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """mean^2 + var - log var - 1, summed over channels, mean over the rest (a scalar)."""
        variance = self.std.square()
        return (self.mean.square() + variance - variance.log() - 1).sum(1).mean()


class VAE(nn.Module, ABC):
    """Stereo audio to latents and back; fully convolutional, any length.

    Attributes:
        config: with `audio_channels`, `latent_channels` and `hop`, samples per latent frame.
        encoder: all weights that latents depend on.
        float32: whether it computes in float32 whatever the networks beside it do.
        encode_frames: latent frames that are encoded at once where nothing else is asked for.
    """

    config: Any
    encoder: nn.Module
    float32 = False
    encode_frames = 128

    @property
    def hop(self) -> int:
        """Samples per latent frame."""
        return self.config.hop

    @property
    @abstractmethod
    def encoder_halo(self) -> int:
        """One-sided receptive field of the encoder in latent frames, rounded up."""

    @abstractmethod
    def forward(self, audio: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Training pass: audio (B, audio_channels, T) and noise (B, latent_channels, T / hop) -> output, mean, std.

        Training compares the output with `target(audio)`.
        """

    @abstractmethod
    def target(self, audio: Tensor) -> Tensor:
        """The training target of audio (B, audio_channels, T), in the form of the output."""

    @abstractmethod
    def decode_stream(
        self, latents: Tensor, chunk_frames: int | None = None, frames: int | None = None
    ) -> Iterator[Tensor]:
        """Yield what `decode` returns in successive pieces (B, audio_channels, any), in float32 and constant memory.

        With `frames`, only the sound of the first so many, heard as the others follow them.

        Raises:
            ValueError: the shape is not (B, latent_channels, F) with F > 0, or chunks are empty.
        """

    @abstractmethod
    def prepare_for_inference(self) -> Self:
        """Stop gradients and fold what can be folded; returns self."""

    @abstractmethod
    def _encode(self, audio: Tensor) -> Posterior:
        """Posterior of (B, audio_channels, F * hop) audio."""

    def encode(self, audio: Tensor) -> Posterior:
        """Posterior of (B, audio_channels, T) audio; T is padded with silence to a multiple of `hop`.

        Raises:
            ValueError: the shape is not (B, audio_channels, T) with T > 0.
        """
        if audio.ndim != 3 or audio.shape[1] != self.config.audio_channels or audio.shape[2] == 0:
            raise ValueError(f"expected audio (B, {self.config.audio_channels}, T), got {tuple(audio.shape)}")
        return self._encode(F.pad(audio, (0, -audio.shape[2] % self.hop)))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode (B, latent_channels, F) latents to audio (B, audio_channels, F * hop), all at once.

        Raises:
            ValueError: the shape is not (B, latent_channels, F) with F > 0.
        """
        return self.decode_chunked(latents)

    def decode_chunked(self, latents: Tensor, chunk_frames: int | None = None) -> Tensor:
        """Decode in float32 and in pieces, by default of the size that the device is fastest with."""
        return torch.cat(list(self.decode_stream(latents, chunk_frames)), 2)

    def decode_between(self, latents: Tensor, source: Tensor, first: int, last: int) -> Tensor:
        """Decode (B, latent_channels, F) latents whose frames but first..last are of `source` (B, 2, F * hop).

        A VAE whose latents leave phases open chooses those of the frames in between to fit the source, and lets their
        levels go over from those of the source. Frames far from them may be anything.

        Raises:
            ValueError: the shape is not (B, latent_channels, F) with F > 0.
        """
        return self.decode_chunked(latents)

    def encode_chunked(self, audio: Tensor, chunk_frames: int | None = None) -> Posterior:
        """Encode in pieces of `chunk_frames` latent frames; None: of `encode_frames`."""
        pieces = list(self.encode_stream([audio], chunk_frames))
        return Posterior(torch.cat([p.mean for p in pieces], 2), torch.cat([p.std for p in pieces], 2))

    def encode_stream(self, blocks: Iterable[Tensor], chunk_frames: int | None = None) -> Iterator[Posterior]:
        """Yield posteriors of up to `chunk_frames` frames of audio that arrives in (B, audio_channels, any) blocks.

        Each is computed with all the context that it depends on, so together they equal `encode` of the whole; only
        that context and one block are held.

        Raises:
            ValueError: the blocks' shape is not (B, audio_channels, T), all blocks are empty, or chunks are empty.
        """
        chunk_frames = self.encode_frames if chunk_frames is None else chunk_frames
        check_chunks(chunk_frames)
        halo = self.encoder_halo
        held: Tensor | None = None
        left = start = 0  # frames: of the first sample held, and of the next posterior
        for block in blocks:
            held = block if held is None else torch.cat((held, block), 2)
            while (left + held.shape[2] // self.hop) >= start + chunk_frames + halo:
                yield self._encode_part(held, left, start, start + chunk_frames)
                start += chunk_frames
                held, left = held[:, :, max(start - halo - left, 0) * self.hop :], max(start - halo, left)
        if held is None:
            raise ValueError("expected audio, got no blocks")
        total = left + math.ceil(held.shape[2] / self.hop)
        for begin in range(start, max(total, 1), chunk_frames):
            yield self._encode_part(held, left, begin, min(begin + chunk_frames, total))

    def _encode_part(self, held: Tensor, left: int, start: int, stop: int) -> Posterior:
        """Encode frames start..stop of sound whose samples from frame `left` on are held."""
        first = max(start - self.encoder_halo, left)
        part = self.encode(held[:, :, (first - left) * self.hop : (stop + self.encoder_halo - left) * self.hop])
        own = slice(start - first, stop - first)
        return Posterior(part.mean[:, :, own], part.std[:, :, own])

    def check_latents(self, latents: Tensor) -> None:
        """Raise ValueError unless the shape is (B, latent_channels, F) with F > 0."""
        if latents.ndim != 3 or latents.shape[1] != self.config.latent_channels or latents.shape[2] == 0:
            raise ValueError(f"expected latents (B, {self.config.latent_channels}, F), got {tuple(latents.shape)}")


def check_chunks(frames: int) -> None:
    """Raise ValueError if pieces would be empty."""
    if frames < 1:
        raise ValueError(f"chunk_frames must be at least 1, got {frames}")


def first_samples(pieces: Iterator[Tensor], samples: int) -> Iterator[Tensor]:
    """Pass on pieces (B, C, any) of a sound until so many samples are complete."""
    for piece in pieces:
        yield piece[..., :samples]
        if (samples := samples - piece.shape[2]) <= 0:
            return
