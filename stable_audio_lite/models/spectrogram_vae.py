"""A VAE on magnitudes and stereo parameters: small, quick to train on a CPU, with latents that are easy to generate.

It compresses 2048-sample spectra, two to a latent frame: their magnitudes, in single bins up to 5.5 kHz and in bands
above, and how the channels are related in a few bands (parametric stereo, Breebaart et al. 2005, as Stokes parameters).
Phase is dropped: decoding finds one that fits. Reads upward: features, blocks, VAE.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stable_audio_lite.audio.phase import GriffinLim, advance
from stable_audio_lite.models.vae import VAE, Posterior, check_chunks, first_samples

WINDOW_SAMPLES, HOP_SAMPLES = 2048, 512
"""Length of a spectrum's window, and the step from one spectrum to the next, in samples."""
PAIR = 2  # spectra to a latent frame
_BINS = WINDOW_SAMPLES // 2 + 1
_SINGLE, _BANDS, _STEREO = 256, 64, 32  # single bins, bands above them, bands of stereo parameters
_LEVELS = _SINGLE + _BANDS
_PADDING = (WINDOW_SAMPLES - HOP_SAMPLES) // 2  # spectra are centred in their hops
FLOOR = 1e-4
"""Magnitude, where a full-scale sine has 1, that is added before taking logarithms: -80 dB."""
_SILENT = 0.2 * FLOOR  # the smallest magnitude whose logarithm a decoder tells from that of silence
_PATIENCE = 2  # times as many iterations where phases have to fit on both sides
_LATEST, _ERRORS_LAST = 3, 21  # spectra that count as the latest, and for which a decoder's errors last
_GOING_OVER = 4  # spectra that lie between known levels and decoded ones
_PIECE, _CONTEXT = 128, 8  # latent frames decoded at once; spectra of context on each side for finding phases


