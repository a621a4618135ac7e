"""Results of an evaluation: metrics with intervals and baselines, its settings, and measurements of each sound.

Stored as JSON. Two results may be compared where their settings agree; `different_settings` names those that don't.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Any

from evaluation.output import without_nan
from stable_audio_lite.config import from_dict
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import replacing

FEW_SOUNDS = 100
"""Number of sounds below which metrics say little."""

_FORMAT = 2
"""Version of the file's layout."""


class Missing(UserError):
    """A metric can't be had; the message says what it lacks, and where to put it."""


@dataclass(frozen=True, kw_only=True)
class MetricValue:
    """One metric's value with its 95 % bootstrap interval over `n` sounds, or windows where `unit` says so.

    Of a single sound there is no interval: `low` and `high` are NaN.

    Attributes:
        name: of the metric, "fd_openl3".
        higher_is_better: None where neither is.
        baselines: the same metric elsewhere, by name: "real halves", "noise", "shuffled captions", "vae". Of a distance
            between sets, halves of equally many sounds, so that "generated halves" stands among them.
    """

    name: str
    value: float
    low: float
    high: float
    n: int
    unit: str = ""
    higher_is_better: bool | None = None
    baselines: dict[str, float] = field(default_factory=dict)

    @property
    def has_interval(self) -> bool:
        """True where `low` and `high` are known."""
        return math.isfinite(self.low) and math.isfinite(self.high)


@dataclass(frozen=True)
class Neighbour:
    """A training sound, and the cosine between its embedding and another sound's."""

    path: str
    cosine: float


@dataclass(frozen=True, kw_only=True)
class SoundRecord:
    """One evaluated file.

    Attributes:
        path: where it lies.
        seconds: its length.
        sample_rate: in Hz, as it lies on disk.
        treatment: what was done to it first, in words: "mono: both channels alike".
        prompt: what it was made from, or describes it; "" for nothing.
        requested: the length in seconds that was asked for, or None.
        measurements: by name: "end" in seconds, "width" in dB, ...
        nearest: the training sounds that are most alike, the closest first; () where none were given, and of recordings
            among them.
    """

    path: str
    seconds: float
    sample_rate: int
    channels: int
    treatment: tuple[str, ...] = ()
    prompt: str = ""
    requested: float | None = None
    measurements: dict[str, float] = field(default_factory=dict)
    nearest: tuple[Neighbour, ...] = ()

    @property
    def name(self) -> str:
        """The file's name, without the folder that it lies in."""
        return PurePath(self.path).name


Table = tuple[dict[str, object], ...]
"""Rows of named values."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """All of an evaluation.

    Attributes:
        model: name of what was evaluated.
        settings: what changes metrics: weights' hashes, resampler, rates, channels, normalisation, windows, versions.
        metrics: those that could be had.
        missing: for those that could not: what to fetch, and where to put it.
        generated: the sounds under test.
        reference: those that they are compared with.
        left_out: files that could not be used, and why.
        tables: histograms and the like by name.
        origin: where all of it comes from, which may differ between results that compare.
    """

    model: str
    settings: dict[str, object]
    metrics: tuple[MetricValue, ...]
    missing: dict[str, str] = field(default_factory=dict)
    generated: tuple[SoundRecord, ...] = ()
    reference: tuple[SoundRecord, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)

    def metric(self, name: str) -> MetricValue | None:
        """The value of that metric, or None."""
        return next((metric for metric in self.metrics if metric.name == name), None)


def result_table(result: Result) -> str:
    """A line for each metric, and for all that could not be had."""
    lines = [f"{'':18}{'n':>7}{'':>9}{'value':>10}{'95 %':>22}   baselines"]
    lines += [_line(metric) for metric in result.metrics]
    lines += [f"{name}: not measured: {reason}" for name, reason in result.missing.items()]
    counts = {"generated sounds": len(result.generated), "recordings": len(result.reference)}
    few = [f"{count} {kind}" for kind, count in counts.items() if 0 < count < FEW_SOUNDS]
    if few and result.metrics:
        lines.append(f"warning: {' and '.join(few)} are few; distances shrink as sounds get more, say {FEW_SOUNDS}")
    near = [(sound.nearest[0].cosine, sound) for sound in result.generated if sound.nearest]
    if near:
        cosine, sound = max(near, key=lambda pair: pair[0])
        lines.append(f"most like a training sound: {sound.path}, of {sound.nearest[0].path} ({cosine:.3f})")
    if treated := sum(bool(sound.treatment) for sound in (*result.generated, *result.reference)):
        lines.append(f"{treated} sounds were treated first, as the result says of each")
    lines += [f"left out: {reason}" for reason in result.left_out.values()]
    return "\n".join(lines)


def _line(metric: MetricValue) -> str:
    interval = f"{metric.low:.4g} to {metric.high:.4g}" if metric.has_interval else ""
    baselines = ", ".join(f"{name} {value:.4g}" for name, value in metric.baselines.items())
    return f"{metric.name:18}{metric.n:7}{metric.unit:>9}{metric.value:10.4g}{interval:>22}   {baselines}".rstrip()


def save_result(result: Result, path: Path) -> None:
    """Write `result` as JSON, whole or not at all.

    Raises:
        UserError: it can't be written.
    """
    data = without_nan({"format": _FORMAT, **asdict(result)})
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    with replacing(path) as temporary:
        # Names that are no UTF-8 hold lone surrogates; with a backslash they are what JSON writes.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def load_result(path: Path) -> Result:
    """Read what `save_result` wrote.

    Raises:
        UserError: the file is missing, of another version, or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); give a file that evaluation.run wrote") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a result of evaluation.run, which is JSON; run it again") from error
    if not isinstance(data, dict) or data.pop("format", None) != _FORMAT:
        raise UserError(f"{path}: not a result of evaluation.run, or another version's layout; run it again")
    for row in data["metrics"] if isinstance(data.get("metrics"), list) else ():
        if isinstance(row, dict):  # JSON has no NaN
            row.update({key: math.nan for key in ("value", "low", "high") if row.get(key, 0) is None})
    return from_dict(Result, data, str(path))


def partners(generated: Sequence[SoundRecord], reference: Sequence[SoundRecord]) -> list[SoundRecord | None]:
    """For each generated sound, the one of the reference with its name and prompt, or with its prompt.

    Where one of both has no prompt, the name is enough.
    """
    prompts = {sound.prompt: sound for sound in reversed(reference) if sound.prompt}
    names = {PurePath(sound.path).stem: sound for sound in reversed(reference)}
    found = []
    for sound in generated:
        namesake = names.get(PurePath(sound.path).stem)
        alike = namesake is not None and not (namesake.prompt and sound.prompt and namesake.prompt != sound.prompt)
        found.append(namesake if alike else prompts.get(sound.prompt))
    return found


def format_value(value: float) -> str:
    """A value with four significant digits, or all of those before the point."""
    return f"{value:.4g}" if not abs(value) >= 1e4 else f"{value:.0f}"


def different_settings(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that don't agree, by their dotted names; None stands for one that is not there."""
    flat, other_flat = flat_settings(one), flat_settings(other)
    keys = sorted(flat.keys() | other_flat.keys())
    return {k: (flat.get(k), other_flat.get(k)) for k in keys if flat.get(k) != other_flat.get(k)}


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat_settings(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = list(value) if isinstance(value, tuple) else value
    return found
