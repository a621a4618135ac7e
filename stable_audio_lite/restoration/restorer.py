"""Repair of sound by DDRM with a diffusion model of clean spectrograms.

    from stable_audio_lite.restoration.degradations import Inpaint
    from stable_audio_lite.restoration.restorer import Restorer, RestoreSettings

    restorer = Restorer.from_pretrained("restorer")
    restorer.restore_file("old.wav", "new.wav", Inpaint(((1.5, 1.8),)), RestoreSettings(seed=1))

A sound of any length is one spectrogram, which the model denoises in overlapping windows at each step; this takes about
6 MB of memory per second of sound. Channels are repaired one by one with the same noise, so that what they have in
common stays the same. Silence stays silent, and sound far from the level of what models hear in training is brought
near it meanwhile.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stable_audio_lite import bundle
from stable_audio_lite.audio.io import audio_blocks, audio_info, check_writable, resample, write_audio
from stable_audio_lite.audio.spectrogram import Spectrogram
from stable_audio_lite.devices import choose_device, choose_dtype
from stable_audio_lite.diffusion.denoiser import NetworkDenoiser
from stable_audio_lite.diffusion.samplers import Denoiser, ItemNoise, polyexponential_sigmas
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import check_apart
from stable_audio_lite.request import check_number, merge_stretches, milliseconds
from stable_audio_lite.restoration.ddrm import ddrm
from stable_audio_lite.restoration.degradations import Bandwidth, Degradation, Denoise, Inpaint, encode_padded
from stable_audio_lite.restoration.windowed_denoiser import WindowedDenoiser, window_starts
from stable_audio_lite.systems import MAX_STEPS, SpectralConfig, StableAudioConfig, load_system

_OVERLAP = 0.25  # share of a window that its neighbour overlaps at least
_SILENT = 1e-6  # peak, -120 dB
_HIDDEN = 1e-5  # peak of a stretch, relative to full scale at the model's level, that stays as it is
_LEVEL_DB, _NEAR_DB = -20.0, 12.0  # level of sounding parts in training, and how far from it they stay as they are
_OWN_NOISE_DB = 1.0  # by which white noise may seem louder than the sound that holds it


@dataclass(frozen=True, kw_only=True)
class RestoreSettings:
    """Settings of DDRM; the defaults are those of Saito et al. 2022 (arXiv 2211.04124).

    `eta` is the share of fresh noise where the observation says nothing or is noisier, `eta_b` the observation's weight
    where it is cleaner. Without a `seed` one is drawn. `batch` windows are denoised at once; more need more memory.

    Raises:
        UserError: a value is out of range.
    """

    steps: int = 50
    eta: float = 0.8
    eta_b: float = 0.8
    seed: int | None = None
    batch: int = 4

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "eta", "eta_b", "seed"):
            if name != "seed" or self.seed is not None:
                check_number(name, getattr(self, name), whole=not name.startswith("eta"))
        if self.steps < 1 or self.batch < 1:
            raise UserError(f"steps and batch must be at least 1, got {self.steps} and {self.batch}")
        if self.steps > MAX_STEPS:
            raise UserError(f"steps must be at most {MAX_STEPS}, got {self.steps}")
        if not (0 <= self.eta <= 1 and 0 <= self.eta_b <= 1):
            raise UserError(f"eta and eta_b must lie in 0..1, got {self.eta:g} and {self.eta_b:g}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UserError(f"seed must lie in 0..2^63, got {self.seed}")

    def draw_seed(self) -> int:
        """Return the seed, or a random one if it is None."""
        return secrets.randbelow(2**31) if self.seed is None else self.seed


@dataclass(frozen=True)
class Restored:
    """Result of `Restorer.restore_file`: seconds of sound, stored settings, and the gain applied (1 unless clipped)."""

    seconds: float
    settings: dict[str, Any]
    gain: float


class Restorer:
    """A model of clean spectrograms that repairs sound; `from_pretrained` loads a bundle."""

    def __init__(
        self, denoise: Denoiser, config: SpectralConfig, device: torch.device | str = "cpu", name: str | None = None
    ) -> None:
        """Take a denoiser of clean spectrograms, the config of its model, and the model's hash as `name`."""
        self.denoise, self.config, self.device, self.name = denoise, config, torch.device(device), name
        self.spectrogram = Spectrogram(config.spectrogram)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, device: str = "auto", dtype: torch.dtype | str | None = None
    ) -> Restorer:
        """Load a bundle; the arguments are those of `StableAudio.from_pretrained`.

        Raises:
            UserError: there is no such bundle or device, it is not a model of spectrograms or reads text, or a file is
                damaged or doesn't fit its config.
        """
        folder = bundle.resolve(name)
        config = load_system(folder)
        if isinstance(config, StableAudioConfig) or config.clap is not None:
            raise UserError(f"{name}: makes sound from text; to restore, give a model of spectrograms that reads none")
        where = choose_device(device)
        network = bundle.load_module(folder, config.part, config.network).to(where, choose_dtype(dtype, where))
        return cls(NetworkDenoiser(network, config.process), config, where, bundle.model_hash(folder))

    @property
    def sample_rate(self) -> int:
        """Hz of the sound that `restore` takes."""
        return self.config.spectrogram.sample_rate

    @torch.no_grad()
    def restore(
        self,
        audio: Tensor,
        degradation: Degradation,
        settings: RestoreSettings,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Repair (C, T) sound at the model's rate; `progress` is called with (steps done, steps in all).

        Raises:
            UserError: the sound is empty, or the degradation doesn't fit it or the model.
        """
        if not isinstance(audio, Tensor) or audio.ndim != 2 or not audio.is_floating_point():
            raise UserError("the sound must be a tensor (channels, samples) of floating-point numbers")
        self._check_length(audio.shape[1])
        seed, gain = settings.draw_seed(), _gain(audio, self.config.spectrogram.hop)
        degradation = _at_level(degradation, audio, gain)
        segments = self._segments(audio.shape[1], degradation)
        audible = [channel for channel in range(len(audio)) if audio[channel].abs().max() >= _SILENT]
        done, total = 0, len(audible) * len(segments) * settings.steps

        def on_step() -> None:
            nonlocal done
            done += 1
            if progress:
                progress(done, total)

        restored = audio.clone()
        for channel in audible:
            for number, (start, stop, local) in enumerate(segments):
                segment = gain * audio[channel, start:stop].to(self.device)
                found = self._restore_segment(segment, local, settings, seed + number, on_step)
                restored[channel, start:stop] = found.to(restored) / gain
        return restored

    @torch.no_grad()
    def estimate_seconds(
        self, samples: int, channels: int, degradation: Degradation, settings: RestoreSettings
    ) -> float:
        """Estimate how long it takes to restore so much sound at the model's rate, by denoising some windows.

        Raises:
            UserError: there are no samples, or the degradation fits neither them nor the model.
        """
        self._check_length(samples)
        segments, frames = self._segments(samples, degradation), self.config.spectrogram.frames
        degradation.observe(self.spectrogram, torch.full((self.config.spectrogram.hop,), 0.1), frames)
        overlap = max(1, round(_OVERLAP * frames))
        lengths = [max(self.spectrogram.frames_of(stop - start), frames) for start, stop, _ in segments]
        windows = sum(len(window_starts(length, frames, overlap)) for length in lengths)
        x = torch.zeros(min(settings.batch, windows), *self.config.spectrogram.shape, device=self.device)
        for _ in range(2):  # the first one warms up
            started = time.perf_counter()
            self.denoise(x, x.new_ones(len(x))).cpu()
        return (time.perf_counter() - started) * channels * settings.steps * windows / len(x)

    def _check_length(self, samples: int) -> None:
        if samples < 1:
            raise UserError(f"the sound is too short: it has no samples at the model's {self.sample_rate} Hz")

    def _segments(self, samples: int, degradation: Degradation) -> list[tuple[int, int, Degradation]]:
        """List ranges of samples to work on, each with its own degradation: all, or the surroundings of the gaps."""
        if not isinstance(degradation, Inpaint):
            return [(0, samples, degradation)]
        rate = self.sample_rate
        _check_gaps(degradation, samples / rate)
        segments = degradation.segments(samples / rate, self.config.spectrogram.seconds)
        return [(round(start * rate), round(stop * rate), local) for start, stop, local in segments]

    def _restore_segment(
        self, audio: Tensor, degradation: Degradation, settings: RestoreSettings, seed: int, on_step: Callable[[], None]
    ) -> Tensor:
        """Repair a segment of one channel, (T,)."""
        found = self._sample(audio, degradation, settings, seed, on_step)
        if isinstance(degradation, Inpaint):
            weights = degradation.blend_weights(len(audio), self.sample_rate, self.config.spectrogram.hop).to(found)
            return audio + weights * (found - audio)
        # Spectrograms lack the lowest frequencies, which come from the sound itself.
        held = self.spectrogram.decode(encode_padded(self.spectrogram, audio, min_frames=0))
        return audio + self._sounding(audio) * (found - held[0, : len(audio)])

    def _sounding(self, audio: Tensor) -> Tensor:
        """Weights (T,): 1 near sound, 0 in silence, in between over a hop."""
        config = self.config.spectrogram
        near = F.max_pool1d(audio.abs()[None], config.window + 1, 1, config.window // 2)
        return F.avg_pool1d((near > _HIDDEN).to(audio), config.hop + 1, 1, config.hop // 2, count_include_pad=False)[0]

    def _sample(
        self, audio: Tensor, degradation: Degradation, settings: RestoreSettings, seed: int, on_step: Callable[[], None]
    ) -> Tensor:
        """Sample restored sound (T,), which lacks the lowest frequencies."""
        frames, defaults = self.config.spectrogram.frames, self.config.generation
        observation = degradation.observe(self.spectrogram, audio, frames)
        overlap = max(1, round(_OVERLAP * frames))
        x = ddrm(
            WindowedDenoiser(self.denoise, frames, overlap, settings.batch),
            observation.operator,
            observation.y,
            polyexponential_sigmas(settings.steps, defaults.sigma_min, defaults.sigma_max, defaults.rho),
            sigma_y=observation.sigma_y,
            eta=settings.eta,
            eta_b=settings.eta_b,
            noise=ItemNoise([seed], observation.y.shape[1:], self.device),
            refine=observation.refine,
            on_step=on_step,
        )
        return self.spectrogram.decode(x)[0, : len(audio)]

    def restore_file(
        self,
        path: str | Path,
        output: str | Path,
        degradation: Degradation,
        settings: RestoreSettings,
        progress: Callable[[int, int], None] | None = None,
    ) -> Restored:
        """Repair a file of any rate and channels; write 24-bit WAV or FLAC at its own rate, with the settings inside.

        `Bandwidth` may restore frequencies that the file's rate can't hold: then the rate becomes the model's. Around
        gaps, the file's own samples stay as they are, and so do frequencies that are beyond the model's rate.

        Raises:
            UserError: a file can't be read or written, or the degradation doesn't fit it.
        """
        check_apart([path], [output])
        check_writable(output)
        rate = audio_info(path).sample_rate
        original = np.concatenate(list(audio_blocks(path)), 1)
        if isinstance(degradation, Inpaint):
            _check_gaps(degradation, original.shape[1] / rate)
        settings = dataclasses.replace(settings, seed=settings.draw_seed())
        audio = torch.from_numpy(np.ascontiguousarray(resample(original, rate, self.sample_rate)))
        restored = self.restore(audio, degradation, settings, progress).numpy()
        new_rate = max(rate, self.sample_rate) if isinstance(degradation, Bandwidth) else rate
        samples = round(original.shape[1] * new_rate / rate)
        if not isinstance(degradation, Inpaint):
            restored -= audio.numpy()  # the change; what the model can't hold stays
        result = _with_length(resample(restored, self.sample_rate, new_rate), samples)
        if isinstance(degradation, Inpaint):
            fade = max(1, round(self.config.spectrogram.hop * rate / self.sample_rate))
            weights = degradation.blend_weights(samples, rate, fade).numpy()
            # Clipped, since a peak in a gap is no reason to attenuate the rest.
            result = original + weights * (result.clip(-1, 1) - original)
        else:
            result += _with_length(resample(original, rate, new_rate), samples)
        stored = {"task": degradation.name, "model": self.name, "steps": settings.steps, "eta": settings.eta}
        stored |= {"eta_b": settings.eta_b, "seed": settings.seed, **degradation.settings()}
        return Restored(samples / new_rate, stored, write_audio(output, result, new_rate, stored))


def _check_gaps(degradation: Inpaint, seconds: float) -> None:
    for start, stop in degradation.gaps:
        if stop > seconds + 1e-6:
            raise UserError(
                f"gaps: {start:g}-{stop:g} s reaches beyond the sound, which ends at {milliseconds(seconds)} s"
            )
    if sum(stop - start for start, stop in merge_stretches(degradation.gaps)) > seconds - 1e-6:
        raise UserError("gaps: cover the whole sound, so nothing tells what is missing; leave some of it")


def _gain(audio: Tensor, hop: int) -> float:
    """The factor for (C, T) sound that brings its sounding parts to the level of training, 1 where they are near it."""
    power = F.avg_pool1d(audio[None].double().square(), min(hop, audio.shape[1]))
    if (loudest := float(power.max())) < _SILENT**2:
        return 1.0
    level = 10 * math.log10(float(power[power > 1e-4 * loudest].mean()))
    return 1.0 if abs(level - _LEVEL_DB) <= _NEAR_DB else 10 ** ((_LEVEL_DB - level) / 20)


def _at_level(degradation: Degradation, audio: Tensor, gain: float) -> Degradation:
    """The degradation of the sound times a gain.

    Raises:
        UserError: noise is told to be louder than the sound that it is in.
    """
    if not isinstance(degradation, Denoise) or degradation.noise_db is None:
        return degradation
    level = 10 * math.log10(max(float(audio.double().square().mean(1).max()), 1e-20))
    if level > -120 and degradation.noise_db > level + _OWN_NOISE_DB:
        raise UserError(f"noise_db: the sound has {level:.1f} dB, so its noise has no {degradation.noise_db:g} dB")
    return Denoise(degradation.noise_db + 20 * math.log10(gain))


def _with_length(audio: np.ndarray, samples: int) -> np.ndarray:
    """Trim or pad (C, T) to (C, samples): resampling may miss by one."""
    return np.pad(audio[:, :samples], ((0, 0), (0, max(0, samples - audio.shape[1]))))
