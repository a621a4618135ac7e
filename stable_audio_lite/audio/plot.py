"""A picture of a signal: its spectrogram in decibels over time and logarithmic frequency."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from stable_audio_lite.audio.io import resample
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import replacing

_WINDOW = 4096
BANDS = 320
_LOWEST_HZ = 30.0
_COLUMNS = 1600
_RANGE_DB = 90.0
_TICKS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)  # seconds


def spectrogram_db(samples: Any, sample_rate: int, columns: int = _COLUMNS) -> tuple[np.ndarray, np.ndarray]:
    """Power of (C, T) samples in dB re full scale, on `BANDS` logarithmically spaced frequencies.

    Returns:
        (C, BANDS, columns) decibels (a full-scale sine reads 0 dB) and the (BANDS,) frequencies in Hz.
    """
    values = np.asarray(samples, dtype=np.float32)
    window = np.hanning(_WINDOW).astype(np.float32)
    padded = np.pad(values, ((0, 0), (_WINDOW // 2, _WINDOW // 2)))
    starts = np.linspace(0, padded.shape[1] - _WINDOW, columns).astype(int)
    frequencies = np.geomspace(_LOWEST_HZ, sample_rate / 2, BANDS)
    bins = frequencies * _WINDOW / sample_rate
    low = np.minimum(bins.astype(int), _WINDOW // 2 - 1)
    share = (bins - low).astype(np.float32)
    # A band that spans several bins shows the loudest, or thin lines would fall between the bands.
    wide = np.diff(low, append=_WINDOW // 2 + 1) > 1
    out = np.empty((len(values), BANDS, columns), np.float32)
    for column, start in enumerate(starts):
        frames = padded[:, start : start + _WINDOW] * window
        magnitude = np.abs(np.fft.rfft(frames)) * 2 / window.sum()
        between = magnitude[:, low] * (1 - share) + magnitude[:, low + 1] * share
        out[:, :, column] = np.where(wide, np.maximum.reduceat(magnitude, low, axis=1), between)
    return 20 * np.log10(np.maximum(out, 1e-7)), frequencies


def plot_spectrogram(path: str | Path, samples: Any, sample_rate: int, title: str = "") -> None:
    """Write a PNG with one spectrogram per channel of (C, T) samples.

    Raises:
        UserError: `path` isn't a .png, or can't be written.
    """
    check_plottable(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    values, sample_rate = _audible(samples, sample_rate)
    decibels, frequencies = spectrogram_db(values, sample_rate)
    figure = Figure(figsize=(12, 2.8 * len(values) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(values), 1, sharex=True, squeeze=False)[:, 0]
    seconds = np.linspace(0, values.shape[1] / sample_rate, decibels.shape[2])
    names = ("left", "right") if len(values) == 2 else tuple(f"channel {c + 1}" for c in range(len(values)))
    for axis, channel, name in zip(axes, decibels, names, strict=True):
        image = axis.pcolormesh(seconds, frequencies, channel, vmin=-_RANGE_DB, vmax=0, cmap="magma", rasterized=True)
        axis.set(yscale="log", ylim=(_LOWEST_HZ, sample_rate / 2), ylabel=f"{name}, Hz")
    axes[-1].set_xlabel("seconds")
    figure.colorbar(image, ax=list(axes), label="dB re full scale")
    if title:
        # "$" would start a formula.
        figure.suptitle(title[:120].replace("$", r"\$"), fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def spectrogram_webp(samples: Any, sample_rate: int, columns: int = 600) -> tuple[bytes, dict[int, float]]:
    """Draw a small picture for a page: the loudest channel of (C, T) samples at each point, without axes.

    Returns:
        The WebP file, and the heights in it, from 0 to 1, of 100, 1,000 and 10,000 Hz, as far as they are in range.
    """
    from matplotlib.image import imsave

    values, sample_rate = _audible(samples, sample_rate)
    decibels, frequencies = spectrogram_db(values, sample_rate, columns)
    buffer = io.BytesIO()
    rows = decibels.max(0)[::-1]
    imsave(buffer, rows, vmin=-_RANGE_DB, vmax=0, cmap="magma", format="webp", pil_kwargs={"quality": 60})
    octaves = np.log(frequencies / frequencies[0])
    heights = {hertz: float(np.log(hertz / frequencies[0]) / octaves[-1]) for hertz in (100, 1000, 10000)}
    return buffer.getvalue(), {hertz: height for hertz, height in heights.items() if height < 1}


def time_ticks(span: float) -> tuple[tuple[float, str], ...]:
    """Places along a picture of `span` seconds, as shares of its width, and what to write there."""
    if not span > 0:
        return ()
    step = next((tick for tick in _TICKS if span / tick <= 6), span / 6)
    return tuple((n * step / span, f"{n * step:.3g} s") for n in range(int(0.94 * span / step) + 1))


def _audible(samples: Any, sample_rate: int) -> tuple[np.ndarray, int]:
    """Resample to 48 kHz at most: a picture should show what can be heard."""
    values = np.asarray(samples, dtype=np.float32)
    return (resample(values, sample_rate, 48000), 48000) if sample_rate > 48000 else (values, sample_rate)


def check_plottable(path: str | Path) -> None:
    """Check, before the work begins, that `plot_spectrogram` can write to `path`.

    Raises:
        UserError: `path` isn't a .png.
    """
    if Path(path).suffix.lower() != ".png":
        raise UserError(f"{path}: unknown suffix '{Path(path).suffix}'; pictures are written as .png")
