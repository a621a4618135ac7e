"""Ways to make sound from noise and a denoiser: anew, as a variation, within gaps, after what is there, as a loop.

model.generate("flute, folk", edit=Variation(Sound.read("piano.wav"), strength=0.6))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stable_audio_lite.audio.io import audio_info, read_audio, read_metadata, resample
from stable_audio_lite.diffusion.editing import Circular, KnownRegion, resampled, resampled_steps, strength_to_sigma
from stable_audio_lite.diffusion.samplers import Denoiser, ItemNoise, Sampler, polyexponential_sigmas
from stable_audio_lite.errors import UserError
from stable_audio_lite.representation import Representation
from stable_audio_lite.request import check_number, merge_stretches, milliseconds
from stable_audio_lite.systems import GenerationDefaults

CROSSFADE_SECONDS = 0.02
"""Length of the fades between known and generated sound."""

ENDING_FRAMES = 8
"""Frames of silence that a window has at least after a sound that it holds whole."""

_SILENT = 1e-4  # peak, -80 dB
_ROUNDS, _JUMP = 2, 5  # of going back while sampling around known data
_CIRCLE = 16  # frames that a loop goes on for beyond each of its ends, at least
_TAIL = 16  # frames at the end of a window that another one follows, unused: they know nothing of what comes
_SEAM = 4  # frames on each side of a loop's seam whose phases are chosen to fit


@dataclass(frozen=True, eq=False)
class Sound:
    """A stretch of sound to start from.

    Attributes:
        audio: (C, T) float32, one or two channels.
        sample_rate: Hz.
        name: for messages and settings, such as the file's.
        begins: second of the whole piece at which the stretch begins.
        settings: what it was generated with, where that is known.
    """

    audio: Tensor
    sample_rate: int
    name: str = "the sound"
    begins: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path, sample_rate: int = 44100, last_seconds: float = math.inf) -> Sound:
        """Read a file, or at most its last so many seconds.

        Raises:
            UserError: the file is missing, not audio, or damaged.
        """
        info = audio_info(Path(path))
        begins = max(info.frames / info.sample_rate - last_seconds, 0.0)
        audio = read_audio(Path(path), sample_rate, begins)
        return cls(audio, sample_rate, str(path), begins, read_metadata(path).settings)

    @property
    def seconds(self) -> float:
        """Length of the stretch."""
        return self.audio.shape[-1] / self.sample_rate

    @property
    def prompt(self) -> str | None:
        """The prompt that it was generated from, where that is known."""
        prompt = self.settings.get("prompt")
        return prompt if isinstance(prompt, str) and prompt.strip() else None

    def check_audible(self) -> None:
        """Refuse silence.

        Raises:
            UserError: it is silent.
        """
        if self.audio.abs().max() < _SILENT:
            raise UserError(f"{self.name}: is silent; give a sound that can be heard, or generate without one")

    def fitted(self, representation: Representation) -> Tensor:
        """Return the audio (channels, T) at a representation's rate and number of channels.

        Raises:
            UserError: it is silent.
        """
        self.check_audible()
        audio = torch.as_tensor(resample(self.audio.numpy(), self.sample_rate, representation.sample_rate))
        if representation.audio_channels == 1:
            return audio.mean(0, keepdim=True)
        return audio.expand(representation.audio_channels, -1)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Everything that sampling takes, for one batch.

    Attributes:
        solve: the sampler.
        denoiser: of the data.
        noise: of the batch's items.
        steps: noise levels of a whole run.
        defaults: of the model, whose noise levels they are.
        frames: of the data.
        on_step: called after each step.
    """

    solve: Sampler
    denoiser: Denoiser
    noise: ItemNoise
    steps: int
    defaults: GenerationDefaults
    frames: int
    on_step: Callable[[], None]

    def sigmas(self, steps: int | None = None, sigma_max: float | None = None) -> Tensor:
        """Noise levels, by default of a whole run."""
        defaults = self.defaults
        top = defaults.sigma_max if sigma_max is None else sigma_max
        return polyexponential_sigmas(steps or self.steps, min(defaults.sigma_min, top), top, defaults.rho)

    def run(self, denoiser: Denoiser, x: Tensor, sigmas: Tensor) -> Tensor:
        """Sample from x at level sigmas[0]."""
        return self.solve(denoiser, x, sigmas, noise=self.noise, on_step=self.on_step)

    def from_noise(self, denoiser: Denoiser) -> Tensor:
        """Sample from noise alone."""
        sigmas = self.sigmas()
        return self.run(denoiser, self.noise() * sigmas[0], sigmas)

    def around(self, known: Tensor, mask: Tensor) -> Tensor:
        """Sample data that are `known` where the `mask` of frames is True."""
        region, sigmas = KnownRegion(self.denoiser, known, mask), self.sigmas()
        start = region.start(self.noise(), float(sigmas[0]))
        return resampled(
            self.solve, region, start, sigmas, noise=self.noise, rounds=_ROUNDS, jump=_JUMP, on_step=self.on_step
        )


