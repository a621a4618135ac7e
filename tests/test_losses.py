"""Distances between sounds: zero for equals, finite for silence, and as deaf and keen as ears."""

from __future__ import annotations

import math

import pytest
import torch

from stable_audio_lite.models.spectrogram_vae import SpectralFeatures, SpectrogramEncoder, SpectrogramVAEConfig
from training.losses import MultiResolutionSTFTLoss, SpectralFeatureLoss, a_weighting_fir, filter_fir, mel_bands


def test_stft_loss_is_zero_for_equals_and_finite_for_silence() -> None:
    torch.manual_seed(0)
    loss = MultiResolutionSTFTLoss(44100, (512, 128))
    audio = 0.1 * torch.randn(2, 2, 4096)
    assert all(float(v) == pytest.approx(0, abs=1e-5) for v in loss(audio, audio).values())
    for target in (torch.zeros_like(audio), audio[:, :1].expand(-1, 2, -1)):  # silence; mono, so no difference signal
        output = (target + 1e-3 * torch.randn_like(target)).requires_grad_()
        total = sum(loss(output, target).values())
        (gradient,) = torch.autograd.grad(total, output)
        assert float(total.detach()) < 20
        assert gradient.isfinite().all()


def test_mel_distance_hears_low_bands_as_much_as_high_ones() -> None:
    """Bands take means of bins; a missing tone at 500 Hz costs several times what it does among linear bins."""
    torch.manual_seed(0)
    bands = mel_bands(44100, 2048)
    torch.testing.assert_close(bands.sum(1), torch.ones(len(bands)))
    assert 200 < len(bands) <= 320
    time = torch.arange(32768) / 44100
    noise, tone = 0.01 * torch.randn(1, 2, 32768), 0.3 * torch.sin(2 * math.pi * 500 * time).expand(1, 2, -1)
    loss = MultiResolutionSTFTLoss(44100, (2048, 512), a_weighting=False, mel=True)
    without = loss(noise, noise + tone)
    assert float(loss(noise, noise)["stft/mel"]) == 0
    # The log part of "left" is at most all of it.
    assert float(without["stft/mel"]) > 2 * (float(without["stft/left"]) - 1)


def test_a_weighting_is_flat_at_1_khz_and_deaf_below() -> None:
    seconds = torch.arange(44100) / 44100
    gains = {}
    for frequency in (50, 1000, 3000):
        tone = torch.sin(2 * torch.pi * frequency * seconds)
        gains[frequency] = 20 * torch.log10(filter_fir(tone, a_weighting_fir(44100))[8000:36000].std() / tone.std())
    assert gains[1000] == pytest.approx(0, abs=0.6)
    assert gains[3000] == pytest.approx(1.2, abs=0.6)  # IEC 61672-1, table 2: +1.2 dB at 3.15 kHz
    assert gains[50] < -8  # 101 taps level off there; the curve itself goes on to -30 dB


def test_spread_hears_that_noise_was_smoothed_and_not_when_each_level_was() -> None:
    torch.manual_seed(0)
    encoder = SpectrogramEncoder(SpectrogramVAEConfig(kind="spectrogram", width=16))
    loss, stereo = SpectralFeatureLoss(encoder), torch.zeros(2, 3, 32, 24)
    levels = torch.randn(2, 320, 48) - 6

    def distances(other: torch.Tensor) -> dict[str, torch.Tensor]:
        return loss(encoder.pack(SpectralFeatures(other, stereo)), encoder.pack(SpectralFeatures(levels, stereo)))

    smooth, later = distances(levels.mean(2, keepdim=True).expand_as(levels)), distances(levels.roll(7, 2))
    assert later["features/spread"] < 1e-5 < 1 < later["features/log"]
    assert smooth["features/spread"] > 0.9 * smooth["features/log"] > 0.5
    assert smooth["features/log"] < 0.8 * later["features/log"]  # which asks for the smooth one
