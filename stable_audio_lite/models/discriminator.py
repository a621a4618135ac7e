"""Multi-scale complex-STFT discriminator (Défossez et al. 2022, EnCodec, arXiv 2210.13438, appendix A) for stereo."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from stable_audio_lite.audio.stft import stft


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Shape of the discriminator.

    Attributes:
        audio_channels: channels of the waveform.
        windows: STFT window lengths in samples, one sub-discriminator each; the hop is a quarter.
        filters: channels of every hidden convolution.
    """

    audio_channels: int = 2
    windows: tuple[int, ...] = (2048, 1024, 512, 256, 128)
    filters: int = 32

    def __post_init__(self) -> None:
        if not self.windows or min(self.windows) < 16 or self.filters < 1:
            raise ValueError(f"windows must be at least 16 and filters at least 1, got {self.windows}, {self.filters}")


class STFTDiscriminator(nn.Module):
    """One scale: real and imaginary parts of each channel through 2-D convolutions."""

    window: Tensor

    def __init__(self, audio_channels: int, window: int, filters: int):
        super().__init__()
        self.n_fft = window
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        convs = [weight_norm(nn.Conv2d(2 * audio_channels, filters, (3, 9), padding=(1, 4)))]
        for dilation in (1, 2, 4):
            convs.append(
                weight_norm(
                    nn.Conv2d(filters, filters, (3, 9), stride=(1, 2), dilation=(dilation, 1), padding=(dilation, 4))
                )
            )
        convs.append(weight_norm(nn.Conv2d(filters, filters, 3, padding=1)))
        self.convs = nn.ModuleList(convs)
        self.score = weight_norm(nn.Conv2d(filters, 1, 3, padding=1))

    def forward(self, audio: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, C, T) -> score map (B, 1, frames, bins') and the hidden maps."""
        spectrum = stft(audio.float(), self.window, self.n_fft // 4) * self.n_fft**-0.5
        x = torch.view_as_real(spectrum)  # B, C, bins, frames, 2
        x = x.permute(0, 1, 4, 3, 2).flatten(1, 2)  # B, 2C, frames, bins
        x = x.contiguous(memory_format=torch.channels_last)  # the layout of the fast kernels for few channels
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
            features.append(x)
        return self.score(x), features


class Discriminator(nn.Module):
    """All scales over (B, C, T)."""

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        self.scales = nn.ModuleList(STFTDiscriminator(config.audio_channels, w, config.filters) for w in config.windows)

    def forward(self, audio: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
        """Score map and hidden maps of each scale."""
        return [scale(audio) for scale in self.scales]
