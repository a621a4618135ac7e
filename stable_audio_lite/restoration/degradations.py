"""Degradations of sound and their observation models: an operator, its output, and the noise in the output.

Each turns mono sound at a model's rate into an `Observation`, the input of DDRM.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_audio_lite.audio.spectrogram import Spectrogram, SpectrogramConfig
from stable_audio_lite.errors import UserError
from stable_audio_lite.restoration.operators import Convolution, Operator, frames_beside_gaps
from stable_audio_lite.restoration.room import fit_filters, residual_ratio, room_filters
from stable_audio_lite.restoration.wpe import wpe

SIGMA_Y = 1e-3
"""Least standard deviation of an observation's noise (Saito et al. 2022), for data of variance near 1."""

_LEAKAGE = 2  # frequency rows beyond its own that a partial leaks into under a Hann window
_LOWER_QUARTILE = -math.log(0.75)  # of an exponential distribution of mean 1
_MAX_NOISE_DB = 100.0


@dataclass(frozen=True)
class Observation:
    """Arguments of `stable_audio_lite.restoration.ddrm.ddrm`, by the same names."""

    operator: Operator
    y: Tensor
    sigma_y: float = SIGMA_Y
    refine: Callable[[Tensor], Operator] | None = None


class Degradation(ABC):
    """Something wrong with a recording."""

    name: ClassVar[str]

    @abstractmethod
    def observe(self, spectrogram: Spectrogram, audio: Tensor, min_frames: int) -> Observation:
        """Return the observation in mono `audio` (T,), padded with silence to at least `min_frames` frames.

        Raises:
            UserError: the degradation doesn't fit the sound or the spectrogram.
        """

    def settings(self) -> dict[str, Any]:
        """Return the settings to store with a restored file."""
        return dict(vars(self))


@dataclass(frozen=True)
class Inpaint(Degradation):
    """Stretches that are missing or spoiled.

    Attributes:
        gaps: (start, stop) in seconds.

    Raises:
        UserError: there are no gaps, or one is empty or starts before the sound.
    """

    gaps: tuple[tuple[float, float], ...]
    name: ClassVar[str] = "inpaint"

    def __post_init__(self) -> None:
        for start, stop in self.gaps:
            if not 0 <= start < stop:
                raise UserError(f"gaps: each must end after it starts, at 0 s or later, got {start:g}-{stop:g}")
        if not self.gaps:
            raise UserError("gaps: none given; name what is missing by start and stop in seconds")

    def observe(self, spectrogram: Spectrogram, audio: Tensor, min_frames: int) -> Observation:
        """Treat frames that overlap a gap as unknown."""
        config = spectrogram.config
        x = encode_padded(spectrogram, audio, min_frames)
        gaps = [(math.floor(a * config.sample_rate), math.ceil(b * config.sample_rate)) for a, b in self.gaps]
        operator = Operator(frames_beside_gaps(x.shape[3], gaps, config.hop, config.window).to(x)[None])
        return Observation(operator, operator.forward(x))

    def segments(self, seconds: float, window: float) -> list[tuple[float, float, Inpaint]]:
        """Cut out the segments (start, stop) of a sound that extend at least half a `window` around each gap.

        All times are in seconds; those of a segment's gaps are relative to its start. Sound farther from a gap neither
        changes nor helps.
        """
        segments: list[tuple[float, float, list[tuple[float, float]]]] = []
        for start, stop in sorted(self.gaps):
            first, last = max(0.0, start - window / 2), min(seconds, stop + window / 2)
            if segments and first <= segments[-1][1]:
                first, before, gaps = segments.pop()
                segments.append((first, max(last, before), [*gaps, (start, stop)]))
            else:
                segments.append((first, last, [(start, stop)]))
        return [(a, b, Inpaint(tuple((c - a, d - a) for c, d in gaps))) for a, b, gaps in segments]

    def blend_weights(self, samples: int, sample_rate: int, fade: int) -> Tensor:
        """Return each sample's weight of the restored sound (T,): 1 in gaps, falling to 0 over `fade` samples."""
        weights = torch.zeros(samples)
        positions = torch.arange(samples)
        for start, stop in self.gaps:
            before = math.floor(start * sample_rate) - positions
            after = positions - math.ceil(stop * sample_rate) + 1
            weights = torch.maximum(weights, 1 - torch.maximum(before, after).clamp(0, fade) / fade)
        return weights


@dataclass(frozen=True)
class Bandwidth(Degradation):
    """Missing high frequencies.

    Attributes:
        cutoff: Hz, above which they are missing.

    Raises:
        UserError: the cut-off is not a frequency.
    """

    cutoff: float
    name: ClassVar[str] = "bandwidth"

    def __post_init__(self) -> None:
        if not 0 < self.cutoff < math.inf:
            raise UserError(f"cutoff must be above 0 Hz and finite, got {self.cutoff:g}")

    def observe(self, spectrogram: Spectrogram, audio: Tensor, min_frames: int) -> Observation:
        """Treat rows that extend beyond the cut-off as unknown; it must leave some, and not everything."""
        config = spectrogram.config
        spacing = config.sample_rate / config.window  # Hz; row i is at (i + 1) times this
        known = math.floor(self.cutoff / spacing) - _LEAKAGE
        if not 0 < known < config.bins:
            lowest, highest = (1 + _LEAKAGE) * spacing, config.sample_rate / 2
            raise UserError(
                f"cutoff must lie from {lowest:.0f} to {highest:.0f} Hz for this model, got {self.cutoff:g}"
            )
        x = encode_padded(spectrogram, audio, min_frames)
        operator = Operator((torch.arange(config.bins)[:, None] < known).to(x))
        return Observation(operator, operator.forward(x))