@dataclass(frozen=True)
class Edit:
    """A way to make sound; this one makes it anew."""

    def seconds(self, representation: Representation, wanted: float | None) -> float | None:
        """Length of the sound, where `wanted` was asked for; None is the model's window.

        Raises:
            UserError: it doesn't go with what is there.
        """
        return wanted

    def steps(self, steps: int) -> int:
        """Sampling steps that it takes, for `steps` noise levels."""
        return steps

    def frames(self, representation: Representation, samples: int, windows: Sequence[int]) -> int:
        """Frames to sample for a sound: the shortest of the network's windows that holds it, and its end."""
        return _fitting(math.ceil(samples / representation.hop) + ENDING_FRAMES, windows, representation)

    def sample(self, representation: Representation, sampling: Sampling) -> Tensor:
        """Sample data (B, *shape) of `sampling.frames` frames."""
        return sampling.from_noise(sampling.denoiser)

    def decode(self, representation: Representation, x: Tensor, samples: int) -> Tensor:
        """Decode data (B, *shape) to sound (B, channels, samples), float32."""
        return representation.decode(x, samples)

    def decode_stream(self, representation: Representation, x: Tensor, samples: int) -> Iterator[Tensor]:
        """Yield what `decode` returns in successive pieces (B, channels, any)."""
        if type(self).decode is Edit.decode:
            yield from representation.decode_stream(x, samples)
        else:
            yield self.decode(representation, x, samples)

    def timing(self, seconds: float) -> tuple[float, float]:
        """Second of the piece at which the sound begins, and length of the piece, where nothing else is said."""
        return 0.0, seconds

    @property
    def prompt(self) -> str | None:
        """The prompt to use where none is given."""
        return None

    @property
    def settings(self) -> dict[str, Any]:
        """Description of it in the settings of a sound."""
        return {}


@dataclass(frozen=True)
class _FromSound(Edit):
    """An edit of a sound, which is as long as that."""

    source: Sound

    @property
    def prompt(self) -> str | None:
        return self.source.prompt

    def seconds(self, representation: Representation, wanted: float | None) -> float:
        length, window = self.source.seconds, representation.window_seconds
        if length < (frame := representation.hop / representation.sample_rate):
            raise UserError(f"{self.source.name}: too short to be made over; give {frame:.3f} s or more")
        self.source.check_audible()
        lasts = f"{self.source.name}: lasts {milliseconds(length):.3f} s"
        if wanted is not None and wanted > length + 0.5 / self.source.sample_rate:
            raise UserError(f"{lasts}; give at most that as seconds, or continue it instead")
        if wanted is None and length > window:
            raise UserError(
                f"{lasts}, longer than the window of this model; give seconds up to {milliseconds(window)} to use its "
                "beginning"
            )
        return min(length if wanted is None else wanted, window)

    def _known(self, representation: Representation, sampling: Sampling) -> Tensor:
        """Encode the sound, and silence after it, to data (1, *shape) of all frames."""
        frames = sampling.frames
        audio = self.source.fitted(representation)[:, : frames * representation.hop]
        padded = torch.nn.functional.pad(audio, (0, frames * representation.hop - audio.shape[1]))
        return representation.encode(padded[None].to(sampling.noise.device))[..., :frames].float()


