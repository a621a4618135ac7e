"""Complex spectrograms of mono sound as two real channels, and back.

spectrogram = Spectrogram(SpectrogramConfig())
x = spectrogram.encode(audio)  # (B, T) -> (B, 2, 512, T / 256)
spectrogram.decode(x)          # (B, T), the same to rounding except for the dropped DC row
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_audio_lite.audio.stft import istft, stft

_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class SpectrogramConfig:
    """Shape and scale of a spectrogram; the defaults are those of Saito et al. 2022 (arXiv 2211.04124).

    Attributes:
        sample_rate: Hz.
        window: samples of the Hann window; there are half as many frequency rows, since the DC row is dropped.
        hop: samples from frame to frame.
        frames: frames that a network sees at once.
        exponent: applied to magnitudes; below 1 it brings quiet partials nearer to loud ones.
        scale: factor that brings data to a network's range; without it, a full-scale sine peaks at 1.
    """

    sample_rate: int = 44100
    window: int = 1024
    hop: int = 256
    frames: int = 512
    exponent: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("sample_rate", "window", "hop", "frames", "exponent", "scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.window % 2 or self.hop % 2 or 2 * self.hop > self.window:
            raise ValueError(
                f"window and hop must be even, and hop at most half of window, got {self.window} and {self.hop}"
            )

    @property
    def bins(self) -> int:
        """Frequency rows: sample_rate / window Hz up to half the sample rate."""
        return self.window // 2

    @property
    def samples(self) -> int:
        """Samples that a network sees at once."""
        return self.frames * self.hop

    @property
    def seconds(self) -> float:
        """Seconds that a network sees at once."""
        return self.samples / self.sample_rate

    @property
    def shape(self) -> tuple[int, int, int]:
        """(2, bins, frames): real and imaginary parts."""
        return 2, self.bins, self.frames


class Spectrogram:
    """The transform between sound and spectrograms of one config; frame k is centred on sample (k + 1/2) * hop."""

    def __init__(self, config: SpectrogramConfig):
        self.config = config

    @cached_property
    def _window(self) -> Tensor:
        return torch.hann_window(self.config.window, dtype=torch.float64)

    def encode(self, audio: Tensor) -> Tensor:
        """Transform mono (B, T) to (B, 2, bins, T / hop), with silence assumed beyond the ends.

        Raises:
            ValueError: T is no multiple of the hop.
        """
        config = self.config
        if audio.ndim != 2 or not audio.shape[1] or audio.shape[1] % config.hop:
            raise ValueError(f"expected mono (B, T) with T a multiple of {config.hop}, got {tuple(audio.shape)}")
        window = self._window.to(audio)
        margin = (config.window - config.hop) // 2
        spectrum = stft(F.pad(audio, (margin, margin)), window, config.hop, centred=False)[:, 1:]
        spectrum = spectrum * (2 / window.sum())
        if config.exponent != 1:
            spectrum = spectrum * spectrum.abs().clamp_min(_TINY) ** (config.exponent - 1)
        return torch.view_as_real(spectrum).movedim(-1, 1) * config.scale

    def decode(self, x: Tensor) -> Tensor:
        """Transform (B, 2, bins, frames) back to mono (B, frames * hop), without a DC component.

        Raises:
            ValueError: x has another shape.
        """
        config = self.config
        if x.ndim != 4 or x.shape[1:3] != config.shape[:2]:
            raise ValueError(f"expected (B, 2, {config.bins}, frames), got {tuple(x.shape)}")
        window = self._window.to(x)
        spectrum = torch.view_as_complex((x / config.scale).movedim(1, -1).contiguous())
        if config.exponent != 1:
            spectrum = spectrum * spectrum.abs().clamp_min(_TINY) ** (1 / config.exponent - 1)
        spectrum = F.pad(spectrum, (0, 0, 1, 0)) * (window.sum() / 2)
        margin = (config.window - config.hop) // 2
        return istft(spectrum, window, config.hop)[:, margin : margin + x.shape[3] * config.hop]

    def frames_of(self, samples: int) -> int:
        """Return the number of frames that cover `samples` samples, the last perhaps in part."""
        return math.ceil(samples / self.config.hop)
