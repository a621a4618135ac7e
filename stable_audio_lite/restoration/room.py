"""Rooms as filters over the frames of a spectrogram: each frequency's frames convolved with a filter of its own.

That is a room's effect but for what leaks between neighbouring frequencies; longer windows leak less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_audio_lite.audio.spectrogram import Spectrogram

_RIDGE = 1e-3  # of the mean power: frequencies that hold next to nothing get small filters
_TAIL_DB = -50.0  # a room response ends where this much of its energy is left


@dataclass(frozen=True)
class RoomFilters:
    """Filters (F, L), complex, of which `lead` taps look ahead, and the share of power that they don't explain."""

    filters: Tensor
    lead: int
    unexplained: float


def room_filters(spectrogram: Spectrogram, response: Tensor) -> RoomFilters:
    """The filters of a room response (T,) at the spectrogram's rate, fitted to noise that is played in the room.

    The direct sound becomes sample 0 with gain 1, so that what is restored keeps the recording's level.

    Raises:
        ValueError: the response is silent.
    """
    response = response.double()
    if not bool(response.any()):
        raise ValueError("the room response is silent")
    response = response[int(response.abs().argmax()) :]
    response = response / response[0]
    left = response.square().flip(0).cumsum(0).flip(0)
    response = response[: int((left > left[0] * 10 ** (_TAIL_DB / 10)).sum())]
    config = spectrogram.config
    lead = config.window // config.hop - 1
    taps = math.ceil(len(response) / config.hop) + 2 * lead
    samples = max(6 * taps, 256) * config.hop
    dry = torch.randn(samples, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wet = convolve(dry, response)
    x, y = (spectrogram.encode(audio[None]) for audio in (dry, wet))
    filters = fit_filters(x, y, taps, lead)
    return RoomFilters(filters.to(torch.complex64), lead, unexplained(filters, x, y, lead))


def convolve(audio: Tensor, response: Tensor) -> Tensor:
    """(T,) audio in a room of response (L,), its first T samples."""
    size = len(audio) + len(response) - 1
    spectrum = torch.fft.rfft(audio, size) * torch.fft.rfft(response, size)
    return torch.fft.irfft(spectrum, size)[: len(audio)]


def fit_filters(
    x: Tensor, y: Tensor, taps: int, lead: int = 0, start: Tensor | None = None, weight: float | Tensor = _RIDGE
) -> Tensor:
    """Filters h (F, taps) that bring |y - h * x|^2 + weight |x|^2 |h - start|^2 to its minimum in each frequency.

    Args:
        x: (1, 2, F, T), the dry sound.
        y: (1, 2, F, T), the wet one.
        taps: of a filter.
        lead: how many of them look ahead.
        start: (F, taps) filters to stay near; 0 where None.
        weight: how near, for all frequencies or (F, 1) for each.
    """
    z, w = (torch.complex(a[0, 0], a[0, 1]) for a in (x, y))
    size = z.shape[1] + taps
    zs, ws = torch.fft.fft(z, size), torch.fft.fft(w, size)
    own = torch.fft.ifft(zs.abs().square().to(zs))  # F, size: sum_t x[t + l] conj(x[t])
    cross = torch.fft.ifft(ws * zs.conj()).roll(lead, 1)[:, :taps]  # sum_t y[t + l - lead] conj(x[t])
    lags = torch.arange(taps, device=x.device)
    gram = own[:, (lags[:, None] - lags) % size]
    hold = (weight * own[:, :1].real).clamp_min(1e-20)
    wanted = cross if start is None else cross + hold * start
    return torch.linalg.solve(gram + torch.diag_embed(hold.expand(-1, taps)).to(gram), wanted[..., None])[..., 0]


def unexplained(filters: Tensor, x: Tensor, y: Tensor, lead: int = 0) -> float:
    """|y - filters * x|^2 / |y|^2."""
    z, w = (torch.complex(a[0, 0], a[0, 1]) for a in (x, y))
    size = z.shape[1] + filters.shape[1]
    shifted = F.pad(filters, (0, size - filters.shape[1])).roll(-lead, 1)
    made = torch.fft.ifft(torch.fft.fft(z, size) * torch.fft.fft(shifted))[:, : z.shape[1]]
    return float((w - made).abs().square().sum() / w.abs().square().sum().clamp_min(1e-20))
