"""Losses of the VAEs: multi-resolution STFT, spectral features, hinge adversarial and feature matching."""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stable_audio_lite.audio.stft import stft
from stable_audio_lite.models.spectrogram_vae import SpectrogramEncoder, level_importance, stereo_pooling

Maps = list[tuple[Tensor, list[Tensor]]]


def a_weighting_fir(sample_rate: int, taps: int = 101) -> Tensor:
    """Linear-phase FIR of the A-weighting curve (IEC 61672-1), normalised to 0 dB at 1 kHz; shape (taps,)."""
    from scipy.signal import firwin2

    nyquist = sample_rate / 2
    grid = torch.linspace(0, 1, 512, dtype=torch.float64)
    f2 = (grid * nyquist) ** 2
    curve = 12194.217**2 * f2**2
    curve /= (f2 + 20.598997**2) * torch.sqrt((f2 + 107.65265**2) * (f2 + 737.86223**2)) * (f2 + 12194.217**2)
    gain = curve * 10 ** (2.0 / 20)
    return torch.from_numpy(firwin2(taps, grid.numpy(), gain.numpy())).float()


class MultiResolutionSTFTLoss(nn.Module):
    """Spectral convergence plus log-magnitude distance (Yamamoto et al. 2020, arXiv 1910.11480, eq. 3-6).

    Taken over sum, difference, left and right after the A-weighting filter (Steinmetz et al. 2021, arXiv 2010.10291;
    Evans et al. 2024, section 3.1). The transform is linear, so only left and right are transformed.

    The denominator of the convergence and the magnitudes in the logarithm have a floor: without it the difference
    signal of near-mono music divides by nearly nothing, and silence dominates the logarithm.

    Half of a spectrum's bins are above 11 kHz, where music has little. With `mel` the logarithms are compared on mel
    bands too, which are dense where the ear is sharp (Kumar et al. 2023, section 3.4).

    Args:
        windows: window lengths in samples; the hop is a quarter.
        floor: smallest magnitude that counts in the logarithm, relative to a full-scale sine's peak bin.
        mel: add the distance on mel bands.
    """

    fir: Tensor | None

    def __init__(
        self,
        sample_rate: int,
        windows: tuple[int, ...],
        a_weighting: bool = True,
        floor: float = 1e-4,
        mel: bool = False,
    ):
        super().__init__()
        self.windows, self.floor = windows, floor
        self.mel = mel
        for window in windows:
            self.register_buffer(f"window_{window}", torch.hann_window(window), persistent=False)
            if mel:
                self.register_buffer(f"mel_{window}", mel_bands(sample_rate, window), persistent=False)
        fir = a_weighting_fir(sample_rate) if a_weighting else None
        self.register_buffer("fir", fir, persistent=False)

    def forward(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Distances "stft/sum", "difference", "left", "right", and perhaps "stft/mel", of (B, 2, T) signals."""
        both = torch.cat((output, target)).float()
        if self.fir is not None:
            both = filter_fir(both, self.fir)
        names = ("sum", "difference", "left", "right")
        totals = dict.fromkeys((*names, *(["mel"] if self.mel else [])), output.new_zeros((), dtype=torch.float32))
        for window in self.windows:
            for name, spectrum in _signals(self._stft(both, window)).items():
                got, wanted = spectrum.abs().chunk(2)
                totals[name] = totals[name] + self._distance(got, wanted) / len(self.windows)
                if self.mel:
                    bands = getattr(self, f"mel_{window}")
                    one, other = ((bands @ magnitudes + self.floor).log() for magnitudes in (got, wanted))
                    totals["mel"] = totals["mel"] + (one - other).abs().mean() / (len(names) * len(self.windows))
        return {f"stft/{name}": total for name, total in totals.items()}

    def _distance(self, got: Tensor, wanted: Tensor) -> Tensor:
        error = (wanted - got).square().sum((1, 2)).clamp_min(1e-12).sqrt()
        least = 10 * self.floor * math.sqrt(wanted[0].numel())
        convergence = error / wanted.square().sum((1, 2)).sqrt().clamp_min(least)
        return convergence.mean() + self._log_distance(got, wanted)

    def _log_distance(self, got: Tensor, wanted: Tensor) -> Tensor:
        return ((wanted + self.floor) / (got + self.floor)).log().abs().mean()

    def _stft(self, audio: Tensor, window: int) -> Tensor:
        weights = getattr(self, f"window_{window}")
        # A full-scale sine peaks at 1, whatever the window.
        return stft(audio, weights, window // 4) * (2 / weights.sum())


def mel_bands(sample_rate: int, window: int) -> Tensor:
    """Mel filters (bands, window / 2 + 1): triangles that take means of magnitudes.

    There are 20 bands for a window of 128 samples and 320 for 2048 and more (as in Kumar et al. 2023); bands too narrow
    to hold a bin are left out.
    """
    import torchaudio

    count = min(round(window * 320 / 2048), 320)
    with warnings.catch_warnings(action="ignore"):  # of the empty bands
        bands = torchaudio.functional.melscale_fbanks(window // 2 + 1, 0.0, sample_rate / 2, max(count, 2), sample_rate)
    bands = bands.T[bands.sum(0) > 0]
    return bands / bands.sum(1, keepdim=True)


def filter_fir(audio: Tensor, fir: Tensor) -> Tensor:
    """Filter (..., T) audio with an odd number of symmetric taps, without delay, by FFT: exact and fast."""
    n = 1 << (audio.shape[-1] + fir.shape[0] - 1).bit_length()
    filtered = torch.fft.irfft(torch.fft.rfft(audio, n) * torch.fft.rfft(fir, n), n)
    start = fir.shape[0] // 2
    return filtered[..., start : start + audio.shape[-1]]


def _signals(stereo: Tensor) -> dict[str, Tensor]:
    left, right = stereo.unbind(1)
    # The small constant keeps the gradient of |.| finite where both channels cancel exactly.
    return {"sum": left + right, "difference": left - right + 1e-8, "left": left, "right": right}


class WaveformLoss(nn.Module):
    """Norm of the error over norm of the target, per item, of the waveform and of the A-weighted waveform.

    By Parseval's theorem it is the convergence of complex spectra. Unlike magnitudes it depends on the phase, and so it
    teaches a VAE pitch in its first few hundred steps.

    Args:
        floor: smallest norm, relative to full scale, that errors are measured against.
    """

    fir: Tensor

    def __init__(self, sample_rate: int, floor: float = 1e-3):
        super().__init__()
        self.floor = floor
        self.register_buffer("fir", a_weighting_fir(sample_rate), persistent=False)

    def forward(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Mean relative error "waveform/relative" of (B, C, T) signals, 1 for silence."""
        both = torch.cat((output, target)).float()
        return {"waveform/relative": (self._relative(both) + self._relative(filter_fir(both, self.fir))) / 2}

    def _relative(self, both: Tensor) -> Tensor:
        output, target = both.chunk(2)
        error = (output - target).square().mean((1, 2)).clamp_min(1e-12).sqrt()
        return (error / target.square().mean((1, 2)).sqrt().clamp_min(self.floor)).mean()


class SpectralFeatureLoss(nn.Module):
    """Distances between the spectrogram VAE's features.

    Logarithms of magnitudes weight quiet and loud parts alike; square roots of magnitudes, relative to their mean in
    the item, weight loud parts more. Frequencies count half as bins do and half as the ear does (`level_importance`).
    Stereo parameters are weighted by the square root of the level of their frame and of their band.

    What can't be foreseen, such as the grain of noise, these distances would rather have smooth. `features/spread` asks
    of each frequency that it has its levels as often as it should, whenever (1-Wasserstein distance).

    Args:
        encoder: the one that normalised the features.
    """

    importance: Tensor
    stereo_pooling: Tensor

    def __init__(self, encoder: SpectrogramEncoder):
        super().__init__()
        self.encoder = encoder
        self.register_buffer("importance", level_importance()[:, None], persistent=False)
        self.register_buffer("stereo_pooling", stereo_pooling(), persistent=False)

    def forward(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Distances "features/log", "root", "stereo" and "spread" of packed (B, C, F) features."""
        got, wanted = self.encoder.unpack(output), self.encoder.unpack(target)
        root = (0.5 * wanted.levels).exp()
        errors = (((0.5 * got.levels).exp() - root).abs() * self.importance).mean((1, 2))
        pairs = root.unflatten(2, (-1, 2)).mean(3)
        loudness = (pairs.mean(1, keepdim=True) + self.stereo_pooling @ pairs)[:, None]  # B, 1, bands, F
        spread = (got.levels.sort(2).values - wanted.levels.sort(2).values).abs() * self.importance
        stereo = (got.stereo - wanted.stereo).abs() * loudness / loudness.mean((1, 2, 3), keepdim=True)
        return {
            "features/log": ((got.levels - wanted.levels).abs() * self.importance).mean(),
            "features/root": (errors / (root * self.importance).mean((1, 2))).mean(),
            "features/stereo": stereo.mean(),
            "features/spread": spread.mean(),
        }


def hinge_discriminator(real: Maps, fake: Maps) -> Tensor:
    """Mean over scales of relu(1 - D(x)) + relu(1 + D(G(z)))."""
    pairs = [F.relu(1 - r).mean() + F.relu(1 + f).mean() for (r, _), (f, _) in zip(real, fake, strict=True)]
    return torch.stack(pairs).mean()


def hinge_generator(fake: Maps) -> Tensor:
    """Mean over scales of -D(G(z))."""
    return torch.stack([-score.mean() for score, _ in fake]).mean()


def feature_matching(real: Maps, fake: Maps) -> Tensor:
    """Mean over scales and layers of the L1 distance relative to the real features' mean size (EnCodec, eq. 2).

    Relative per item, so that the mean over a batch is the mean over its parts.
    """
    terms = [
        ((r.detach() - f).abs().flatten(1).mean(1) / r.detach().abs().flatten(1).mean(1).clamp_min(1e-5)).mean()
        for (_, reals), (_, fakes) in zip(real, fake, strict=True)
        for r, f in zip(reals, fakes, strict=True)
    ]
    return torch.stack(terms).mean()
