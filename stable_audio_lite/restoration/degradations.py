"""What may be wrong with a sound, as DDRM takes it: an operator, its observation, and the noise in that.

Each task turns mono sound at a model's rate into an `Observation`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_audio_lite.audio.spectrogram import Spectrogram, SpectrogramConfig
from stable_audio_lite.errors import UserError
from stable_audio_lite.restoration.operators import Convolution, Operator, band_mask, gap_mask, identity
from stable_audio_lite.restoration.room import fit_filters, room_filters, unexplained
from stable_audio_lite.restoration.wpe import wpe

SIGMA_Y = 1e-3
"""Noise that every observation is taken to have at least (Saito et al. 2022), where the data have variance 1 or so."""

_LEAK = 2  # frequency rows beyond its own that a partial reaches in a Hann window
_QUARTER = -math.log(0.75)  # quantile 1/4 of an exponential distribution of mean 1


@dataclass(frozen=True)
class Observation:
    """What `stable_audio_lite.restoration.ddrm.ddrm` takes of the same names."""

    operator: Operator
    y: Tensor
    sigma_y: float = SIGMA_Y
    refine: Callable[[Tensor], Operator] | None = None


class Task(Protocol):
    """A thing to repair."""

    name: ClassVar[str]

    def observe(self, spectrogram: Spectrogram, audio: Tensor, least: int) -> Observation:
        """The observation in mono `audio` (T,), padded with silence to `least` frames or more."""
        ...

    def settings(self) -> dict[str, Any]:
        """What a file should say of it."""
        ...


@dataclass(frozen=True)
class Inpaint:
    """Stretches that are missing or spoiled: (start, stop) in seconds."""

    gaps: tuple[tuple[float, float], ...]
    name: ClassVar[str] = "inpaint"

    def __post_init__(self) -> None:
        for start, stop in self.gaps:
            if not 0 <= start < stop:
                raise UserError(f"--gap: must end after it starts, at 0 s or later, got {start:g}-{stop:g}")
        if not self.gaps:
            raise UserError("--task inpaint: say what is missing, as in --gap 1.5-1.8")

    def observe(self, spectrogram: Spectrogram, audio: Tensor, least: int) -> Observation:
        """Frames that overlap a gap are unknown."""
        config = spectrogram.config
        x = encode_padded(spectrogram, audio, least)
        spans = [(math.floor(a * config.sample_rate), math.ceil(b * config.sample_rate)) for a, b in self.gaps]
        operator = gap_mask(x.shape[3], spans, config.hop, config.window).to(x.device)
        return Observation(operator, operator.forward(x))

    def settings(self) -> dict[str, Any]:
        """The gaps."""
        return {"gaps": self.gaps}

    def parts(self, seconds: float, window: float) -> list[tuple[float, float, Inpaint]]:
        """Stretches (start, stop) of a sound with half a `window` or more around each gap, all in seconds.

        What lies farther off neither changes nor helps. The gaps of each stretch count from its start.
        """
        parts: list[tuple[float, float, list[tuple[float, float]]]] = []
        for start, stop in sorted(self.gaps):
            first, last = max(0.0, start - window / 2), min(seconds, stop + window / 2)
            if parts and first <= parts[-1][1]:
                first, before, gaps = parts.pop()
                parts.append((first, max(last, before), [*gaps, (start, stop)]))
            else:
                parts.append((first, last, [(start, stop)]))
        return [(a, b, Inpaint(tuple((c - a, d - a) for c, d in gaps))) for a, b, gaps in parts]

    def share(self, samples: int, sample_rate: int, fade: int) -> Tensor:
        """How much of each sample (T,) is to come from the restoration: 1 in the gaps, `fade` samples into 0."""
        share = torch.zeros(samples)
        places = torch.arange(samples)
        for start, stop in self.gaps:
            before = math.floor(start * sample_rate) - places
            after = places - math.ceil(stop * sample_rate) + 1
            share = torch.maximum(share, 1 - torch.maximum(before, after).clamp(0, fade) / fade)
        return share


@dataclass(frozen=True)
class Bandwidth:
    """Frequencies above `cutoff` Hz are missing."""

    cutoff: float
    name: ClassVar[str] = "bandwidth"

    def observe(self, spectrogram: Spectrogram, audio: Tensor, least: int) -> Observation:
        """Rows that reach beyond the cut-off are unknown.

        Raises:
            UserError: the cut-off leaves nothing, or everything.
        """
        config = spectrogram.config
        row = config.sample_rate / config.window  # Hz; row i is at (i + 1) of them
        high = math.floor(self.cutoff / row) - _LEAK
        if not 0 < high < config.bins:
            low, most = (1 + _LEAK) * row, config.sample_rate / 2
            raise UserError(f"--cutoff: must lie from {low:.0f} to {most:.0f} Hz for this model, got {self.cutoff:g}")
        x = encode_padded(spectrogram, audio, least)
        operator = band_mask(config.bins, 0, high).to(x.device)
        return Observation(operator, operator.forward(x))

    def settings(self) -> dict[str, Any]:
        """The cut-off."""
        return {"cutoff": self.cutoff}


@dataclass(frozen=True)
class Denoise:
    """White noise of `level_db` dB (root mean square, full scale is 0), estimated where None."""

    level_db: float | None = None
    name: ClassVar[str] = "denoise"

    def observe(self, spectrogram: Spectrogram, audio: Tensor, least: int) -> Observation:
        """Everything is seen, and all of it is noisy."""
        _check_linear(spectrogram.config, self.name)
        y = encode_padded(spectrogram, audio, least)
        heard = y[..., : spectrogram.frames_of(audio.shape[0])]
        sigma = noise_in(heard) if self.level_db is None else noise_deviation(spectrogram.config, self.level_db)
        return Observation(identity().to(y.device), y, max(sigma, SIGMA_Y))

    def settings(self) -> dict[str, Any]:
        """The level."""
        return {"noise_db": self.level_db}


@dataclass(frozen=True)
class Dereverb:
    """Reverberation of a room.

    Attributes:
        room: (L,) its response at the model's rate; where None, the room is estimated from what WPE removes, and
            again from each step's estimate of the dry sound (Saito et al. 2022).
        taps: frames of an estimated room.
        delay: of WPE, in frames.
        iterations: of WPE.
        hold: how near an estimated room stays to the one before, relative to the power of the first dry estimate.
    """

    room: Tensor | None = None
    taps: int = 150
    delay: int = 4
    iterations: int = 1
    hold: float = 100.0
    name: ClassVar[str] = "dereverb"

    def observe(self, spectrogram: Spectrogram, audio: Tensor, least: int) -> Observation:
        """Every frequency is convolved with a filter; what the filters can't explain counts as noise."""
        _check_linear(spectrogram.config, self.name)
        if self.room is not None:
            try:
                known = room_filters(spectrogram, self.room)
            except ValueError as error:
                raise UserError(f"--room: {error}") from error
            filters, lead, left = known.filters.to(audio.device), known.lead, known.unexplained
            y = encode_padded(spectrogram, audio, least, filters.shape[1])
            return Observation(Convolution(filters, y.shape[3], lead), y, _noise_of(y, left))
        return self._blind(spectrogram, audio, least)

    def settings(self) -> dict[str, Any]:
        """Whether the room was known."""
        return {"room": "known" if self.room is not None else "estimated"}

    def _blind(self, spectrogram: Spectrogram, audio: Tensor, least: int) -> Observation:
        taps = min(self.taps, spectrogram.frames_of(audio.shape[0]) // 3)
        y = encode_padded(spectrogram, audio, least, taps)
        dry = wpe(y, taps, self.delay, self.iterations)
        first = fit_filters(dry, y, taps)
        power, size = dry.square().sum((0, 1, 3))[:, None], first.abs().square().sum(1, keepdim=True).sqrt()
        filters = first

        def refine(estimate: Tensor) -> Operator:
            nonlocal filters
            own = estimate.square().sum((0, 1, 3))[:, None].clamp_min(1e-20)
            # Held by the first estimate's power: early estimates, which are faint, say little of the room. Scales of
            # room and sound can't be told apart, so each filter keeps its own.
            new = fit_filters(estimate, y, taps, start=filters, weight=self.hold * power / own)
            filters = new * (size / new.abs().square().sum(1, keepdim=True).sqrt().clamp_min(1e-20))
            return Convolution(filters, y.shape[3])

        sigma = _noise_of(y, unexplained(first, dry, y))
        return Observation(Convolution(first, y.shape[3]), y, sigma, refine if self.hold < math.inf else None)


def encode_padded(spectrogram: Spectrogram, audio: Tensor, least: int, extra: int = 0) -> Tensor:
    """(1, 2, F, T) of mono (samples,) followed by `extra` frames of silence and as many as bring T to `least`."""
    frames = max(spectrogram.frames_of(len(audio)) + extra, least)
    return spectrogram.encode(F.pad(audio, (0, frames * spectrogram.config.hop - len(audio)))[None])


def noise_deviation(config: SpectrogramConfig, level_db: float) -> float:
    """Standard deviation that white noise of a level in dB has in each real coordinate of a spectrogram."""
    taper = torch.hann_window(config.window, dtype=torch.float64)
    return 10 ** (level_db / 20) * config.scale * math.sqrt(2 * float(taper.square().sum())) / float(taper.sum())


def noise_in(y: Tensor) -> float:
    """The same of the noise in y (1, 2, F, T), of whose cells half or more hold nothing else."""
    power = y.square().sum(1).flatten()
    quarter = float(power.kthvalue(max(1, len(power) // 4)).values)
    return math.sqrt(quarter / _QUARTER / 2)


def _noise_of(y: Tensor, share: float) -> float:
    """Standard deviation that holds a share of y's power."""
    return max(SIGMA_Y, math.sqrt(share * float(y.square().mean())))


def _check_linear(config: SpectrogramConfig, task: str) -> None:
    if config.exponent != 1:
        raise UserError(
            f"--task {task}: needs a model of plain spectrograms, this one's magnitudes are raised to {config.exponent}"
        )
