"""What an evaluation found: figures with intervals and calibration, its settings, and what was heard in each sound.

Stored as JSON. Two results may be compared where their settings agree; `different_settings` names those that don't.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

from stable_audio_lite.config import from_dict
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import replacing

FORMAT = 1
"""Version of the file's layout."""


class Missing(UserError):
    """A metric can't be had; the message says what it lacks, and where to put it."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One metric's value with its 95 % bootstrap interval over `n` sounds, or windows where `unit` says so.

    Of a single sound there is no interval: `low` and `high` are NaN.

    Attributes:
        name: of the metric, "fd_openl3".
        beside: the same metric elsewhere, by name: "real halves", "noise", "shuffled captions", "vae". Of a distance
            between sets, halves of equally many sounds, so that "generated halves" stands among them.
        higher_is_better: None where neither is.
    """

    name: str
    value: float
    low: float
    high: float
    n: int
    unit: str = ""
    higher_is_better: bool | None = None
    beside: dict[str, float] = field(default_factory=dict)

    @property
    def has_interval(self) -> bool:
        """Whether `low` and `high` are known."""
        return math.isfinite(self.low) and math.isfinite(self.high)


Nearest = tuple[tuple[str, float], ...]
"""Paths of the training sounds whose embeddings are closest, closest first, and their cosines."""


@dataclass(frozen=True, kw_only=True)
class Sound:
    """One evaluated file.

    Attributes:
        path: where it lies.
        seconds: its length.
        sample_rate: in Hz, as it lies on disk.
        treatment: what was done to it first, in words: "mono: both channels alike".
        prompt: what it was made from, or describes it; "" for nothing.
        requested: the length in seconds that was asked for, or None.
        heard: measurements by name: "end" in seconds, "width" in dB, ...
        nearest: the training sounds that are most alike; () where none were given, and of recordings among them.
    """

    path: str
    seconds: float
    sample_rate: int
    channels: int
    treatment: tuple[str, ...] = ()
    prompt: str = ""
    requested: float | None = None
    heard: dict[str, float] = field(default_factory=dict)
    nearest: Nearest = ()


@dataclass(frozen=True, kw_only=True)
class Result:
    """All of an evaluation.

    Attributes:
        model: name of what was evaluated.
        settings: what changes figures: weights' hashes, resampler, rates, channels, normalisation, windows, versions.
        figures: the metrics that could be had.
        missing: for those that could not: what to fetch, and where to put it.
        generated: the sounds under test.
        reference: those that they are compared with.
        left_out: files that could not be used, and why.
        tables: histograms and the like by name: rows of named values.
        origin: where all of it comes from, which may differ between results that compare.
    """

    model: str
    settings: dict[str, Any]
    figures: tuple[Figure, ...]
    missing: dict[str, str] = field(default_factory=dict)
    generated: tuple[Sound, ...] = ()
    reference: tuple[Sound, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)

    def figure(self, name: str) -> Figure | None:
        """The figure of that name, or None."""
        return next((f for f in self.figures if f.name == name), None)


def as_text(result: Result) -> str:
    """A line for each figure, and for all that could not be had."""
    lines = [f"{'':18}{'n':>7}{'':>9}{'value':>10}{'95 %':>22}   beside"]
    lines += [_line(figure) for figure in result.figures]
    lines += [f"{name}: not measured: {reason}" for name, reason in result.missing.items()]
    if alike := max((sound for sound in result.generated if sound.nearest), key=_closeness, default=None):
        lines.append(f"most like a training sound: {alike.path}, of {alike.nearest[0][0]} ({_closeness(alike):.3f})")
    treated = sum(bool(sound.treatment) for sound in (*result.generated, *result.reference))
    if treated:
        lines.append(f"{treated} sounds were treated first, as the result says of each")
    lines += [f"left out: {reason}" for reason in result.left_out.values()]
    return "\n".join(lines)


def _closeness(sound: Sound) -> float:
    return sound.nearest[0][1]


def _line(figure: Figure) -> str:
    interval = f"{figure.low:.4g} to {figure.high:.4g}" if figure.has_interval else ""
    beside = ", ".join(f"{name} {value:.4g}" for name, value in figure.beside.items())
    return f"{figure.name:18}{figure.n:7}{figure.unit:>9}{figure.value:10.4g}{interval:>22}   {beside}".rstrip()


def save_result(result: Result, path: Path) -> None:
    """Write `result` as JSON, whole or not at all.

    Raises:
        UserError: it can't be written.
    """
    data = without_nan({"format": FORMAT, **asdict(result)})
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    with replacing(path) as temporary:
        # Names that are no UTF-8 hold lone surrogates; with a backslash they are what JSON writes.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def without_nan(value: Any) -> Any:
    """Plain values for JSON, which has no NaN and no infinity: None stands for them."""
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load_result(path: Path) -> Result:
    """Read what `save_result` wrote.

    Raises:
        UserError: the file is missing, or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("format") != FORMAT:
            raise ValueError("another version's layout")
        figures = tuple(_figure(row) for row in data.pop("figures"))
        generated, reference = (tuple(_sound(row, key) for row in data.pop(key)) for key in ("generated", "reference"))
        _check_mappings(data)
        return Result(figures=figures, generated=generated, reference=reference, **data)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); give a file that evaluation.run wrote") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:80]
        raise UserError(f"{path}: not a result of evaluation.run ({reason}); run it again") from error


def _figure(row: Any) -> Figure:
    if isinstance(row, dict):
        row = row | {key: math.nan for key in ("value", "low", "high") if row.get(key, 0) is None}
    return from_dict(Figure, row, "figures")


def _sound(row: dict[str, Any], where: str) -> Sound:
    nearest = tuple((str(path), float(cosine)) for path, cosine in row.pop("nearest"))
    return replace(from_dict(Sound, row, where), nearest=nearest)


def _check_mappings(data: dict[str, Any]) -> None:
    if not isinstance(data["model"], str) or not isinstance(data["settings"], dict):
        raise ValueError("'model' must be a text and 'settings' a mapping")
    texts = [value for key in ("missing", "left_out", "origin") for value in data.get(key, {}).values()]
    rows = [row for table in data["tables"].values() for row in table]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("'missing', 'left_out' and 'origin' must hold texts")
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("'tables' must hold rows of named values")


def partners(generated: Sequence[Sound], reference: Sequence[Sound]) -> list[Sound | None]:
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


def shown(value: float) -> str:
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
