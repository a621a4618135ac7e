"""Repairs sound with a diffusion model of clean spectrograms, by DDRM.

    restorer = Restorer.from_pretrained("runs/complex_stft/bundle")
    restorer.restore_file("old.wav", "new.wav", Inpaint(((1.5, 1.8),)), seed=1)

A sound of any length is one spectrogram, which the model denoises by overlapping windows at each step; it takes about
6 MB of memory a second. Channels are repaired one by one with the same noise, so what is alike in them stays alike.
"""

from __future__ import annotations

import secrets
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
from stable_audio_lite.restoration.ddrm import ddrm
from stable_audio_lite.restoration.degradations import Bandwidth, Inpaint, Task
from stable_audio_lite.restoration.windows import WindowedDenoiser
from stable_audio_lite.systems import SpectralConfig, StableAudioConfig, load_system

_OVERLAP = 0.25  # of a window that its neighbour shares at least


@dataclass(frozen=True, kw_only=True)
class RestoreSettings:
    """How DDRM samples; the defaults are those of Saito et al. 2022 (arXiv 2211.04124).

    Attributes:
        steps: sampling steps.
        eta: share of fresh noise where the observation says nothing or is the noisier.
        eta_b: weight of the observation where it is the cleaner.
        seed: of the noise; None draws one.
        batch: windows denoised at once; more need more memory.
    """

    steps: int = 50
    eta: float = 0.8
    eta_b: float = 0.8
    seed: int | None = None
    batch: int = 4

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise UserError(f"steps and batch must be at least 1, got {self.steps} and {self.batch}")
        if not (0 <= self.eta <= 1 and 0 <= self.eta_b <= 1):
            raise UserError(f"eta and eta-b must lie in 0..1, got {self.eta:g} and {self.eta_b:g}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UserError(f"seed must lie in 0..2^63, got {self.seed}")


@dataclass(frozen=True)
class Restored:
    """What `Restorer.restore_file` wrote: seconds of sound, settings, and the gain applied (1 unless it clipped)."""

    seconds: float
    settings: dict[str, Any]
    gain: float


class Restorer:
    """A model of clean spectrograms that repairs sound; `from_pretrained` loads a bundle."""

    def __init__(
        self, denoise: Denoiser, config: SpectralConfig, device: torch.device | str = "cpu", name: str | None = None
    ) -> None:
        """Take what estimates clean spectrograms of the model `config`, and the model's hash as its `name`."""
        self.denoise, self.config, self.device, self.name = denoise, config, torch.device(device), name
        self.spectrogram = Spectrogram(config.spectrogram)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, device: str = "auto", dtype: torch.dtype | str | None = None
    ) -> Restorer:
        """Load a bundle; the arguments are those of `StableAudio.from_pretrained`.

        Raises:
            UserError: there is no such bundle or device, it is no model of spectrograms or one that reads text, or a
                file is damaged or doesn't fit its config.
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
        """Hz of what `restore` takes."""
        return self.config.spectrogram.sample_rate

    @torch.no_grad()
    def restore(
        self,
        audio: Tensor,
        task: Task,
        settings: RestoreSettings,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Repair (C, T) sound at the model's rate; `progress` is called with (steps done, steps in all).

        Raises:
            UserError: the task doesn't fit the sound or the model.
        """
        seed = secrets.randbelow(2**31) if settings.seed is None else settings.seed
        rate, window = self.sample_rate, self.config.spectrogram
        parts: list[tuple[int, int, Task]] = [(0, audio.shape[1], task)]
        if isinstance(task, Inpaint):
            _check_gaps(task, audio.shape[1] / rate)
            stretches = task.parts(audio.shape[1] / rate, window.seconds)
            parts = [(round(a * rate), round(b * rate), inner) for a, b, inner in stretches]
        done, total = 0, len(audio) * len(parts) * settings.steps

        def step() -> None:
            nonlocal done
            done += 1
            if progress:
                progress(done, total)

        restored = audio.clone()
        for channel in range(len(audio)):
            for number, (start, stop, inner) in enumerate(parts):
                heard = audio[channel, start:stop].to(self.device)
                found = self._restore(heard, inner, settings, seed + number, step)
                if isinstance(inner, Inpaint):
                    share = inner.share(stop - start, rate, window.hop).to(found)
                    found = heard + share * (found - heard)
                restored[channel, start:stop] = found.to(restored)
        return restored

    def _restore(
        self, audio: Tensor, task: Task, settings: RestoreSettings, seed: int, on_step: Callable[[], None]
    ) -> Tensor:
        """One channel (T,)."""
        shape, defaults = self.config.spectrogram, self.config.generation
        seen = task.observe(self.spectrogram, audio, shape.frames)
        overlap = max(1, round(_OVERLAP * shape.frames))
        x = ddrm(
            WindowedDenoiser(self.denoise, shape.frames, overlap, settings.batch),
            seen.operator,
            seen.y,
            polyexponential_sigmas(settings.steps, defaults.sigma_min, defaults.sigma_max, defaults.rho),
            sigma_y=seen.sigma_y,
            eta=settings.eta,
            eta_b=settings.eta_b,
            noise=ItemNoise([seed], seen.y.shape[1:], self.device),
            refine=seen.refine,
            on_step=on_step,
        )
        # What spectrograms can't hold, the lowest frequency, comes from the sound itself.
        frames = self.spectrogram.frames_of(len(audio))
        whole = F.pad(audio, (0, frames * shape.hop - len(audio)))[None]
        rest = whole - self.spectrogram.decode(self.spectrogram.encode(whole))
        if isinstance(task, Inpaint):
            rest = torch.zeros_like(rest)
        return (self.spectrogram.decode(x)[:, : rest.shape[1]] + rest)[0, : len(audio)]

    def restore_file(
        self,
        path: str | Path,
        output: str | Path,
        task: Task,
        settings: RestoreSettings,
        progress: Callable[[int, int], None] | None = None,
    ) -> Restored:
        """Repair a file of any rate and channels, as 24-bit WAV or FLAC at its own rate, with the settings inside.

        Restored frequencies may lie beyond a file's rate: then the rate becomes the model's. Around gaps, the file's
        own samples stay as they are.

        Raises:
            UserError: the file can't be read or written, or the task doesn't fit it.
        """
        check_writable(output)
        rate = audio_info(path).sample_rate
        given = np.concatenate(list(audio_blocks(path)), 1)
        seed = secrets.randbelow(2**31) if settings.seed is None else settings.seed
        settings = RestoreSettings(**{**vars(settings), "seed": seed})
        if isinstance(task, Inpaint):
            _check_gaps(task, given.shape[1] / rate)
        heard = torch.from_numpy(np.ascontiguousarray(resample(given, rate, self.sample_rate)))
        restored = self.restore(heard, task, settings, progress).numpy()
        new_rate = max(rate, self.sample_rate) if isinstance(task, Bandwidth) else rate
        result = _length(resample(restored, self.sample_rate, new_rate), round(given.shape[1] * new_rate / rate))
        if isinstance(task, Inpaint):
            fade = max(1, round(self.config.spectrogram.hop * rate / self.sample_rate))
            share = task.share(given.shape[1], rate, fade).numpy()
            # Clipped, for a peak in a gap is no reason to attenuate the rest.
            result = given + share * (result.clip(-1, 1) - given)
        about = {"task": task.name, "model": self.name, "steps": settings.steps, "eta": settings.eta}
        about |= {"eta_b": settings.eta_b, "seed": seed, **task.settings()}
        return Restored(result.shape[1] / new_rate, about, write_audio(output, result, new_rate, about))


def _check_gaps(task: Inpaint, seconds: float) -> None:
    for start, stop in task.gaps:
        if stop > seconds + 1e-6:
            raise UserError(f"--gap {start:g}-{stop:g}: the sound ends at {seconds:.2f} s")


def _length(audio: np.ndarray, samples: int) -> np.ndarray:
    """(C, T) -> (C, samples): rounding in resampling may miss by one."""
    return np.pad(audio[:, :samples], ((0, 0), (0, max(0, samples - audio.shape[1]))))