@dataclass(frozen=True, kw_only=True)
class SpectrogramVAEConfig:
    """Shape of the VAE.

    Attributes:
        kind: which VAE this is.
        width: channels of encoder and decoder.
        encoder_blocks, decoder_blocks: numbers of blocks.
        latent_channels: channels of the latent.
        iterations: of Griffin-Lim.
    """

    kind: Literal["spectrogram"]
    width: int = 320
    encoder_blocks: int = 3
    decoder_blocks: int = 6
    latent_channels: int = 64
    iterations: int = 16

    def __post_init__(self) -> None:
        for name in ("width", "encoder_blocks", "decoder_blocks", "latent_channels", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def audio_channels(self) -> int:
        """Stereo."""
        return 2

    @property
    def hop(self) -> int:
        """Samples per latent frame."""
        return PAIR * HOP_SAMPLES


class SpectralFeatures(NamedTuple):
    """The features of stereo sound that are compressed.

    Attributes:
        levels: (B, 320, 2 F) natural logarithms of magnitudes (root mean square of both channels) plus `FLOOR`.
        stereo: (B, 3, 32, F) Stokes parameters relative to the power of both channels: how much more is left than
            right, and the real and imaginary part of their correlation. (0, 1, 0) is mono, (0, 0, 0) incoherent.
    """

    levels: Tensor
    stereo: Tensor


class FeatureTransform(nn.Module):
    """Stereo sound to features, and features to the magnitudes of two incoherent components and back to stereo."""

    window: Tensor
    bands: Tensor
    spread: Tensor
    stereo_bands: Tensor
    stereo_spread: Tensor
    least: Tensor

    def __init__(self) -> None:
        super().__init__()
        bands, centres = _log_bands()
        pooled, stereo_centres = _stereo_bands()
        self.scale = 2 / (WINDOW_SAMPLES / 2)  # of spectra by the window's sum: a full-scale sine has magnitude 1
        tables = {
            "window": 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW_SAMPLES) / WINDOW_SAMPLES),
            "bands": bands,
            "spread": _between(centres, np.arange(_SINGLE, _BINS)),
            "stereo_bands": pooled,
            "stereo_spread": _between(stereo_centres, np.arange(_BINS)),
            "least": pooled.sum(1) * 4 * (FLOOR / self.scale) ** 2,  # power at which any sound counts as incoherent
        }
        for name, table in tables.items():
            self.register_buffer(name, torch.from_numpy(table).float(), persistent=False)

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def features(self, audio: Tensor) -> SpectralFeatures:
        """Compute the features of (B, 2, F * 1024) audio, in float32."""
        spectra = self.spectra(audio)
        power = spectra.real.square() + spectra.imag.square()
        left, right = spectra.unbind(1)
        cross = left * right.conj()
        stokes = torch.stack((power.sum(1), power[:, 0] - power[:, 1], 2 * cross.real, 2 * cross.imag), 1)
        pooled = stokes.unflatten(2, (-1, PAIR)).sum(3) @ self.stereo_bands.T  # B, 4, F, bands
        stereo = pooled[:, 1:] / (pooled[:, :1] + self.least)
        return SpectralFeatures(self.levels(spectra), stereo.transpose(2, 3))

    def levels(self, spectra: Tensor) -> Tensor:
        """Levels (B, 320, 2F) of spectra (B, 2, 2F, bins)."""
        mean = (spectra.real.square() + spectra.imag.square()).mean(1) * self.scale**2
        high = mean @ self.bands.T
        return (torch.cat((mean[..., :_SINGLE], high), -1).sqrt() + FLOOR).log().transpose(1, 2)

    def spectra(self, audio: Tensor) -> Tensor:
        """Spectra (B, 2, 2F, bins) of (B, 2, F * 1024) audio, with silence around it."""
        frames = F.pad(audio.float(), (_PADDING, _PADDING)).unfold(-1, WINDOW_SAMPLES, HOP_SAMPLES)
        return torch.fft.rfft(frames * self.window)

    def components(self, features: SpectralFeatures) -> tuple[Tensor, Tensor]:
        """Split features into two incoherent components.

        Returns their magnitudes (B, 2, 2F, bins) and the (B, 2, 2, 2F, bins) complex weights with which they add up to
        left and right: `sum over component of weights[:, channel, component] * spectrum`. They are the principal
        components of the channels' covariance, so mono sound has only one.
        """
        levels = features.levels.transpose(1, 2)
        low, high = levels.split((_SINGLE, _BANDS), -1)
        magnitude = torch.cat((low, high @ self.spread.T), -1).exp() - FLOOR
        magnitude = torch.where(magnitude > _SILENT, magnitude, 0.0) / self.scale
        power = (2 * magnitude.square()).unflatten(1, (-1, PAIR)).sum(2) @ self.stereo_bands.T  # B, F, bands
        # Loud bands leak into quiet ones and not the other way round; undo what `features` took from quiet bands.
        weighted = features.stereo.transpose(2, 3) * (power + self.least.minimum(3 * power))[:, None]
        spread = (power @ self.stereo_spread.T).clamp_min(1e-12)[:, None]
        stokes = ((weighted @ self.stereo_spread.T) / spread).repeat_interleave(PAIR, 2)
        coherence = stokes.square().sum(1).sqrt()
        stokes = stokes / coherence.clamp_min(1e-4)[:, None]
        coherence = coherence.clamp_max(1)
        powers = torch.stack((1 + coherence, 1 - coherence), 1)
        left = ((1 + stokes[:, 0]) / 2).clamp_min(0).sqrt()
        right = torch.polar(((1 - stokes[:, 0]) / 2).clamp_min(0).sqrt(), -torch.atan2(stokes[:, 2], stokes[:, 1]))
        weights = torch.stack((torch.stack((left + 0j, -right.conj()), 1), torch.stack((right, left + 0j), 1)), 1)
        return magnitude[:, None] * powers.sqrt(), weights


