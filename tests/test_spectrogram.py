"""The STFT and the spectrograms of mono sound: inverses, frames' places, linearity, scale."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from stable_audio_lite.audio.spectrogram import Spectrogram, SpectrogramConfig
from stable_audio_lite.audio.stft import istft, stft


@pytest.mark.parametrize(("window", "hop"), [(64, 16), (64, 32), (128, 32)])
def test_istft_returns_what_every_frame_has_seen(window: int, hop: int) -> None:
    audio = torch.randn(2, 20 * hop + window, dtype=torch.float64)
    hann = torch.hann_window(window, dtype=torch.float64)
    back = istft(stft(audio, hann, hop, centred=False), hann, hop)
    assert back.shape == audio.shape
    torch.testing.assert_close(back[:, 1:], audio[:, 1:], rtol=0, atol=1e-9)  # a Hann window's first sample is 0


def test_stft_keeps_leading_axes_and_is_what_the_sum_says() -> None:
    audio = torch.randn(2, 3, 100, dtype=torch.float64)
    hann = torch.hann_window(16, dtype=torch.float64)
    got = stft(audio, hann, 4, centred=False)
    assert got.shape == (2, 3, 9, 22)
    n = torch.arange(16, dtype=torch.float64)
    wanted = (audio[1, 2, 20:36] * hann * torch.exp(-2j * math.pi * 3 * n / 16)).sum()
    torch.testing.assert_close(got[1, 2, 3, 5], wanted)


@pytest.mark.parametrize("exponent", [1.0, 0.5])
@pytest.mark.parametrize(("window", "hop"), [(1024, 256), (824, 412)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_round_trip_loses_the_row_of_dc_and_nothing_else(
    window: int, hop: int, exponent: float, dtype: torch.dtype
) -> None:
    spectrogram = Spectrogram(SpectrogramConfig(window=window, hop=hop, frames=64, exponent=exponent, scale=3.0))
    torch.manual_seed(0)
    audio = 0.3 * torch.randn(2, 64 * hop, dtype=dtype) + 0.1
    x = spectrogram.encode(audio)
    assert x.shape == (2, *spectrogram.config.shape)
    hann, margin = torch.hann_window(window, dtype=dtype), (window - hop) // 2
    spectrum = stft(F.pad(audio, (margin, margin)), hann, hop, centred=False)
    spectrum[:, 1:] = 0
    lowest = istft(spectrum, hann, hop)[:, margin : margin + 64 * hop]
    assert float(lowest.abs().max()) > 0.05
    torch.testing.assert_close(spectrogram.decode(x) + lowest, audio, rtol=0, atol=1e-5)


def test_frames_stand_where_the_docstring_says() -> None:
    spectrogram = Spectrogram(SpectrogramConfig(window=64, hop=16, frames=8))
    audio = torch.zeros(1, 8 * 16)
    audio[0, 3 * 16 + 8] = 1.0
    energy = spectrogram.encode(audio).square().sum((0, 1, 2))
    assert int(energy.argmax()) == 3
    torch.testing.assert_close(energy[2], energy[4])


def test_a_full_scale_sine_peaks_at_the_scale() -> None:
    spectrogram = Spectrogram(SpectrogramConfig(window=1024, hop=256, scale=2.5))
    t = torch.arange(64 * 256) / 44100
    x = spectrogram.encode(torch.sin(2 * math.pi * (20 * 44100 / 1024) * t)[None])
    assert float(x.square().sum(1).sqrt().max()) == pytest.approx(2.5, rel=1e-3)
    assert int(x.square().sum((0, 1, 3)).argmax()) == 19  # row 0 is that of one period a window


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"multiple of 256, got \(1, 300\)"):
        Spectrogram(SpectrogramConfig()).encode(torch.zeros(1, 300))
    with pytest.raises(ValueError, match=r"expected \(B, 2, 512, frames\), got \(1, 2, 100, 4\)"):
        Spectrogram(SpectrogramConfig()).decode(torch.zeros(1, 2, 100, 4))
    with pytest.raises(ValueError, match="scale must be above 0, got 0"):
        SpectrogramConfig(scale=0)
    with pytest.raises(ValueError, match="at most half of window, got 1024 and 600"):
        SpectrogramConfig(hop=600)
