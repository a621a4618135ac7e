"""Rooms as filters, and dereverberation by WPE, on rooms that are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stable_audio_lite.audio.spectrogram import Spectrogram, SpectrogramConfig
from stable_audio_lite.restoration.operators import Convolution
from stable_audio_lite.restoration.room import convolve, fit_filters, residual_ratio, room_filters
from stable_audio_lite.restoration.wpe import wpe

BINS, FRAMES = 6, 400


def dry(seed: int = 0) -> Tensor:
    """Independent frames whose power comes and goes, as speech's does."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 2, BINS, FRAMES, dtype=torch.float64, generator=generator)
    return x * (torch.rand(1, 1, BINS, FRAMES, dtype=torch.float64, generator=generator) < 0.3)


def filters(taps: int) -> Tensor:
    """Direct sound, three frames of nothing, then a decaying tail."""
    h = 0.6 * torch.randn(BINS, taps, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))
    h = h * torch.linspace(0, -3, taps, dtype=torch.float64).exp()
    h[:, 0], h[:, 1:4] = 1, 0
    return h


def wet(x: Tensor, h: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(x, (h.shape[1], 0))
    return Convolution(h, padded.shape[3]).forward(padded)[..., h.shape[1] :]


def test_filters_are_found_from_a_dry_and_a_wet_sound() -> None:
    x, h = dry(), filters(10)
    x[..., :2] = x[..., -10:] = 0  # so that all of the tail is heard
    y = wet(x, h)
    found = fit_filters(x, y, 10, ridge=1e-9)
    torch.testing.assert_close(found, h, atol=1e-6, rtol=0)
    assert residual_ratio(found, x, y) < 1e-12 < 1e-3 < residual_ratio(0.9 * found, x, y)
    later = fit_filters(x, y.roll(-2, 3), 12, lookahead=2, ridge=1e-9)
    torch.testing.assert_close(later[:, :10], h, atol=1e-6, rtol=0)


def test_filters_stay_near_the_ones_before() -> None:
    x, h = dry(), filters(6)
    y = wet(x, h)
    near = fit_filters(x, y, 6, prior=0.5 * h, ridge=1e4)
    far = fit_filters(x, y, 6, prior=0.5 * h, ridge=1e-4)
    assert (near - 0.5 * h).norm() < 1e-2 * h.norm() and (far - h).norm() < 1e-2 * h.norm()
    silent = fit_filters(0 * x, y, 6, prior=h, ridge=1.0)
    torch.testing.assert_close(silent, h)


def test_a_rooms_filters_predict_its_sound() -> None:
    generator = torch.Generator().manual_seed(2)
    decay = torch.logspace(0, -3, 3000, dtype=torch.float64)
    response = torch.cat((torch.zeros(40), 0.05 * torch.randn(3000, generator=generator).double() * decay))
    response[40] = 2.0
    spectrogram = Spectrogram(SpectrogramConfig(sample_rate=8000, window=256, hop=64, frames=128))
    room = room_filters(spectrogram, response)
    sound = torch.randn(16384, dtype=torch.float64, generator=generator)
    y = spectrogram.encode(convolve(sound, response[40:] / 2)[None])
    operator = Convolution(room.filters.to(torch.complex128), y.shape[3], room.lookahead)
    error = (operator.forward(spectrogram.encode(sound[None])) - y)[..., room.filters.shape[1] :]
    share = float(error.square().sum() / y[..., room.filters.shape[1] :].square().sum())
    assert share < 0.01 and 0.5 < share / room.residual < 2


def test_a_silent_room_is_refused() -> None:
    with pytest.raises(ValueError, match="silent"):
        room_filters(Spectrogram(SpectrogramConfig()), torch.zeros(100))


def test_wpe_removes_what_the_past_predicts() -> None:
    x = dry()
    y = wet(x, filters(12))

    def error_db(estimate: Tensor) -> float:
        return 10 * math.log10(float((estimate - x).square().sum() / x.square().sum()))

    found = wpe(y, taps=40, delay=4)
    assert found.shape == x.shape and found.dtype == x.dtype
    assert error_db(found) < error_db(y) - 8
    # What no past predicts stays.
    torch.testing.assert_close(wpe(y, taps=40, delay=50)[..., :50], y[..., :50])


def test_wpe_takes_silence_and_short_sounds() -> None:
    x = dry()[..., :5]
    x[:, :, 2] = 0
    assert torch.isfinite(wpe(x)).all() and not wpe(x)[:, :, 2].any() and not wpe(0 * x).any()
    with pytest.raises(ValueError, match="delay"):
        wpe(x, delay=0)
