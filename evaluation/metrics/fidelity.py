"""Fidelity of a VAE's or a codec's output to its input: waveform, spectrum, stereo image, level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stable_audio_lite.audio.stft import stft

OCTAVES = (62.5, 125.0, 250.0, 500.0, 1000.0, 2000.0, 4000.0, 8000.0, 16000.0)
_QUIET = 1e-7  # -70 dB: power, relative to the loudest, below which an octave's level is not compared


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Distances of an output from its input; small is good but for the first.

    Attributes:
        si_sdr_db: scale-invariant signal-to-distortion ratio (Le Roux et al. 2019), mean over both channels.
        stft: auraloss.freq.MultiResolutionSTFTLoss.
        mel: auraloss.freq.MelSTFTLoss.
        mid_error_db: power of the error of left + right, relative to the input's left + right.
        side_error_db: power of the error of left - right, relative to the input's left + right, for a mono file has no
            left - right.
        phase_error: mean error of the phase between the channels, in radians, of STFT cells weighted by their power.
        clicks: places a second at which the output jumps (its second difference is over 8 times its own size around)
            and the input does not.
        level_db: level of the output minus that of the input.
        drift_db: standard deviation of that difference over windows of 0.4 s.
        octaves_db: mean absolute difference of level per octave around `OCTAVES` and STFT frame.
    """

    si_sdr_db: float
    stft: float
    mel: float
    mid_error_db: float
    side_error_db: float
    phase_error: float
    clicks: float
    level_db: float
    drift_db: float
    octaves_db: tuple[float, ...]


def fidelity(output: Tensor, target: Tensor, sample_rate: int) -> Fidelity:
    """All distances of (2, T) `output` from (2, T) `target`."""
    stft, mel = _distances(sample_rate)
    mid, side = target.sum(0), target[0] - target[1]
    whole = mid.square().sum().clamp_min(1e-12)
    levels = [_levels(x, sample_rate) for x in (output, target)]
    loud = levels[1] > levels[1].max() - 60
    difference = (levels[0] - levels[1])[loud]
    return Fidelity(
        si_sdr_db=si_sdr(output, target),
        stft=float(stft(output[None], target[None])),
        mel=float(mel(output[None], target[None])),
        mid_error_db=_decibels((output.sum(0) - mid).square().sum() / whole),
        side_error_db=_decibels((output[0] - output[1] - side).square().sum() / whole),
        phase_error=phase_error(output, target),
        clicks=clicks(output, target, sample_rate),
        level_db=_decibels(output.square().sum() / target.square().sum().clamp_min(1e-12)),
        drift_db=float(difference.std(correction=0)),
        octaves_db=octave_errors(output, target, sample_rate),
    )


def si_sdr(output: Tensor, target: Tensor) -> float:
    """In dB, the mean over the channels of (2, T) signals without their means."""
    output, target = (x - x.mean(1, keepdim=True) for x in (output, target))
    scale = (output * target).sum(1, keepdim=True) / target.square().sum(1, keepdim=True).clamp_min(1e-12)
    wanted = scale * target
    ratio = wanted.square().sum(1) / (output - wanted).square().sum(1).clamp_min(1e-12)
    return float(10 * ratio.clamp_min(1e-12).log10().mean())


def phase_error(output: Tensor, target: Tensor) -> float:
    """Mean angle between the two products left * conj(right) of (2, T) signals, weighted by the target's power."""
    ours, theirs = (_stft(x)[0] * _stft(x)[1].conj() for x in (output, target))
    weight = theirs.abs()
    return float(((ours * theirs.conj()).angle().abs() * weight).sum() / weight.sum().clamp_min(1e-12))


def clicks(output: Tensor, target: Tensor, sample_rate: int) -> float:
    """Jumps a second in (2, T) `output` that `target` has not, of either channel."""
    ours, theirs = (_jumps(x) for x in (output, target))
    near = F.max_pool1d(theirs.float()[:, None], 65, stride=1, padding=32)[:, 0] > 0
    new = (ours & ~near).any(0)
    starts = new & ~F.pad(new, (64, 0)).unfold(0, 64, 1)[: len(new)].any(1)  # one for each stretch
    return float(starts.sum()) * sample_rate / output.shape[1]


def octave_errors(output: Tensor, target: Tensor, sample_rate: int) -> tuple[float, ...]:
    """Mean |difference| in dB of the level per octave and frame; frames whose level is under -70 dB are left out."""
    powers = [_stft(x).abs().square().sum(0) for x in (output, target)]
    frequencies = torch.linspace(0, sample_rate / 2, powers[0].shape[0])
    errors = []
    for centre in OCTAVES:
        band = (frequencies >= centre / math.sqrt(2)) & (frequencies < centre * math.sqrt(2))
        ours, theirs = (p[band].sum(0) for p in powers)
        floor = _QUIET * float(powers[1].sum(0).max())
        audible = theirs > floor
        difference = 10 * ((ours + floor) / (theirs + floor)).log10().abs()
        errors.append(float(difference[audible].mean()) if bool(audible.any()) else 0.0)
    return tuple(errors)


def mean_fidelity(rows: Sequence[Fidelity]) -> Fidelity:
    """The mean of each distance."""
    means = {f.name: np.mean([getattr(row, f.name) for row in rows], axis=0).tolist() for f in fields(Fidelity)}
    return Fidelity(**means | {"octaves_db": tuple(means["octaves_db"])})


@lru_cache(maxsize=1)
def _distances(sample_rate: int) -> tuple[nn.Module, nn.Module]:
    from auraloss.freq import MelSTFTLoss, MultiResolutionSTFTLoss

    return MultiResolutionSTFTLoss(), MelSTFTLoss(sample_rate)


def _stft(audio: Tensor, window: int = 2048) -> Tensor:
    return stft(F.pad(audio, (0, window)), torch.hann_window(window), window // 4)


def _jumps(audio: Tensor) -> Tensor:
    bend = F.pad(audio.diff(n=2, dim=1).abs(), (1, 1))
    around = F.avg_pool1d(bend.square()[:, None], 1025, 1, 512, count_include_pad=False)[:, 0].sqrt()
    return bend > 8 * around.clamp_min(1e-4)


def _levels(audio: Tensor, sample_rate: int) -> Tensor:
    window = min(round(0.4 * sample_rate), audio.shape[1])
    power = audio.square().mean(0).unfold(0, window, window).mean(1)
    return 10 * power.clamp_min(1e-12).log10()


def _decibels(ratio: Tensor) -> float:
    return float(10 * ratio.clamp_min(1e-12).log10())
