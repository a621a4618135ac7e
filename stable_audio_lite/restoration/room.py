"""Rooms as filters over the frames of a spectrogram, one for each frequency.

Convolving each frequency's frames with a filter of its own models a room except for leakage between neighbouring
frequencies (the convolutive transfer function approximation); longer windows leak less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_audio_lite.audio.spectrogram import Spectrogram
from stable_audio_lite.errors import UserError

_RIDGE = 1e-3  # relative to the mean power, so that nearly silent frequencies get small filters
_TAIL_DB = -50.0  # an impulse response is cut where the energy that is left falls below this


@dataclass(frozen=True)
class RoomFilters:
    """Filters of a room.

    Attributes:
        filters: complex (F, L).
        lookahead: how many of the L taps act on later frames.
        residual: share of the reverberant power that the filters don't explain.
    """

    filters: Tensor
    lookahead: int
    residual: float


def room_filters(spectrogram: Spectrogram, response: Tensor) -> RoomFilters:
    """Fit filters to noise played in a room with impulse response (T,) at the spectrogram's rate.

    The direct sound becomes sample 0 with gain 1, so that restoring keeps the recording's level.

    Raises:
        UserError: the response is silent.
    """
    response = response.double()
    if not bool(response.any()):
        raise UserError("the room's impulse response is silent")
    response = response[int(response.abs().argmax()) :]
    response = response / response[0]
    energy_left = response.square().flip(0).cumsum(0).flip(0)
    response = response[: int((energy_left > energy_left[0] * 10 ** (_TAIL_DB / 10)).sum())]
    config = spectrogram.config
    lookahead = config.window // config.hop - 1
    taps = math.ceil(len(response) / config.hop) + 2 * lookahead
    samples = max(6 * taps, 256) * config.hop
    noise = torch.randn(samples, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dry, wet = (spectrogram.encode(audio[None]) for audio in (noise, convolve(noise, response)))
    filters = fit_filters(dry, wet, taps, lookahead)
    return RoomFilters(filters.to(torch.complex64), lookahead, residual_ratio(filters, dry, wet, lookahead))


def convolve(audio: Tensor, response: Tensor) -> Tensor:
    """Convolve audio (T,) with an impulse response (L,); the first T samples."""
    size = len(audio) + len(response) - 1
    spectrum = torch.fft.rfft(audio, size) * torch.fft.rfft(response, size)
    return torch.fft.irfft(spectrum, size)[: len(audio)]


def fit_filters(
    dry: Tensor, wet: Tensor, taps: int, lookahead: int = 0, prior: Tensor | None = None, ridge: float | Tensor = _RIDGE
) -> Tensor:
    """Find filters h (F, taps) that minimise |wet - h * dry|^2 + ridge |dry|^2 |h - prior|^2 in each frequency.

    `dry` and `wet` are (1, 2, F, T). `lookahead` of the taps act on later frames. The filters stay near `prior`
    (F, taps), or 0, by `ridge`: one number, or (F, 1) for each frequency.
    """
    x, y = (torch.complex(a[0, 0], a[0, 1]) for a in (dry, wet))
    size = x.shape[1] + taps
    xs, ys = torch.fft.fft(x, size), torch.fft.fft(y, size)
    auto = torch.fft.ifft(xs.abs().square().to(xs))  # F, size: sum_t x[t + l] conj(x[t])
    cross = torch.fft.ifft(ys * xs.conj()).roll(lookahead, 1)[:, :taps]  # sum_t y[t + l - lookahead] conj(x[t])
    lags = torch.arange(taps, device=dry.device)
    gram = auto[:, (lags[:, None] - lags) % size]
    weight = (ridge * auto[:, :1].real).clamp_min(1e-20)
    target = cross if prior is None else cross + weight * prior
    return torch.linalg.solve(gram + torch.diag_embed(weight.expand(-1, taps)).to(gram), target[..., None])[..., 0]


def residual_ratio(filters: Tensor, dry: Tensor, wet: Tensor, lookahead: int = 0) -> float:
    """|wet - filters * dry|^2 / |wet|^2; shapes as in `fit_filters`."""
    x, y = (torch.complex(a[0, 0], a[0, 1]) for a in (dry, wet))
    size = x.shape[1] + filters.shape[1]
    shifted = F.pad(filters, (0, size - filters.shape[1])).roll(-lookahead, 1)
    predicted = torch.fft.ifft(torch.fft.fft(x, size) * torch.fft.fft(shifted))[:, : x.shape[1]]
    return float((y - predicted).abs().square().sum() / y.abs().square().sum().clamp_min(1e-20))
