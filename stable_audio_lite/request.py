"""Checked requests for sound (lengths, guidance, seeds), and the sound that answers them."""

from __future__ import annotations

import math
import numbers
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from stable_audio_lite.audio.io import write_audio
from stable_audio_lite.diffusion.samplers import SAMPLERS
from stable_audio_lite.errors import UserError
from stable_audio_lite.systems import MAX_CFG, MAX_STEPS, GenerationDefaults

PROMPT_SETTINGS = ("seconds_start", "seconds_total", "cfg", "rescale", "negative")
"""Settings that only make sense with a prompt."""


@dataclass(frozen=True)
class Generated:
    """Generated sounds with all their settings.

    Attributes:
        audio: (B, C, T) float32 on the CPU, C = 2 or 1; full scale is 1 and may be exceeded, `save` attenuates then.
        sample_rate: Hz.
        settings: per item, everything needed to make it again: prompt, seed, seconds, steps, model hash, ...
    """

    audio: Tensor
    sample_rate: int
    settings: list[dict[str, Any]]

    @property
    def seconds(self) -> float:
        """Length of each item."""
        return self.audio.shape[-1] / self.sample_rate

    @property
    def seeds(self) -> list[int]:
        """The seed of each item."""
        return [settings["seed"] for settings in self.settings]

    def save(self, path: str | Path, index: int = 0, peak_db: float | None = None) -> float:
        """Write item `index` as WAV or FLAC with its settings inside; returns the gain applied (1 unless it clipped).

        `peak_db` brings the peak to that level, relative to full scale, unless the sound is silent.

        Raises:
            UserError: there is no such item, or as `stable_audio_lite.audio.io.write_audio`.
        """
        check_number("index", index, whole=True)
        if not 0 <= index < len(self.audio):
            raise UserError(f"index must lie in 0..{len(self.audio) - 1}, got {index}")
        audio, settings, gain = self.audio[index], self.settings[index], 1.0
        if peak_db is not None:
            check_number("peak_db", peak_db)
            if not -100 <= peak_db <= 0:
                raise UserError(f"peak_db must lie in -100..0 dB, got {peak_db:g}")
            gain, settings = 10 ** (peak_db / 20) / (float(audio.abs().max()) or 1.0), settings | {"peak_db": peak_db}
        return gain * write_audio(path, gain * audio, self.sample_rate, settings)


@dataclass(frozen=True)
class Extension:
    """Sound that is generated as it is taken, piece by piece.

    Attributes:
        pieces: successive (C, any) float32 on the CPU.
        sample_rate: Hz.
        settings: as `Generated.settings`, of this one item.
    """

    pieces: Iterator[Tensor]
    sample_rate: int
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Request:
    """The checked settings that all items of one call share.

    Attributes:
        seconds: length of the sounds.
        start: second of the described piece at which they begin.
        total: length of the described piece in seconds.
        steps, cfg, rescale, negative, sampler: as `StableAudio.generate` takes them.
    """

    seconds: float
    start: float
    total: float
    steps: int
    cfg: float
    rescale: float
    negative: str | None
    sampler: str


@dataclass(frozen=True)
class Limits:
    """The bounds that a model sets to requests.

    Attributes:
        sample_rate: Hz.
        window: length in seconds of a sound that nothing is said about.
        most: length in seconds of the longest sound.
        longest: length in seconds of the longest piece that the timing embeddings cover; infinite without them.
    """

    sample_rate: int
    window: float
    most: float
    longest: float = math.inf


