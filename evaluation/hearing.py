"""What the classifiers of instruments share: log-mel crops, augmentations, the network below their heads, their files.

A generated sound comes through a codec: duller, rougher and with a noise floor. Training therefore changes every
example's spectrum at random (equaliser, low-pass, smearing, roughness, noise, a quiet second piece), so that what is
left to learn is the timbre.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stable_audio_lite.config import save_config
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import replacing, save_tensors

_WIDTHS = (16, 24, 48, 64)
_RANGE_DB = 70.0
_QUIET_DB = 40.0  # a crop's loudest frame lies at most this far below the piece's


@dataclass(frozen=True, kw_only=True)
class HearingConfig:
    """What a classifier knows and hears.

    Attributes:
        instruments: the classes.
        families: the family of each class, in the same order.
        sample_rate: Hz that audio is brought to.
        window: samples of the Fourier transform; half as many lie between frames.
        mels: mel bands between `lowest` and `highest` Hz.
        frames: frames in one crop (129 are 3 s).
    """

    instruments: tuple[str, ...]
    families: tuple[str, ...]
    sample_rate: int = 22050
    window: int = 1024
    mels: int = 64
    lowest: float = 40.0
    highest: float = 10000.0
    frames: int = 129

    def __post_init__(self) -> None:
        if not self.instruments or len(self.instruments) != len(self.families):
            raise ValueError("instruments and families must be equally many, and at least one")
        if self.mels % 2 ** len(_WIDTHS) or self.frames < 2 ** len(_WIDTHS):
            raise ValueError(f"mels must be a multiple of {2 ** len(_WIDTHS)} and frames at least as many")


class Trunk(nn.Module):
    """Normalised log-mel crops (B, mels, frames) -> features (B, `features`)."""

    def __init__(self, config: HearingConfig):
        super().__init__()
        layers: list[nn.Module] = [_block(1, _WIDTHS[0], stride=2)]
        for before, width in zip(_WIDTHS, _WIDTHS[1:], strict=False):
            layers += [_block(before, width), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers)
        # Time is averaged away; frequency stays, for where the partials lie is what tells timbres apart.
        self.features = 2 * _WIDTHS[-1] * (config.mels // 2 ** len(_WIDTHS))

    def forward(self, crops: Tensor) -> Tensor:
        x = self.layers(crops[:, None])  # B, width, mels / 16, frames / 16
        return torch.cat([x.mean(3), x.amax(3)], 1).flatten(1)


def _block(before: int, width: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(before, width, 2 * stride + 1, stride, padding=stride, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


def mel_power(mono: Tensor, config: HearingConfig) -> Tensor:
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


def random_crop(powers: list[Tensor], frames: int, generator: torch.Generator) -> Tensor:
    """A random crop, (mels, frames), of one of the pieces, not of a silence in it."""
    power = powers[int(torch.randint(len(powers), (1,), generator=generator))]
    crops = _loud_starts(power, frames)
    start = int(crops[int(torch.randint(len(crops), (1,), generator=generator))])
    return _cut(power, start, frames)


def all_crops(power: Tensor, frames: int) -> Tensor:
    """Crops that overlap by half and aren't silent: (N, mels, frames)."""
    starts = _loud_starts(power, frames).tolist()
    wanted = [s for s in starts if s % (frames // 2) == 0] or starts[:1]
    return torch.stack([_cut(power, start, frames) for start in wanted])


def _loud_starts(power: Tensor, frames: int) -> Tensor:
    """Frames at which a crop may start: its mean level is within `_QUIET_DB` of the loudest crop's."""
    level = power.sum(0)
    if not float(level.max()) > 0:
        raise UserError("the sound is silent, so no instrument can be heard in it")
    if len(level) <= frames:
        return torch.zeros(1, dtype=torch.long)
    means = level.unfold(0, frames, 1).mean(1)
    return (means > means.max() * 10 ** (-_QUIET_DB / 10)).nonzero()[:, 0]


def _cut(power: Tensor, start: int, frames: int) -> Tensor:
    crop = power[:, start : start + frames]
    return F.pad(crop, (0, frames - crop.shape[1]))


def normalise(power: Tensor) -> Tensor:
    """dB below each crop's peak, (B, mels, frames), centred and scaled; makes level and distant noise irrelevant."""
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


def save_listener(module: nn.Module, config: HearingConfig, path: Path) -> None:
    """Write a config to `path` and weights beside it, as `.safetensors`."""
    save_config(config, path)
    with replacing(path.with_suffix(".safetensors")) as temporary:
        save_tensors(temporary, module.state_dict(), {"format": "pt"})


def load_listener(module: nn.Module, path: Path) -> None:
    """Load the weights that lie beside the config at `path`.

    Raises:
        UserError: they are missing, damaged or don't fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights = path.with_suffix(".safetensors")
    try:
        module.load_state_dict(load_file(weights))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{weights}: no weights that fit {path.name}; train it again") from error
