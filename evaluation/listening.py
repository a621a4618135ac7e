"""What is heard in one sound, and what that says of many: length, loudness, width, and where a sound changes.

Structure is novelty (Foote 2000, "Automatic audio segmentation using a measure of audio novelty"): how much what
precedes a moment differs from what follows it. An introduction that gives way to something else, a development and an
ending each leave a peak, in the first quarter, the middle half and the last quarter of a sound; so does anything else
that changes the sound: a break, a fade, a fault. Peaks of real music stand beside those of the generated.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.adherence import END_SECONDS, WIDTH_DB
from evaluation.bootstrap import interval
from evaluation.music import width_db
from evaluation.obedience import sound_end
from evaluation.result import Figure, Sound, partners
from stable_audio_lite.audio.stft import stft

STRETCHES, REACH = 128, 16
"""Parts that a sound is cut into for its structure, and how many before and after a moment are compared."""

MONO_DB = -40.0
"""A sound that is narrower counts as this wide: what lies 40 dB below the middle is not heard."""

_SHORTEST, _QUIETEST = 4.0, -60.0  # seconds, and dB beside the loudest, below which structure is not looked for
_BANDS, _LOWEST, _HIGHEST = 32, 40.0, 16000.0  # mel bands, Hz
_BIN_WIDTHS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)  # seconds
_BINS = 10
_MEANS = ("width", "level", "intro", "development", "outro")


def describe(audio: Tensor, sample_rate: int) -> dict[str, float]:
    """Measurements by name of (2, T) audio at `sample_rate` Hz; a sound lacks those that it is too short or silent for.

    - end: seconds at which the sound ends (`evaluation.obedience.sound_end`), 0 for silence
    - width: power of left - right beside left + right, in dB (`evaluation.music.width_db`)
    - level: integrated loudness in LUFS (ITU-R BS.1770-4), of at least 0.4 s above its gate
    - intro, development, outro: the highest `novelty` in the first quarter, the middle half and the last quarter of at
      least 4 s of sound, in dB
    """
    end = sound_end(audio, sample_rate)
    sound = audio[:, : round(end * sample_rate)].float()
    heard = {"end": end}
    if end:
        heard["width"] = width_db(sound)
    level = loudness(sound, sample_rate)
    if math.isfinite(level):
        heard["level"] = level
    if end >= _SHORTEST:
        curve = novelty(sound, sample_rate)
        first, last = STRETCHES // 4 + 1, STRETCHES * 3 // 4
        parts = {"intro": curve[:first], "development": curve[first:last], "outro": curve[last:]}
        heard |= {name: max(0.0, float(part.nan_to_num(0.0).max())) for name, part in parts.items()}
    return heard


def loudness(audio: Tensor, sample_rate: int) -> float:
    """Integrated loudness of (2, T) audio in LUFS; minus infinity for less than 0.4 s, or all of it below the gate."""
    import pyloudnorm

    meter = pyloudnorm.Meter(sample_rate)
    if audio.shape[1] <= meter.block_size * sample_rate:
        return -math.inf
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # it takes logarithms of silent blocks
        return float(meter.integrated_loudness(audio.T.double().numpy()))


def novelty(audio: Tensor, sample_rate: int) -> Tensor:
    """How much (2, T) audio changes between its `STRETCHES`: (STRETCHES + 1,) in dB, NaN too near to both ends.

    The distance of two stretches is the root mean square difference of their mel bands' levels. The novelty is the mean
    distance between the `REACH` stretches before and the `REACH` after, less the mean distance within each: Foote's
    kernel without a taper, or the energy distance, which is 0 on average where nothing changes.
    """
    bands = _levels(audio, sample_rate)
    distances = torch.cdist(bands, bands) / math.sqrt(_BANDS)
    curve = torch.full((STRETCHES + 1,), math.nan)
    for moment in range(REACH // 2, STRETCHES - REACH // 2 + 1):
        before, after = slice(max(0, moment - REACH), moment), slice(moment, moment + REACH)
        within = [_within(distances[side, side]) for side in (before, after)]
        curve[moment] = distances[before, after].mean() - sum(within) / 2
    return curve


def _within(distances: Tensor) -> Tensor:
    return distances.sum() / (len(distances) * (len(distances) - 1))


def _levels(audio: Tensor, sample_rate: int) -> Tensor:
    """Mean level of each mel band in each stretch, (STRETCHES, bands), in dB beside the loudest of all."""
    import torchaudio.functional

    hop = max(1, round(sample_rate * 0.012))
    window, block = 4 * hop, 2000 * hop
    highest = min(_HIGHEST, sample_rate / 2)
    bank = torchaudio.functional.melscale_fbanks(window // 2 + 1, _LOWEST, highest, _BANDS, sample_rate)
    padded = F.pad(audio, (window // 2, window // 2))
    frames = []
    for start in range(0, padded.shape[1] - window + 1, block):
        piece = padded[:, start : start + block + window - hop]
        spectrum = stft(piece, torch.hann_window(window), hop, centred=False)
        frames.append((spectrum.abs().square().mean(0).T @ bank).T)
    power = F.adaptive_avg_pool1d(torch.cat(frames, 1)[None], STRETCHES)[0].T
    return (10 * (power / power.max()).clamp_min(1e-12).log10()).clamp_min(_QUIETEST)


def summarise(
    sounds: Sequence[Sound], reference: Sequence[Sound]
) -> tuple[list[Figure], dict[str, list[dict[str, Any]]]]:
    """Figures and tables of what was heard in generated `sounds`, beside the same of the `reference` recordings.

    - on_time: share whose sound ends within 0.5 s of what was asked for; beside it, of recordings, within 0.5 s of the
      file's end ("real"), and of sounds held against the lengths of all others ("shuffled lengths")
    - timing_error: mean time between the two, in s
    - width_right: share within 6 dB of the width of the recording of the same prompt or name; beside it, of all others
    - width, level, intro, development, outro: means of `describe`; nearest_training: mean cosine to the closest one

    The tables: "timing", a row for each bin of lengths asked for, and "timing_histogram", how many of them came out how
    long (after Evans et al. 2024, arXiv 2402.04825). What no sound has is left out.
    """
    figures = [*_timing(sounds, reference), _width_right(sounds, reference)]
    figures += [_figure(name, _heard(sounds, name), {"real": _heard(reference, name)}) for name in _MEANS]
    closest = [[s.nearest[0][1] for s in group if s.nearest] for group in (sounds, reference)]
    figures.append(_figure("nearest_training", closest[0], {"real": closest[1]}))
    return [figure for figure in figures if figure], _timing_tables(_asked(sounds))


def _asked(sounds: Sequence[Sound]) -> list[tuple[float, float]]:
    """Seconds asked for and measured."""
    return [(s.requested, s.heard["end"]) for s in sounds if s.requested is not None and "end" in s.heard]


def _timing(sounds: Sequence[Sound], reference: Sequence[Sound]) -> list[Figure | None]:
    wanted, ends = np.array(_asked(sounds)).reshape(-1, 2).T
    real = np.array([s.heard["end"] - s.seconds for s in reference if "end" in s.heard])
    others = [ends[wanted != own] - own for own in wanted] if len(set(wanted)) > 1 else []

    def beside(measure: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
        return {"real": measure(real), "shuffled lengths": np.array([measure(late).mean() for late in others])}

    return [
        _figure("on_time", _on_time(ends - wanted), beside(_on_time), True),
        _figure("timing_error", np.abs(ends - wanted), beside(np.abs), False),
    ]


def _on_time(late: np.ndarray) -> np.ndarray:
    return np.abs(late) <= END_SECONDS


def _width_right(sounds: Sequence[Sound], reference: Sequence[Sound]) -> Figure | None:
    pairs = [
        (sound.heard["width"], partner)
        for sound, partner in zip(sounds, partners(sounds, reference), strict=True)
        if partner and "width" in sound.heard and "width" in partner.heard
    ]
    made = np.maximum([width for width, _ in pairs], MONO_DB)
    real = np.maximum([partner.heard["width"] for _, partner in pairs], MONO_DB)
    paths = np.array([partner.path for _, partner in pairs])
    others = [real[paths != path] - width for width, path in zip(made, paths, strict=True)]
    beside = {"shuffled": [np.mean(np.abs(far) <= WIDTH_DB) for far in others if len(far)]}
    return _figure("width_right", np.abs(made - real) <= WIDTH_DB, beside, True)


def _heard(sounds: Sequence[Sound], name: str) -> list[float]:
    values = [s.heard[name] for s in sounds if name in s.heard]
    return [max(value, MONO_DB) for value in values] if name == "width" else values


def _figure(name: str, values: Any, beside: dict[str, Any], higher_is_better: bool | None = None) -> Figure | None:
    """The mean of `values`, and beside it those of others; None where there are none."""
    if not len(values):
        return None
    low, high = interval(values)
    return Figure(
        name=name,
        value=float(np.mean(values)),
        low=low,
        high=high,
        n=len(values),
        higher_is_better=higher_is_better,
        beside={key: float(np.mean(others)) for key, others in beside.items() if len(others)},
    )


def _timing_tables(asked: Sequence[tuple[float, float]]) -> dict[str, list[dict[str, Any]]]:
    if not asked:
        return {}
    longest = max(max(pair) for pair in asked)
    width = next((w for w in _BIN_WIDTHS if w * _BINS > longest), longest / _BINS)
    bins = [(int(wanted / width), int(end / width)) for wanted, end in asked]
    rows, cells = [], []
    for wanted in sorted({wanted for wanted, _ in bins}):
        within = [pair for pair, (own, _) in zip(asked, bins, strict=True) if own == wanted]
        late = np.array([end - length for length, end in within])
        edges = {"requested_from": wanted * width, "requested_to": (wanted + 1) * width}
        share = float((np.abs(late) <= END_SECONDS).mean())
        rows.append({**edges, "n": len(late), "on_time": share, "mean_error": float(np.abs(late).mean())})
        for measured in sorted({end for own, end in bins if own == wanted}):
            span = {"measured_from": measured * width, "measured_to": (measured + 1) * width}
            cells.append({**edges, **span, "n": bins.count((wanted, measured))})
    return {"timing": rows, "timing_histogram": cells}