def make_request(
    defaults: GenerationDefaults,
    limits: Limits,
    *,
    seconds: float | None,
    seconds_start: float | None,
    seconds_total: float | None,
    timing: Callable[[float], tuple[float, float]],
    steps: int | None,
    cfg: float | None,
    rescale: float | None,
    negative: str | None,
    sampler: str | None,
) -> Request:
    """Check settings, a model's `defaults` and the `timing` of a length taking the place of None.

    Raises:
        UserError: a setting is out of range.
    """
    given = {"seconds": seconds, "seconds_start": seconds_start, "seconds_total": seconds_total}
    for name, value in (given | {"steps": steps, "cfg": cfg, "rescale": rescale}).items():
        if value is not None:
            check_number(name, value, whole=name == "steps")
    length = limits.window if seconds is None else float(seconds)
    begins, ends = timing(length)
    if seconds_start is None and seconds_total is None and ends > limits.longest:
        # Later than the timing embeddings know: the last that they do.
        begins, ends = min(begins, max(limits.longest - length, 0.0)), limits.longest
    start = begins if seconds_start is None else float(seconds_start)
    request = Request(
        seconds=length,
        start=start,
        total=start + ends - begins if seconds_total is None else float(seconds_total),
        steps=defaults.steps if steps is None else steps,
        cfg=defaults.cfg if cfg is None else float(cfg),
        rescale=defaults.rescale if rescale is None else float(rescale),
        negative=negative,
        sampler=defaults.sampler if sampler is None else sampler,
    )
    _check(request, limits)
    if request.cfg == 1 and (idle := "negative" if negative is not None else "rescale" if rescale else None):
        raise UserError(f"{idle} changes guidance, and there is none at cfg 1; leave it out, or give a higher cfg")
    return request


def _check(request: Request, limits: Limits) -> None:
    if not 1 <= request.steps <= MAX_STEPS:
        raise UserError(f"steps must be at least 1 and at most {MAX_STEPS}, got {request.steps}")
    if request.sampler not in SAMPLERS:
        raise UserError(f"unknown sampler '{request.sampler}'; choose one of {', '.join(SAMPLERS)}")
    if not (0 <= request.cfg <= MAX_CFG and 0 <= request.rescale <= 1):
        raise UserError(
            f"cfg must lie in 0..{MAX_CFG:g} and rescale in 0..1, got {request.cfg:g} and {request.rescale:g}"
        )
    if not 0.5 / limits.sample_rate < request.seconds <= limits.most:
        most = f" and at most {milliseconds(limits.most)}" if math.isfinite(limits.most) else ""
        raise UserError(f"seconds must lie above 0{most}, got {request.seconds}")
    if not 0 <= request.start <= request.total <= limits.longest:
        raise UserError(
            f"expected 0 <= seconds_start <= seconds_total <= {limits.longest}, got {request.start} and {request.total}"
        )


def milliseconds(seconds: float) -> float:
    """Round a length down to whole milliseconds, so that it can be asked for as it is told."""
    return math.floor(seconds * 1000) / 1000


def merge_stretches(stretches: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Sort stretches of a sound, (start, stop) in seconds, and make one of those that overlap or touch."""
    merged: list[tuple[float, float]] = []
    for first, last in sorted(stretches):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], last)
        else:
            merged.append((first, last))
    return merged


def check_number(name: str, value: object, whole: bool = False) -> None:
    """Refuse what is no number, or no whole one.

    Raises:
        UserError: names it.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if whole else numbers.Real):
        raise UserError(f"{name} must be a {'whole ' if whole else ''}number, got {value!r}")


def list_prompts(prompts: str | Iterable[str] | None) -> list[str | None]:
    """List one prompt, several, or none.

    Raises:
        UserError: they are no such thing.
    """
    if prompts is None or isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes):
        raise UserError(f"prompts must be a text or a list of texts, got {prompts!r}")
    return list(prompts)


def check_texts(texts: Sequence[str | None], negative: str | None) -> None:
    """Refuse prompts that are empty or not text.

    Raises:
        UserError: a prompt is empty or not valid UTF-8.
    """
    if wrong := next((text for text in (*texts, negative) if not isinstance(text, str | None)), None):
        raise UserError(f"a prompt must be text, got {wrong!r}")
    if not texts or not all(text is None or text.strip() for text in texts):
        raise UserError("a prompt is empty; say what you want to hear")
    for text in (*texts, negative):
        try:
            (text or "").encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"the prompt {str(text)[:40]!r} is not valid UTF-8 text; type it again") from error


def choose_seed(seed: int | None, items: int) -> int:
    """Check the seed of the first of `items` items, whose seeds are consecutive; None draws one.

    Raises:
        UserError: it is out of range.
    """
    if seed is None:
        return secrets.randbelow(2**31)
    check_number("seed", seed, whole=True)
    if not 0 <= seed < 2**63 - items:
        raise UserError(f"seed must lie in 0..2^63, got {seed}")
    return seed
