"""Log-mel crops of sounds, and random changes of them to train a classifier of timbres on.

A generated sound comes through a codec: duller, rougher and with a noise floor. Training therefore changes every
example's spectrum at random (equaliser, low-pass, smearing, roughness, noise, a quiet second piece), so that what is
left to learn is the timbre.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_audio_lite.errors import UserError

_RANGE_DB = 70.0
_QUIET_DB = 40.0  # a crop's loudest frame lies at most this far below the piece's


@dataclass(frozen=True, kw_only=True)
class MelConfig:
    """Shape of the crops.

    Attributes:
        sample_rate: Hz that audio is brought to.
        window: samples of the Fourier transform; half as many lie between frames.
        mels: mel bands between `lowest` and `highest` Hz.
        frames: frames in one crop (129 are 3 s).
    """

    sample_rate: int = 22050
    window: int = 1024
    mels: int = 64
    lowest: float = 40.0
    highest: float = 10000.0
    frames: int = 129


def mel_power(mono: Tensor, config: MelConfig) -> Tensor:
    """Mel power spectrogram of (T,) samples at `config`'s rate: (mels, frames)."""
    import torchaudio

    transform = torchaudio.transforms.MelSpectrogram(
        sample_rate=config.sample_rate,
        n_fft=config.window,
        hop_length=config.window // 2,
        f_min=config.lowest,
        f_max=config.highest,
        n_mels=config.mels,
        norm="slaney",
    )
    return transform(mono)


def random_crop(power: Tensor, frames: int, generator: torch.Generator) -> Tensor:
    """A random crop, (mels, frames), of a piece's power (mels, any), not of a silence in it."""
    starts = _loud_starts(power, frames)
    return _cut(power, int(starts[int(torch.randint(len(starts), (1,), generator=generator))]), frames)


def all_crops(power: Tensor, frames: int) -> Tensor:
    """Crops that overlap by half and aren't silent: (N, mels, frames).

    Raises:
        UserError: the sound is silent.
    """
    starts = _loud_starts(power, frames).tolist()
    wanted = [s for s in starts if s % (frames // 2) == 0] or starts[:1]
    return torch.stack([_cut(power, start, frames) for start in wanted])


def _loud_starts(power: Tensor, frames: int) -> Tensor:
    """Frames at which a crop may start: its mean level is within `_QUIET_DB` of the loudest crop's."""
    level = power.sum(0)
    if not float(level.max()) > 0:
        raise UserError("the sound is silent, so nothing can be recognised in it")
    if len(level) <= frames:
        return torch.zeros(1, dtype=torch.long)
    means = level.unfold(0, frames, 1).mean(1)
    return (means > means.max() * 10 ** (-_QUIET_DB / 10)).nonzero()[:, 0]


def _cut(power: Tensor, start: int, frames: int) -> Tensor:
    crop = power[:, start : start + frames]
    return F.pad(crop, (0, frames - crop.shape[1]))


def normalise(power: Tensor) -> Tensor:
    """dB below each crop's peak, (B, mels, frames), centred and scaled; level and distant noise don't count."""
    decibels = 10 * power.clamp_min(1e-14).log10()
    decibels = decibels - decibels.amax((1, 2), keepdim=True)
    return (decibels.clamp_min(-_RANGE_DB) + _RANGE_DB / 2) / (_RANGE_DB / 4)


def augment(power: Tensor, generator: torch.Generator) -> Tensor:
    """Random versions of (B, mels, frames) power: what a codec or another mix might have made of the same sound."""
    size, mels, _ = power.shape

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(size, 1, 1, generator=generator)

    def some(share: float) -> Tensor:
        return torch.rand(size, 1, 1, generator=generator) < share

    peak = power.amax((1, 2), keepdim=True)
    # A second, quiet piece; bleeding accompaniment.
    other = power.roll(1, 0) * (peak / peak.roll(1, 0)) * 10 ** (draw(-28, -10) / 10)
    power = torch.where(some(0.3), power + other, power)
    smeared = F.avg_pool1d(power, 5, stride=1, padding=2)
    power = torch.where(some(0.3), smeared, power)
    # Equaliser of six bands, +-6 dB or so.
    bands = 5 * torch.randn(size, 1, 6, generator=generator)
    gain = F.interpolate(bands, mels, mode="linear", align_corners=True).transpose(1, 2)
    # Low-pass: some dB per band above a cutoff.
    band = torch.arange(mels)[None, :, None]
    gain = gain - torch.where(some(0.5), draw(0.5, 6) * (band - draw(0.35 * mels, mels)).clamp_min(0), 0)
    # Roughness: every cell is off a little.
    gain = gain + draw(0, 4) * torch.randn(power.shape, generator=generator)
    power = power * 10 ** (gain / 10)
    # A noise floor, tilted.
    tilt = draw(-0.4, 0.1) * (band - mels / 2)
    level = power.amax((1, 2), keepdim=True) * 10 ** ((draw(-65, -22) + tilt) / 10)
    power = torch.where(some(0.7), power + _noise(level, power.shape, generator), power)
    # A steady hiss of random colour.
    colour = F.interpolate(8 * torch.randn(size, 1, 6, generator=generator), mels, mode="linear", align_corners=True)
    level = power.amax((1, 2), keepdim=True) * 10 ** ((draw(-60, -15) + colour.transpose(1, 2)) / 10)
    power = torch.where(some(0.6), power + _noise(level, power.shape, generator), power)
    # Noise that follows the sound: its own spectrum, smeared over the bands, between its partials.
    smeared = F.avg_pool2d(power, (9, 1), stride=1, padding=(4, 0), count_include_pad=False)
    level = smeared * 10 ** (draw(-25, -3) / 10)
    return torch.where(some(0.6), power + _noise(level, power.shape, generator), power)


def _noise(level: Tensor, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Power of noise of mean `level`: exponentially distributed."""
    return -torch.rand(shape, generator=generator).clamp_min(1e-6).log() * level