@dataclass(frozen=True)
class Denoise(Degradation):
    """White noise.

    Attributes:
        noise_db: root mean square level in dB relative to full scale; None to estimate it.

    Raises:
        UserError: the level is not a number of dB, or absurdly high.
    """

    noise_db: float | None = None
    name: ClassVar[str] = "denoise"

    def __post_init__(self) -> None:
        if self.noise_db is not None and not -math.inf < self.noise_db <= _MAX_NOISE_DB:
            raise UserError(f"noise_db must be finite and at most {_MAX_NOISE_DB:g} dB, got {self.noise_db:g}")

    def observe(self, spectrogram: Spectrogram, audio: Tensor, min_frames: int) -> Observation:
        """Treat everything as known but noisy."""
        _check_linear(spectrogram.config, self.name)
        y = encode_padded(spectrogram, audio, min_frames)
        unpadded = y[..., : spectrogram.frames_of(audio.shape[0])]
        sigma = estimate_noise_std(unpadded) if self.noise_db is None else noise_std(spectrogram.config, self.noise_db)
        return Observation(Operator(y.new_ones(1, 1)), y, max(sigma, SIGMA_Y))


@dataclass(frozen=True)
class Dereverb(Degradation):
    """Reverberation of a room.

    Attributes:
        room: (L,) its impulse response at the model's rate. If None, the room is estimated from what WPE removes, and
            again from each step's estimate of the dry sound (Saito et al. 2022); held-out piano is worse after that
            than before, so the command asks for a room.
        taps: frames of an estimated room.
        ridge: how near an estimated room stays to the one before, relative to the power of the first dry estimate;
            infinity keeps the first.
    """

    room: Tensor | None = None
    taps: int = 150
    ridge: float = 100.0
    name: ClassVar[str] = "dereverb"

    def observe(self, spectrogram: Spectrogram, audio: Tensor, min_frames: int) -> Observation:
        """Convolve every frequency with a filter; what the filters can't explain counts as noise."""
        _check_linear(spectrogram.config, self.name)
        if self.room is None:
            return self._blind(spectrogram, audio, min_frames)
        known = room_filters(spectrogram, self.room)
        filters = known.filters.to(audio.device)
        y = encode_padded(spectrogram, audio, min_frames, filters.shape[1])
        return Observation(Convolution(filters, y.shape[3], known.lookahead), y, _residual_std(y, known.residual))

    def settings(self) -> dict[str, Any]:
        return {"room": "known" if self.room is not None else "estimated"}

    def _blind(self, spectrogram: Spectrogram, audio: Tensor, min_frames: int) -> Observation:
        taps = min(self.taps, spectrogram.frames_of(audio.shape[0]) // 3)
        if taps < 1:
            shortest = (2 * spectrogram.config.hop + 1) / spectrogram.config.sample_rate
            raise UserError(f"room: can't be estimated from less than {shortest:.3f} s of sound")
        y = encode_padded(spectrogram, audio, min_frames, taps)
        dry = wpe(y, taps)
        first = fit_filters(dry, y, taps)
        power, norm = dry.square().sum((0, 1, 3))[:, None], _norm(first)
        filters = first

        def refine(estimate: Tensor) -> Operator:
            nonlocal filters
            own_power = estimate.square().sum((0, 1, 3))[:, None].clamp_min(1e-20)
            # The ridge is relative to the first estimate's power: early estimates are faint and say little of the
            # room. Scales of room and sound can't be told apart, so each filter keeps its norm.
            new = fit_filters(estimate, y, taps, prior=filters, ridge=self.ridge * power / own_power)
            filters = new * (norm / _norm(new).clamp_min(1e-20))
            return Convolution(filters, y.shape[3])

        sigma = _residual_std(y, residual_ratio(first, dry, y))
        return Observation(Convolution(first, y.shape[3]), y, sigma, refine if self.ridge < math.inf else None)


def encode_padded(spectrogram: Spectrogram, audio: Tensor, min_frames: int, extra: int = 0) -> Tensor:
    """Encode mono (samples,) and `extra` frames of silence as (1, 2, F, T); more silence brings T to `min_frames`."""
    frames = max(spectrogram.frames_of(len(audio)) + extra, min_frames)
    return spectrogram.encode(F.pad(audio, (0, frames * spectrogram.config.hop - len(audio)))[None])


def noise_std(config: SpectrogramConfig, noise_db: float) -> float:
    """Return the standard deviation of white noise of a level in dB in each real coordinate of a spectrogram."""
    window = torch.hann_window(config.window, dtype=torch.float64)
    return 10 ** (noise_db / 20) * config.scale * math.sqrt(2 * float(window.square().sum())) / float(window.sum())


def estimate_noise_std(y: Tensor) -> float:
    """Estimate the same from y (1, 2, F, T), of which at least half the cells hold nothing but noise."""
    power = y.square().sum(1).flatten()
    quartile = float(power.kthvalue(max(1, len(power) // 4)).values)
    return math.sqrt(quartile / _LOWER_QUARTILE / 2)


def _residual_std(y: Tensor, ratio: float) -> float:
    """Standard deviation of noise that makes up a ratio of y's power."""
    return max(SIGMA_Y, math.sqrt(ratio * float(y.square().mean())))


def _norm(filters: Tensor) -> Tensor:
    """(F, L) -> (F, 1)."""
    return filters.abs().square().sum(1, keepdim=True).sqrt()


def _check_linear(config: SpectrogramConfig, name: str) -> None:
    if config.exponent != 1:
        raise UserError(
            f"{name}: needs a model of linear spectrograms; this one's magnitudes are raised to {config.exponent}"
        )