class ConvNeXtBlock(nn.Module):
    """ConvNeXt block (Liu et al. 2022): depthwise convolution over 7 frames, layer norm, two linear layers."""

    def __init__(self, width: int):
        super().__init__()
        self.mix = nn.Conv1d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, F) -> (B, width, F)."""
        hidden = self.norm(self.mix(x).transpose(1, 2))
        return x + self.down(F.gelu(self.up(hidden), approximate="tanh")).transpose(1, 2)


class SpectrogramEncoder(nn.Module):
    """Normalised features (B, C, F) -> (B, 2 latent_channels, F): mean and scale.

    Attributes:
        level_mean, level_std: (320, 1), by which levels are normalised.
    """

    level_mean: Tensor
    level_std: Tensor

    def __init__(self, config: SpectrogramVAEConfig):
        super().__init__()
        self.register_buffer("level_mean", torch.full((_LEVELS, 1), -6.0))
        self.register_buffer("level_std", torch.full((_LEVELS, 1), 2.0))
        self.enter = nn.Conv1d(_PACKED, config.width, 3, padding=1)
        self.blocks = nn.Sequential(*(ConvNeXtBlock(config.width) for _ in range(config.encoder_blocks)))
        self.norm = nn.LayerNorm(config.width)
        self.project = nn.Linear(config.width, 2 * config.latent_channels)
        # At first the noise must not drown the mean: std = softplus(-2) = 0.13.
        with torch.no_grad():
            self.project.weight[config.latent_channels :] *= 0.1
            self.project.bias[config.latent_channels :] = -2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.norm(self.blocks(self.enter(x)).transpose(1, 2))).transpose(1, 2)

    def pack(self, features: SpectralFeatures) -> Tensor:
        """Normalise both spectra of each frame and its stereo parameters, and stack them as (B, C, F)."""
        levels = ((features.levels - self.level_mean) / self.level_std).unflatten(2, (-1, PAIR))
        return torch.cat((levels.permute(0, 3, 1, 2).flatten(1, 2), 2 * features.stereo.flatten(1, 2)), 1)

    def unpack(self, packed: Tensor) -> SpectralFeatures:
        """Invert `pack`."""
        levels, stereo = packed.float().split((PAIR * _LEVELS, 3 * _STEREO), 1)
        levels = levels.unflatten(1, (PAIR, _LEVELS)).permute(0, 2, 3, 1).flatten(2)
        return SpectralFeatures(levels * self.level_std + self.level_mean, stereo.unflatten(1, (3, _STEREO)) / 2)


class SpectrogramDecoder(nn.Module):
    """(B, latent_channels, F) -> normalised features (B, C, F)."""

    def __init__(self, config: SpectrogramVAEConfig):
        super().__init__()
        self.enter = nn.Conv1d(config.latent_channels, config.width, 7, padding=3)
        self.blocks = nn.Sequential(*(ConvNeXtBlock(config.width) for _ in range(config.decoder_blocks)))
        self.norm = nn.LayerNorm(config.width)
        self.project = nn.Linear(config.width, _PACKED)

    def forward(self, z: Tensor) -> Tensor:
        return self.project(self.norm(self.blocks(self.enter(z)).transpose(1, 2))).transpose(1, 2)


class SpectrogramVAE(VAE):
    """The VAE; its training compares features, as `SpectrogramEncoder.pack` normalises them."""

    config: SpectrogramVAEConfig
    encoder: SpectrogramEncoder
    float32 = True  # logarithms of magnitudes need the digits, and the networks are small

    def __init__(self, config: SpectrogramVAEConfig):
        super().__init__()
        self.config = config
        self.transform = FeatureTransform()
        self.encoder, self.decoder = SpectrogramEncoder(config), SpectrogramDecoder(config)

    def forward(self, audio: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        posterior = self.encode(audio)
        return self.decoder(posterior.mean + posterior.std * noise), posterior.mean, posterior.std

    def target(self, audio: Tensor) -> Tensor:
        return self.encoder.pack(self.transform.features(audio))

    @torch.no_grad()
    def calibrate(self, audio: Tensor) -> None:
        """Set the normalisation of levels to the statistics of (B, 2, T) audio; call it before training."""
        levels = self.transform.features(audio).levels.transpose(0, 1).flatten(1)
        self.encoder.level_mean.copy_(levels.mean(1, keepdim=True))
        self.encoder.level_std.copy_(levels.std(1, keepdim=True).clamp_min(0.3))

    def decode_features(self, latents: Tensor) -> SpectralFeatures:
        """Decode (B, latent_channels, F) latents to the features of F frames.

        Raises:
            ValueError: they have another shape.
        """
        self.check_latents(latents)
        return self.encoder.unpack(self.decoder(latents.to(self.decoder.project.weight.dtype)))

    @property
    def encoder_halo(self) -> int:
        return 1 + 1 + 3 * self.config.encoder_blocks  # of the window, the first convolution and the blocks'

    @property
    def decoder_halo(self) -> int:
        """Latent frames on each side that a frame's features depend on."""
        return 3 + 3 * self.config.decoder_blocks

    def decode_stream(
        self, latents: Tensor, chunk_frames: int | None = None, frames: int | None = None
    ) -> Iterator[Tensor]:
        """Yield what `decode` returns in successive pieces (B, 2, any), in float32.

        Phases are found in pieces of a fixed length, whatever `chunk_frames` is, each continuing the one before, so
        that the same latents always give the same sound. With `frames`, only the sound of the first so many: levels
        are what they are before the others, and phases as before a few of them.

        Raises:
            ValueError: the shape is not (B, latent_channels, F) with F > 0, or chunks are empty.
        """
        check_chunks(_PIECE if chunk_frames is None else chunk_frames)
        self.check_latents(latents)
        stream, length = SpectrumStream(self.transform, self.config.iterations), latents.shape[2]
        wanted = length if frames is None else min(frames, length)
        followed = min(wanted + _CONTEXT // PAIR, length)
        pieces = stream.sound(lambda first, last: self._features(latents, first, last), len(latents), followed)
        return first_samples(pieces, wanted * self.hop)

    def decode_between(self, latents: Tensor, source: Tensor, first: int, last: int) -> Tensor:
        self.check_latents(latents)
        frames = latents.shape[2]
        # Spectra that see nothing of the frames in between are the source's.
        open_first = PAIR * first - 2 if first else 0
        open_last = PAIR * last + 2 if last < frames else PAIR * frames
        low, high = max(open_first - _CONTEXT, 0) // PAIR, min(-(-(open_last + _CONTEXT) // PAIR), frames)
        spectra = self.transform.spectra(source)[:, :, PAIR * low : PAIR * high]
        stream = SpectrumStream(self.transform, _PATIENCE * self.config.iterations)
        edges = open_first - PAIR * low, PAIR * high - open_last
        features = self._features(latents, low, high)
        levels = _joined(features.levels, self.transform.levels(spectra), *edges)
        sound = source.clone()
        sound[..., low * self.hop : high * self.hop] = stream.between(features._replace(levels=levels), spectra, *edges)
        return sound

    def _features(self, latents: Tensor, first: int, last: int) -> SpectralFeatures:
        """Features of frames first..last, computed with all the context that they depend on."""
        left = max(first - self.decoder_halo, 0)
        features = self.decode_features(latents[:, :, left : last + self.decoder_halo])
        own = slice(PAIR * (first - left), PAIR * (last - left))
        return SpectralFeatures(features.levels[:, :, own], features.stereo[..., first - left : last - left])

    def prepare_for_inference(self) -> SpectrogramVAE:
        """Stop gradients; returns self."""
        return self.eval().requires_grad_(False)

    def _encode(self, audio: Tensor) -> Posterior:
        packed = self.encoder.pack(self.transform.features(audio))
        return Posterior.of(self.encoder(packed.to(self.encoder.project.weight.dtype)))


class SpectrumStream:
    """Synthesis of sound from features piece by piece; holds the last spectra and the samples not yet complete.

    Args:
        transform: the transform of the features.
        iterations: of Griffin-Lim.
    """

    def __init__(self, transform: FeatureTransform, iterations: int):
        self.transform = transform
        self.window = transform.window.float()
        self.phases = GriffinLim(self.window, HOP_SAMPLES, iterations)

    def sound(self, features: Callable[[int, int], SpectralFeatures], batch: int, frames: int) -> Iterator[Tensor]:
        """Yield the sound of `frames` latent frames in successive pieces (batch, 2, any).

        `features(first, last)` returns those of frames first..last.
        """
        phase = self._random_phase(batch)
        fixed: Tensor | None = None  # the last spectra (batch * component, _CONTEXT, bins) of the piece before
        rest: Tensor | None = None  # its last samples (batch, 2, 3 hops), which the next spectra add to
        for start in range(0, frames, _PIECE):
            stop = min(start + _PIECE, frames)
            first = start - _CONTEXT // PAIR if start else 0
            magnitude, weights = self.transform.components(features(first, min(stop + _CONTEXT // PAIR, frames)))
            spectrum = self._spectrum(magnitude.flatten(0, 1), phase, fixed)
            own = slice(PAIR * (start - first), PAIR * (stop - first))
            fixed = spectrum[:, : own.stop][:, -_CONTEXT:]
            phase = fixed[:, -1].angle()
            both = (weights * spectrum.unflatten(0, (batch, 2))[:, None]).sum(2)[:, :, own]
            piece, rest = self._samples(both, rest, stop == frames)
            yield piece

    def between(self, features: SpectralFeatures, spectra: Tensor, before: int, after: int) -> Tensor:
        """Sound (batch, 2, T) of features whose first `before` and last `after` frames have these `spectra`.

        They are (batch, 2, frames, bins), as many as the features are of.
        """
        magnitude, weights = self.transform.components(features)
        magnitude, batch = magnitude.flatten(0, 1), len(spectra)
        # The weights are unitary in each bin: their adjoint gives the components of left and right.
        known = (weights.conj() * spectra[:, :, None]).sum(1).flatten(0, 1)
        left, right = known[:, :before], known[:, known.shape[1] - after :]
        start = left[:, -1].angle() if before else self._random_phase(batch)
        phase = torch.cat((left.angle(), advance(magnitude[:, before:], start, HOP_SAMPLES)), 1)
        spectrum = self.phases(magnitude, phase, left if before else None, right)
        both = (weights * spectrum.unflatten(0, (batch, 2))[:, None]).sum(2)
        return self._samples(both, None, True)[0]

    def _random_phase(self, batch: int) -> Tensor:
        """Phases (batch * component, bins) to begin with, the same in each item."""
        random = torch.rand(2, _BINS, generator=torch.Generator().manual_seed(0)) * (2 * math.pi)
        return random.to(self.window.device).repeat(batch, 1)

    def _spectrum(self, magnitude: Tensor, before: Tensor, fixed: Tensor | None) -> Tensor:
        """Find spectra (N, frames, bins) of these magnitudes, the first of which may be fixed already."""
        if fixed is None:
            return self.phases(magnitude, advance(magnitude, before, HOP_SAMPLES))
        known = fixed.shape[1]
        phase = torch.cat((fixed.angle(), advance(magnitude[:, known:], before, HOP_SAMPLES)), 1)
        return self.phases(magnitude, phase, fixed)

    def _samples(self, spectra: Tensor, rest: Tensor | None, last: bool) -> tuple[Tensor, Tensor]:
        """Overlap-add spectra (B, 2, frames, bins) to the last `rest`; returns complete samples and the new rest."""
        audio = self.phases.synthesise(spectra.flatten(0, 1)).unflatten(0, spectra.shape[:2])
        overlap = 3 * HOP_SAMPLES
        rising = 1.5 / self._overlaps()  # at both ends fewer windows overlap
        if rest is None:
            audio[..., :overlap] *= rising
        else:
            audio[..., :overlap] += rest
        begin = _PADDING if rest is None else 0
        if last:
            audio[..., -overlap:] *= rising.flip(0)
            return audio[..., begin:-_PADDING], audio[..., :0]
        return audio[..., begin:-overlap], audio[..., -overlap:]

    def _overlaps(self) -> Tensor:
        """Sum of the squared windows over the first three hops."""
        squared = self.window.square().unflatten(0, (4, HOP_SAMPLES)).cumsum(0)[:3].flatten()
        return squared.clamp_min(1e-3)


def _joined(levels: Tensor, true: Tensor, before: int, after: int) -> Tensor:
    """Levels (B, 320, F) that join those of known sound: the first `before` and the last `after` of the `true` ones."""
    joined = _continued(levels, true, before)
    return _continued(joined.flip(-1), true.flip(-1), after).flip(-1)


def _continued(levels: Tensor, true: Tensor, known: int) -> Tensor:
    """Levels (B, 320, F) that go on from the first `known` of the `true` ones.

    What a decoder gets wrong it gets wrong for a while, so its latest errors are taken off what follows, less with
    distance; and the first levels that follow go over from the latest true ones.
    """
    if not known:
        return levels
    past, away = true[..., :known], torch.arange(levels.shape[2] - known, device=levels.device)
    weights = (torch.arange(1 - known, 1, device=levels.device) / _LATEST).exp()
    latest = past @ weights[:, None] / weights.sum()
    error = latest - levels[..., :known] @ weights[:, None] / weights.sum()
    after = levels[..., known:] + error * (-away / _ERRORS_LAST).exp()
    return torch.cat((past, torch.lerp(after, latest, (1 - (away + 1) / (_GOING_OVER + 1)).clamp_min(0))), -1)


_PACKED = PAIR * _LEVELS + 3 * _STEREO


def level_importance() -> Tensor:
    """(320,) weights of mean 1 of levels: half equal, half the share of an ear's band (ERB) that they cover.

    Bins are equally wide, but the ear tells pitches of the bass, where a semitone is less than a bin, as well as those
    above. Equivalent rectangular bandwidths after Glasberg & Moore (1990).
    """
    edges = np.geomspace(_SINGLE, _BINS - 1, _BANDS + 2)
    centres = np.concatenate((np.arange(_SINGLE), edges[1:-1])) * (22050 / (_BINS - 1))
    widths = np.concatenate((np.ones(_SINGLE), (edges[2:] - edges[:-2]) / 2)) * (22050 / (_BINS - 1))
    covered = widths / (24.7 * (0.00437 * centres + 1))
    return torch.from_numpy(0.5 + 0.5 * covered / covered.mean()).float()


def stereo_pooling() -> Tensor:
    """(32, 320): means of the levels that lie in each band of stereo parameters."""
    levels = np.concatenate((np.arange(_SINGLE), _log_bands()[1]))
    bands, _ = _stereo_bands()
    inside = bands[:, np.round(levels).astype(int)]
    return torch.from_numpy(inside / inside.sum(1, keepdims=True).clip(1)).float()


def _log_bands() -> tuple[np.ndarray, np.ndarray]:
    """(64, bins) triangles on a logarithmic scale above the single bins, each of sum 1, and their centres (64,)."""
    edges = np.geomspace(_SINGLE, _BINS - 1, _BANDS + 2)
    bins = np.arange(_BINS)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bands = np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clip(0)
    return bands / bands.sum(1, keepdims=True), edges[1:-1]


def _stereo_bands() -> tuple[np.ndarray, np.ndarray]:
    """(32, bins) of 0 and 1: bands of equal width on the ERB-rate scale (Glasberg & Moore 1990), and their centres."""
    top = 21.4 * math.log10(1 + 0.00437 * 22050)
    hertz = (10 ** (np.linspace(0, top, _STEREO + 1) / 21.4) - 1) / 0.00437
    edges = np.round(hertz / 22050 * (_BINS - 1)).astype(int)
    for number in range(1, len(edges)):
        edges[number] = max(edges[number], edges[number - 1] + 1)
    edges[-1] = _BINS
    low, high, bins = edges[:-1, None], edges[1:, None], np.arange(_BINS)
    return ((bins >= low) & (bins < high)).astype(float), (edges[:-1] + edges[1:] - 1) / 2


def _between(centres: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """(bins, bands): weights by which values in bands are interpolated linearly."""
    bands = np.arange(len(centres))
    place = np.interp(bins, centres, bands)
    return (1 - np.abs(place[:, None] - bands)).clip(0)