@dataclass(frozen=True)
class Variation(_FromSound):
    """A sound made over from a noisy version of it (SDEdit, Meng et al. 2022, arXiv 2108.01073).

    Attributes:
        source: the sound.
        strength: 0 gives it back as the representation renders it, 1 ignores it.
    """

    strength: float = 0.6

    def __post_init__(self) -> None:
        check_number("strength", self.strength)
        if not 0 <= self.strength <= 1:
            raise UserError(f"strength must lie in 0..1, got {self.strength}")

    def steps(self, steps: int) -> int:
        return math.ceil(steps * self.strength)

    def sample(self, representation: Representation, sampling: Sampling) -> Tensor:
        if self.strength == 1:
            return sampling.from_noise(sampling.denoiser)
        known = self._known(representation, sampling)
        if self.strength == 0:
            return known.expand(len(sampling.noise.generators), *known.shape[1:])
        steps = self.steps(sampling.steps)
        sigma = strength_to_sigma(self.strength, sampling.defaults.sigma_min, sampling.defaults.sigma_max)
        return sampling.run(sampling.denoiser, known + sigma * sampling.noise(), sampling.sigmas(steps, sigma))

    @property
    def settings(self) -> dict[str, Any]:
        return {"init": self.source.name, "strength": self.strength}


@dataclass(frozen=True)
class Inpainting(_FromSound):
    """A sound of which stretches are made anew; the rest stays, but for a fade of 20 ms beside each.

    Attributes:
        source: the sound.
        gaps: the first and last second of each stretch; those that overlap or touch are one.
    """

    gaps: Sequence[tuple[float, float]] = ()

    def seconds(self, representation: Representation, wanted: float | None) -> float:
        seconds, name = super().seconds(representation, wanted), self.source.name
        if not self.gaps:
            raise UserError(f"{name}: say which stretch to make anew, such as 1.5-2.5")
        for first, last in self.gaps:
            if not 0 <= first < last or last > seconds + 0.5 / self.source.sample_rate:
                within = f"stretches lie in order within 0-{milliseconds(seconds):.3f} s"
                raise UserError(f"{name}: can't inpaint {first:g}-{last:g}; {within}")
        frames = math.ceil(seconds * representation.sample_rate / representation.hop)
        kept = seconds - sum(last - first for first, last in self._merged)
        frame = representation.hop / representation.sample_rate
        if kept < 0.99 * frame or not self._mask(representation, frames)[:frames].any():
            raise UserError(
                f"{name}: nothing of it would stay; leave {frame:.2f} s or "
                "more outside of the stretches, or generate without it"
            )
        return seconds

    def steps(self, steps: int) -> int:
        return steps_around(steps)

    def sample(self, representation: Representation, sampling: Sampling) -> Tensor:
        known = self._known(representation, sampling)
        mask = self._mask(representation, sampling.frames).to(known.device)
        return sampling.around(known.expand(len(sampling.noise.generators), *known.shape[1:]), mask)

    def decode(self, representation: Representation, x: Tensor, samples: int) -> Tensor:
        hop, frames = representation.hop, math.ceil(samples / representation.hop)
        source = self.source.fitted(representation)[None, :, :samples]
        sound = torch.nn.functional.pad(source, (0, frames * hop - source.shape[2])).to(x.device)
        sound = sound.repeat(len(x), 1, 1)
        for gap, (first, last) in zip(self._open_frames(representation), self._merged, strict=True):
            made = representation.decode_between(x, sound, gap[0], min(gap[1], frames))
            edges = [round(second * representation.sample_rate) for second in (first, last)]
            fade = int(CROSSFADE_SECONDS * representation.sample_rate)
            shares = _window(sound.shape[2], edges[0], edges[1], fade).to(sound)
            # Turned down where it exceeds full scale, which is no reason to attenuate the rest.
            peaks = (made * (shares > 0)).abs().amax((1, 2), keepdim=True)
            sound = torch.lerp(sound, made / peaks.clamp(min=1), shares)
        return sound[..., :samples].float()

    @property
    def settings(self) -> dict[str, Any]:
        return {"init": self.source.name, "inpaint": " ".join(f"{a:g}-{b:g}" for a, b in self._merged)}

    @property
    def _merged(self) -> list[tuple[float, float]]:
        return merge_stretches(self.gaps)

    def _open_frames(self, representation: Representation) -> list[tuple[int, int]]:
        """The first and last frame of each stretch, in order: those nearest to its ends."""
        rate = representation.sample_rate / representation.hop
        firsts = [(round(first * rate), last * rate) for first, last in self._merged]
        return [(first, max(round(last), first + 1)) for first, last in firsts]

    def _mask(self, representation: Representation, frames: int) -> Tensor:
        """(frames,): True where data are known."""
        mask = torch.ones(frames, dtype=torch.bool)
        for first, last in self._open_frames(representation):
            mask[first:last] = False
        return mask


