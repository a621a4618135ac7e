"""Timing, width, loudness and structure of many sounds, by the measurements of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from evaluation.metrics.inputs import mean_metric
from evaluation.metrics.levels import END_TOLERANCE, WIDTH_TOLERANCE_DB
from evaluation.result import MetricValue, SoundRecord, Table, partners

MONO_DB = -40.0
"""A sound that is narrower counts as this wide: nobody hears what lies 40 dB below the middle."""

_BIN_WIDTHS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)  # seconds
_BINS = 10
_MEANS = ("width", "level", "intro", "development", "outro")

_Mean = tuple[str, Any, dict[str, Any], bool | None]  # name, values, baselines, whether higher is better


def summarise(
    sounds: Sequence[SoundRecord], reference: Sequence[SoundRecord]
) -> tuple[list[MetricValue], dict[str, Table]]:
    """Metrics and tables of the measurements of generated `sounds`, beside the same of the `reference` recordings.

    - on_time: share whose sound ends within 0.5 s of what was asked for; as baselines, of recordings, within 0.5 s of
      the file's end ("real"), and of sounds held against the lengths of all others ("shuffled lengths")
    - timing_error: mean time between the two, in s
    - width_right: share within 6 dB of the width of the recording of the same prompt or name; as a baseline, of all
      others
    - width, level, intro, development, outro: means of the measurements of that name
    - nearest_training: mean cosine to the closest training sound

    The tables: "timing", a row for each bin of lengths asked for, and "timing_histogram", how many of them came out how
    long (after Evans et al. 2024, arXiv 2402.04825). What no sound has is left out.
    """
    means: list[_Mean] = [*_timing(sounds, reference), _width_right(sounds, reference)]
    means += [(name, _values(sounds, name), {"real": _values(reference, name)}, None) for name in _MEANS]
    closest = [[s.nearest[0].cosine for s in group if s.nearest] for group in (sounds, reference)]
    means.append(("nearest_training", closest[0], {"real": closest[1]}, None))
    return [mean_metric(*mean).value for mean in means if len(mean[1])], _timing_tables(_asked(sounds))


def _asked(sounds: Sequence[SoundRecord]) -> list[tuple[float, float]]:
    """Seconds asked for and measured."""
    return [(s.requested, s.measurements["end"]) for s in sounds if s.requested is not None and "end" in s.measurements]


def _timing(sounds: Sequence[SoundRecord], reference: Sequence[SoundRecord]) -> list[_Mean]:
    wanted, ends = np.array(_asked(sounds)).reshape(-1, 2).T
    real = np.array([s.measurements["end"] - s.seconds for s in reference if "end" in s.measurements])
    others = [ends[wanted != own] - own for own in wanted] if len(set(wanted)) > 1 else []

    def baselines(error: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
        return {"real": error(real), "shuffled lengths": np.array([error(late).mean() for late in others])}

    return [
        ("on_time", _on_time(ends - wanted), baselines(_on_time), True),
        ("timing_error", np.abs(ends - wanted), baselines(np.abs), False),
    ]


def _on_time(late: np.ndarray) -> np.ndarray:
    return np.abs(late) <= END_TOLERANCE


def _width_right(sounds: Sequence[SoundRecord], reference: Sequence[SoundRecord]) -> _Mean:
    pairs = [
        (sound.measurements["width"], partner)
        for sound, partner in zip(sounds, partners(sounds, reference), strict=True)
        if partner and "width" in sound.measurements and "width" in partner.measurements
    ]
    made = np.maximum([width for width, _ in pairs], MONO_DB)
    real = np.maximum([partner.measurements["width"] for _, partner in pairs], MONO_DB)
    paths = np.array([partner.path for _, partner in pairs])
    others = [real[paths != path] - width for width, path in zip(made, paths, strict=True)]
    shuffled = [np.mean(np.abs(far) <= WIDTH_TOLERANCE_DB) for far in others if len(far)]
    return "width_right", np.abs(made - real) <= WIDTH_TOLERANCE_DB, {"shuffled": shuffled}, True


def _values(sounds: Sequence[SoundRecord], name: str) -> list[float]:
    values = [s.measurements[name] for s in sounds if name in s.measurements]
    return [max(value, MONO_DB) for value in values] if name == "width" else values


def _timing_tables(asked: Sequence[tuple[float, float]]) -> dict[str, Table]:
    if not asked:
        return {}
    longest = max(max(pair) for pair in asked)
    width = next((w for w in _BIN_WIDTHS if w * _BINS > longest), longest / _BINS)
    bins = [(int(wanted / width), int(end / width)) for wanted, end in asked]
    rows: list[dict[str, object]] = []
    cells: list[dict[str, object]] = []
    for wanted in sorted({wanted for wanted, _ in bins}):
        within = [pair for pair, (own, _) in zip(asked, bins, strict=True) if own == wanted]
        late = np.array([end - length for length, end in within])
        edges = {"requested_from": wanted * width, "requested_to": (wanted + 1) * width}
        share = float(_on_time(late).mean())
        rows.append({**edges, "n": len(late), "on_time": share, "mean_error": float(np.abs(late).mean())})
        for measured in sorted({end for own, end in bins if own == wanted}):
            span = {"measured_from": measured * width, "measured_to": (measured + 1) * width}
            cells.append({**edges, **span, "n": bins.count((wanted, measured))})
    return {"timing": tuple(rows), "timing_histogram": tuple(cells)}
