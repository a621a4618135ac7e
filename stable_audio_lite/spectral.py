"""Sound by diffusion on spectrograms, from nothing or from text: sample a complex spectrogram, transform it back.

model = SpectralAudio.from_pretrained("runs/spectrogram_transformer/bundle")
model.generate(count=2, seed=1).audio  # (2, 1, T) float32: item, channel, sample; full scale is 1
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from stable_audio_lite import bundle
from stable_audio_lite.audio.spectrogram import Spectrogram
from stable_audio_lite.clap.text_encoder import TextEncoder
from stable_audio_lite.devices import choose_device, choose_dtype
from stable_audio_lite.diffusion.schedule import DiscreteSchedule
from stable_audio_lite.generation import Pipeline, load_part, load_text_parts
from stable_audio_lite.models.conditioner import Conditioner
from stable_audio_lite.systems import SpectralConfig, SpectrogramDiffusionConfig, load_spectral


class SpectralAudio(Pipeline):
    """A loaded bundle of a system that works on spectrograms, ready to generate mono sound; see `from_pretrained`."""

    config: SpectralConfig

    def __init__(
        self,
        folder: Path,
        config: SpectralConfig,
        *,
        network: nn.Module,
        text_encoder: TextEncoder | None = None,
        conditioner: Conditioner | None = None,
    ):
        """Take loaded parts of the bundle `folder`; text encoder and conditioner for a network that reads text."""
        super().__init__(folder, config, network, text_encoder, conditioner)
        self.objective = config.objective
        self.spectrogram, self.schedule = Spectrogram(config.spectrogram), DiscreteSchedule(config.schedule)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, device: str = "auto", dtype: torch.dtype | str | None = None
    ) -> SpectralAudio:
        """Load a bundle for inference; the arguments are those of `StableAudio.from_pretrained`.

        Raises:
            UserError: there is no such bundle or device, it is of the latent system, or a file is damaged or doesn't
                fit.
        """
        folder = bundle.resolve(name)
        config = load_spectral(folder)
        where = choose_device(device)
        kind = choose_dtype(dtype, where)
        network = load_part(folder, config.part, config.network)
        text_encoder = conditioner = None
        if isinstance(config, SpectrogramDiffusionConfig) and config.clap is not None:
            text_encoder, conditioner = load_text_parts(folder, config.clap, config.timing)
        model = cls(folder, config, network=network, text_encoder=text_encoder, conditioner=conditioner)
        return model.to(where, kind)

    def to(self, device: torch.device, dtype: torch.dtype) -> SpectralAudio:
        """Move to `device`, the network in `dtype`; returns self."""
        self.network.to(device, dtype)
        for part in (self.text_encoder, self.conditioner):
            if part is not None:
                part.to(device)
        return self

    @property
    def sample_rate(self) -> int:
        return self.config.spectrogram.sample_rate

    @property
    def window_seconds(self) -> float:
        return self.config.spectrogram.seconds

    @property
    def shape(self) -> tuple[int, ...]:
        """(2, bins, frames) of the spectrogram."""
        return self.config.spectrogram.shape

    def _time(self, sigma: Tensor) -> Tensor:
        return self.schedule.step(sigma)

    def _decode(self, x: Tensor, seconds: float) -> Tensor:
        """A (2, bins, frames) spectrogram -> (1, T)."""
        return self.spectrogram.decode(x[None].float())[:, : round(seconds * self.sample_rate)].cpu()