@dataclass(frozen=True, eq=False)
class After(Edit):
    """Sound that goes on where known sound ends; for windows of `StableAudio.extend`.

    Attributes:
        audio: (B, channels, T), its last T samples, whole frames.
        data: (B, *shape) of T / hop frames, what they are in the representation.
    """

    audio: Tensor
    data: Tensor

    def steps(self, steps: int) -> int:
        return steps_around(steps)

    def sample(self, representation: Representation, sampling: Sampling) -> Tensor:
        known = self.data.shape[-1]
        padded = torch.nn.functional.pad(self.data, (0, sampling.frames - known))
        return sampling.around(padded, torch.arange(sampling.frames, device=padded.device) < known)

    def decode(self, representation: Representation, x: Tensor, samples: int) -> Tensor:
        """Decode data to the sound (B, channels, samples) that follows."""
        hop, known = representation.hop, self.data.shape[-1]
        source = torch.nn.functional.pad(self.audio, (0, (x.shape[-1] - known) * hop))
        made = representation.decode_between(x, source.to(x.device), known, x.shape[-1]).float()
        begin = known * hop
        sound = made[..., begin : begin + samples].clone()
        # The last known sample and the first one that follows it were not found together.
        step = self.audio[..., -1:].to(made) - made[..., begin - 1 : begin]
        fade = int(CROSSFADE_SECONDS * representation.sample_rate)
        ramp = torch.linspace(1, 0, fade, device=made.device)[: sound.shape[-1]]
        sound[..., :fade] += step * ramp
        return sound


@dataclass(frozen=True)
class Loop(Edit):
    """A sound whose end meets its beginning.

    Attributes:
        bars: its length, at `bpm`; None: as long as asked for, which is a number of bars where there is a tempo.
        bpm: beats per minute; None: it has no tempo that is known.
        beats: beats of a bar.
    """

    bars: int | None = None
    bpm: float | None = None
    beats: int = 4

    def __post_init__(self) -> None:
        for name, value in (("bars", self.bars), ("bpm", self.bpm), ("beats", self.beats)):
            if value is not None:
                check_number(name, value, whole=name != "bpm")
        if self.bars is not None and self.bars < 1:
            raise UserError(f"bars must be at least 1, got {self.bars}")
        if self.bpm is not None and not 20 <= self.bpm <= 400:
            raise UserError(f"bpm must lie in 20..400, got {self.bpm:g}")
        if self.bars is not None and self.bpm is None:
            raise UserError("a loop of so many bars needs a tempo; say one in the prompt ('120 bpm'), or give bpm")

    def seconds(self, representation: Representation, wanted: float | None) -> float:
        rate, hop = representation.sample_rate, representation.hop
        longest = milliseconds((representation.shape[-1] - 2 * _CIRCLE) * hop / rate)
        if self.bpm is None:
            seconds = longest if wanted is None else wanted
        else:
            bar = 60 * self.beats / self.bpm
            most = int(longest / bar)
            if wanted is not None and not 0 < wanted < math.inf:
                raise UserError(f"seconds must lie above 0 and be finite, got {wanted}")
            if wanted is not None and self.bars is None:
                bars = round(wanted / bar)
                if bars < 1 or abs(wanted - bars * bar) > 0.5 / rate:
                    near = " or ".join(f"{n * bar:.6g}" for n in (int(wanted / bar), int(wanted / bar) + 1) if n)
                    raise UserError(
                        f"{wanted:g} s are no whole number of bars of {bar:.6g} s at {self.bpm:g} bpm; give seconds "
                        f"as {near}"
                    )
            else:
                bars = most if self.bars is None else self.bars
            seconds = bars * bar
            if wanted is not None and abs(wanted - seconds) > 0.5 / rate:
                raise UserError(
                    f"{bars} bars at {self.bpm:g} bpm last {seconds:.6g} s, not {wanted:g}; give one of them"
                )
            if not 0 < seconds <= longest:
                fits = (
                    f"give at most {most} bars" if most else f"give {math.ceil(60 * self.beats / longest)} bpm or more"
                )
                raise UserError(f"a loop of this model lasts at most {longest} s, not {seconds or bar:.6g}; {fits}")
        if not hop / rate <= seconds <= longest:
            raise UserError(f"a loop of this model lasts {hop / rate:.2f} to {longest} s, got {seconds:g}")
        return seconds

    def timing(self, seconds: float) -> tuple[float, float]:
        return seconds, 3 * seconds  # the middle of something longer, neither beginning nor end

    def frames(self, representation: Representation, samples: int, windows: Sequence[int]) -> int:
        return max(round(samples / representation.hop), 1)

    def sample(self, representation: Representation, sampling: Sampling) -> Tensor:
        frames = sampling.frames
        around = _fitting(frames + 2 * _CIRCLE, sampling.defaults.windows, representation) - frames
        return sampling.from_noise(Circular(sampling.denoiser, around // 2, around - around // 2))

    def decode(self, representation: Representation, x: Tensor, samples: int) -> Tensor:
        hop, frames = representation.hop, x.shape[-1]
        length, turns = frames * hop, 2 * math.ceil(_SEAM * 4 / frames) + 1
        several = representation.decode(_repeated(x, turns), turns * length)
        once = several[..., turns // 2 * length :][..., :length]
        # Phases drift on the way round: those at the seam are chosen anew, to fit on both sides.
        seam = min(_SEAM, frames // 4)
        twice = representation.decode_between(_repeated(x, 2), _repeated(once, 2), frames - seam, frames + seam)
        middle = frames // 2 * hop
        return _stretched(twice[..., middle:][..., :length].roll(middle, -1).float(), samples)

    @property
    def settings(self) -> dict[str, Any]:
        return {"loop": True, "bars": self.bars, "bpm": self.bpm, "beats": self.bpm and self.beats}


def _fitting(frames: int, windows: Sequence[int], representation: Representation) -> int:
    """Shortest window that holds so many frames, or the longest there is."""
    return min((w for w in windows if frames <= w < representation.shape[-1]), default=representation.shape[-1])


def steps_around(steps: int) -> int:
    """Sampling steps that `steps` noise levels take around known data."""
    return resampled_steps(steps, _ROUNDS, _JUMP)


def plan_windows(samples: int, hop: int, window: int, known: int) -> list[tuple[int, int]]:
    """Split sound that is longer than a model's window into windows.

    Args:
        samples: of the sound to make.
        hop: samples per frame.
        window: frames of the model's window.
        known: frames that are there before the first window; later ones keep half a window.

    Returns:
        Known frames and samples to make of each window. All but the last leave some frames at their ends unused.
    """
    windows = []
    while samples > 0:
        known = min(known, window // 2)
        made = min(samples, (window - known) * hop)
        if made < samples:
            made = (window - known - min(_TAIL, window // 8)) * hop
        windows.append((known, made))
        samples, known = samples - made, known + made // hop
    return windows


def _window(length: int, first: int, last: int, fade: int) -> Tensor:
    """Weights (length,): 1 from sample `first` to `last`, falling to 0 within `fade` samples beside."""
    place = torch.arange(length, dtype=torch.float32)
    return torch.minimum(place - (first - fade), (last - 1 + fade) - place).div(fade).clamp(0, 1)


def _repeated(x: Tensor, times: int) -> Tensor:
    """Repeat (..., T) along its last axis."""
    return torch.cat([x] * times, -1)


def _stretched(audio: Tensor, samples: int) -> Tensor:
    """Resample one period (..., T) to another number of samples, by its Fourier series."""
    if audio.shape[-1] == samples:
        return audio
    series = torch.fft.rfft(audio.double())
    wanted = torch.zeros(*series.shape[:-1], samples // 2 + 1, dtype=series.dtype, device=series.device)
    count = min(series.shape[-1], wanted.shape[-1]) - 1  # without the Nyquist rate of the shorter
    wanted[..., :count] = series[..., :count]
    return (torch.fft.irfft(wanted, samples) * (samples / audio.shape[-1])).float()
