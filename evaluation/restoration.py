"""Restoration of held-out sounds that are degraded first: by nothing, by classical methods, by the model.

    python -m evaluation.restoration BUNDLE corpus/held_out --task inpaint --items 30
    python -m evaluation.restoration BUNDLE corpus/held_out --task dereverb --rt60 0.8 --blind --json

An excerpt of each sound, `--seconds` or two windows of the model long, is degraded in one way:

- inpaint: `--gap` ms in its middle are silent; "line" draws the waveform straight across the gap, "magnitudes" draws
  those of the spectrogram across it and lets phases turn on as they did before
- bandwidth: frequencies above `--cutoff` are cut; "octave" repeats the octave below it above it, 12 dB quieter
- denoise: white noise of `--snr` dB; "wiener" is a filter by spectral subtraction, its noise known
- dereverb: a room whose noise decays by 60 dB in `--rt60` s; "wpe" is weighted prediction error. With `--blind` the
  room is estimated, otherwise it is known to the model (not to WPE)

SI-SDR of the excerpt, and the log-spectral distance over the frames of the gap, the rows above the cut-off, or
everything: each with its 95 % bootstrap interval, as is the difference between restoration and each other method on the
same sounds. Sounds that are shorter, or silent in the middle, are passed over.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.metrics.bootstrap import interval
from evaluation.metrics.fidelity import si_sdr
from evaluation.output import print_result
from stable_audio_lite.audio.io import read_audio
from stable_audio_lite.audio.spectrogram import Spectrogram, SpectrogramConfig
from stable_audio_lite.command import Parser, guarded
from stable_audio_lite.data.manifest import Item, read_items
from stable_audio_lite.errors import UserError
from stable_audio_lite.restoration.degradations import Bandwidth, Degradation, Denoise, Dereverb, Inpaint, noise_std
from stable_audio_lite.restoration.restorer import Restorer, RestoreSettings
from stable_audio_lite.restoration.room import convolve
from stable_audio_lite.restoration.wpe import wpe

TASKS = ("inpaint", "bandwidth", "denoise", "dereverb")
_WINDOWS = 2  # of the model, that an excerpt is long at least
_FLOOR = 1e-4  # -80 dB: magnitude, relative to the loudest, below which a cell counts as silent
_REVERB_DB = -3.0  # energy of a room's reverberation relative to its direct sound
_EVERYTHING = torch.ones(1, 1, dtype=torch.bool)


@dataclass(frozen=True, kw_only=True)
class DegradedSound:
    """A degraded sound, and how it was degraded.

    Attributes:
        degraded: (1, T), what is left of it.
        task: for the model.
        classical: (1, T) by name, the results of classical methods.
        cells: boolean, broadcastable to (F, frames), which the log-spectral distance is measured over.
    """

    degraded: Tensor
    task: Degradation
    classical: dict[str, Tensor]
    cells: Tensor = _EVERYTHING


@dataclass(frozen=True, kw_only=True)
class MethodScore:
    """Mean over the sounds with its 95 % interval; `gain` is that of restoration minus this method, paired."""

    method: str
    metric: str
    mean: float
    low: float
    high: float
    gain: float
    gain_low: float
    gain_high: float


@dataclass(frozen=True, kw_only=True)
class DegradationSettings:
    """Kind and amount of degradation; `gap`, `rt60` and `seconds` in s, `cutoff` in Hz, `snr` in dB.

    Raises:
        UserError: one is out of range.
    """

    task: str = "inpaint"
    gap: float = 0.05
    cutoff: float = 4000.0
    snr: float = 10.0
    rt60: float = 0.5
    blind: bool = False
    seconds: float = 3.0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise UserError(f"--task: must be one of {', '.join(TASKS)}, got {self.task}")
        positive = (self.gap, self.cutoff, self.rt60, self.seconds)
        if not (all(0 < value < math.inf for value in positive) and math.isfinite(self.snr)):
            raise UserError("--gap, --cutoff, --rt60 and --seconds must be above 0, and all of them and --snr finite")

    def samples(self, config: SpectrogramConfig) -> int:
        """Samples of an excerpt: two windows of the model at least, and whole frames."""
        frames = math.ceil(self.seconds * config.sample_rate / config.hop)
        return max(frames, _WINDOWS * config.frames) * config.hop


def degrade(clean: Tensor, how: DegradationSettings, spectrogram: Spectrogram, seed: int) -> DegradedSound:
    """Degrade (1, T) sound, T a multiple of the hop, by the generator of `seed`."""
    generator = torch.Generator().manual_seed(seed)
    ways = {"inpaint": _with_gap, "bandwidth": _band_limited, "denoise": _with_noise, "dereverb": _in_room}
    return ways[how.task](clean, how, spectrogram, generator)


def _with_gap(clean: Tensor, how: DegradationSettings, spectrogram: Spectrogram, _: torch.Generator) -> DegradedSound:
    config = spectrogram.config
    first = (clean.shape[1] - round(how.gap * config.sample_rate)) // 2
    last = clean.shape[1] - first
    degraded = clean.clone()
    degraded[:, first:last] = 0
    task = Inpaint(((first / config.sample_rate, last / config.sample_rate),))
    unknown = task.observe(spectrogram, clean[0], 1).operator.singular[0] == 0
    line, magnitudes = degraded.clone(), degraded.clone()
    steps = torch.linspace(0, 1, last - first + 2)[1:-1]
    line[0, first:last] = torch.lerp(degraded[0, first - 1], degraded[0, last], steps)
    filled = interpolate_frames(spectrogram.encode(degraded), unknown)
    magnitudes[:, first:last] = spectrogram.decode(filled)[:, first:last]
    classical = {"line": line, "magnitudes": magnitudes}
    return DegradedSound(degraded=degraded, task=task, classical=classical, cells=unknown[None])


def interpolate_frames(x: Tensor, unknown: Tensor) -> Tensor:
    """Fill unknown frames of (1, 2, F, T), which are neighbours: magnitudes on a line, phases turning on as before."""
    z = torch.complex(x[0, 0], x[0, 1])
    first, last = int(unknown.nonzero()[0]), int(unknown.nonzero()[-1])
    before, after = z[:, first - 1], z[:, min(last + 1, z.shape[1] - 1)]
    steps = torch.arange(1, last - first + 2) / (last - first + 2)
    magnitude = before.abs()[:, None] * (1 - steps) + after.abs()[:, None] * steps
    turn = (z[:, first - 1] * z[:, first - 2].conj()).angle()[:, None] * torch.arange(1, last - first + 2)
    z[:, first : last + 1] = torch.polar(magnitude, before.angle()[:, None] + turn)
    return torch.stack((z.real, z.imag))[None]


def _band_limited(
    clean: Tensor, how: DegradationSettings, spectrogram: Spectrogram, _: torch.Generator
) -> DegradedSound:
    config = spectrogram.config
    task = Bandwidth(how.cutoff)
    known = task.observe(spectrogram, clean[0], 1).operator.singular[:, 0] > 0
    spectrum = torch.fft.rfft(clean)
    hertz = torch.arange(spectrum.shape[1]) * config.sample_rate / clean.shape[1]
    degraded = torch.fft.irfft(spectrum * (hertz <= how.cutoff), clean.shape[1])
    x = spectrogram.encode(degraded)
    fill, count = x.clone(), int(known.sum())
    rows = torch.arange(count, config.bins)
    fill[:, :, rows] = x[:, :, count - 1 - (rows - count) % max(1, count // 2)] * 0.25
    classical = {"octave": spectrogram.decode(fill)}
    return DegradedSound(degraded=degraded, task=task, classical=classical, cells=~known[:, None])


def _with_noise(
    clean: Tensor, how: DegradationSettings, spectrogram: Spectrogram, generator: torch.Generator
) -> DegradedSound:
    level = float(clean.square().mean().sqrt()) * 10 ** (-how.snr / 20)
    degraded = clean + level * torch.randn(clean.shape, generator=generator)
    level_db = 20 * math.log10(level)
    y = spectrogram.encode(degraded)
    noise = 2 * noise_std(spectrogram.config, level_db) ** 2
    power = F.avg_pool1d(y.square().sum(1), 3, stride=1, padding=1, count_include_pad=False)
    gain = (1 - noise / power.clamp_min(1e-20)).clamp_min(0.01)
    classical = {"wiener": spectrogram.decode(y * gain[:, None])}
    return DegradedSound(degraded=degraded, task=Denoise(level_db), classical=classical)


def room_response(rt60: float, sample_rate: int, generator: torch.Generator) -> Tensor:
    """Direct sound, then noise from 5 ms on that decays by 60 dB in `rt60` s: (T,)."""
    time = torch.arange(round(1.2 * rt60 * sample_rate)) / sample_rate
    tail = torch.randn(time.shape, generator=generator) * 10 ** (-3 * time / rt60) * (time >= 0.005)
    response = tail * 10 ** (_REVERB_DB / 20) / tail.square().sum().sqrt()
    response[0] = 1
    return response


def _in_room(
    clean: Tensor, how: DegradationSettings, spectrogram: Spectrogram, generator: torch.Generator
) -> DegradedSound:
    response = room_response(how.rt60, spectrogram.config.sample_rate, generator)
    degraded = convolve(clean[0], response)[None]
    classical = {"wpe": spectrogram.decode(wpe(spectrogram.encode(degraded)))}
    task = Dereverb(None if how.blind else response)
    return DegradedSound(degraded=degraded, task=task, classical=classical)


def log_spectral_distance(spectrogram: Spectrogram, found: Tensor, clean: Tensor, cells: Tensor) -> float:
    """Root mean square difference of levels in dB over `cells`, of which the mean is taken over the frames.

    Levels under -80 dB relative to the loudest cell of `clean` count as that.
    """
    ours, theirs = (spectrogram.encode(x).square().sum(1)[0].sqrt() for x in (found, clean))
    floor = _FLOOR * float(theirs.max())
    difference = 20 * (ours.clamp_min(floor) / theirs.clamp_min(floor)).log10()
    cells = cells.expand_as(difference)
    frames = cells.any(0)
    squares = (difference.square() * cells).sum(0) / cells.sum(0).clamp_min(1)
    return float(squares[frames].sqrt().mean())


def measure_methods(
    restorer: Restorer,
    items: Sequence[Item],
    count: int,
    how: DegradationSettings,
    settings: RestoreSettings,
    seed: int = 0,
) -> list[MethodScore]:
    """Scores of every method over the first `count` items that are long enough and audible.

    Raises:
        UserError: there are fewer.
    """
    from tqdm import tqdm

    rows: dict[str, list[tuple[float, float]]] = {}
    spectrogram = restorer.spectrogram
    excerpts = (clean for item in items if (clean := excerpt(item, spectrogram.config, how)) is not None)
    for number, clean in enumerate(tqdm(itertools.islice(excerpts, count), total=count, unit="sound")):
        sound = degrade(clean, how, spectrogram, seed + number)
        restored = restorer.restore(sound.degraded, sound.task, replace(settings, seed=seed + number))
        for method, result in {"nothing": sound.degraded, **sound.classical, "restoration": restored}.items():
            distance = log_spectral_distance(spectrogram, result, clean, sound.cells)
            rows.setdefault(method, []).append((si_sdr(result, clean), distance))
    if (usable := len(rows.get("nothing", []))) < count:
        seconds = how.samples(spectrogram.config) / spectrogram.config.sample_rate
        raise UserError(f"{usable} of the {len(items)} sounds have {seconds:.1f} s of sound, --items asks for {count}")
    return method_scores(rows)


def excerpt(item: Item, config: SpectrogramConfig, how: DegradationSettings) -> Tensor | None:
    """The beginning of a sound as mono (1, T), or None where it is shorter or its middle is silent."""
    samples = how.samples(config)
    audio = read_audio(item.path, config.sample_rate, 0.0, samples / config.sample_rate).mean(0, keepdim=True)
    if audio.shape[1] < samples:
        return None
    middle = round(how.gap * config.sample_rate) // 2
    loud = audio[:, samples // 2 - middle : samples // 2 + middle].square().mean().sqrt()
    return audio if loud > 1e-3 else None


def method_scores(rows: dict[str, list[tuple[float, float]]]) -> list[MethodScore]:
    """Means and intervals of (SI-SDR, distance) of each method, and the gain of restoration over it."""
    found = []
    for index, metric in enumerate(("SI-SDR dB", "LSD dB")):
        restored = np.array([row[index] for row in rows["restoration"]])
        for method, values in rows.items():
            own = np.array([row[index] for row in values])
            (low, high), (gain_low, gain_high) = interval(own), interval(restored - own)
            means = {"mean": float(own.mean()), "low": low, "high": high}
            gains = {"gain": float((restored - own).mean()), "gain_low": gain_low, "gain_high": gain_high}
            found.append(MethodScore(method=method, metric=metric, **means, **gains))
    return found


def restoration_table(scores: Sequence[MethodScore], count: int, how: DegradationSettings) -> str:
    """A table with a line for each metric and method."""
    lines = [f"{how.task}, {count} sounds", f"{'':12}{'':12}{'mean':>8}{'95 %':>18}{'restoration minus it':>30}"]
    for row in scores:
        gain = f"{row.gain:+.2f} ({row.gain_low:+.2f} to {row.gain_high:+.2f})" if row.method != "restoration" else ""
        spread = f"{row.low:.2f} to {row.high:.2f}"
        lines.append(f"{row.metric:12}{row.method:12}{row.mean:8.2f}{spread:>18}{gain:>30}")
    return "\n".join(lines)


def main() -> int:
    """Run the command; returns its exit status."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("model", metavar="BUNDLE", help="a bundle's folder or a hub id, of a model of complex spectrograms")
    add("data", metavar="DATA", help="held-out sounds: a folder of audio, shards or a Hugging Face data set")
    add("--task", required=True, choices=TASKS)
    add("--items", type=int, default=30, help="sounds (default: 30)")
    add("--gap", type=float, default=50.0, help="inpaint: ms (default: 50)")
    add("--cutoff", type=float, default=4000.0, help="bandwidth: Hz (default: 4000)")
    add("--snr", type=float, default=10.0, help="denoise: dB (default: 10)")
    add("--rt60", type=float, default=0.5, help="dereverb: s (default: 0.5)")
    add("--blind", action="store_true", help="dereverb: the model isn't told the room")
    add("--seconds", type=float, default=3.0, help="of each sound; two windows of the model at least (default: 3)")
    add("--steps", type=int, default=50, help="of sampling (default: 50)")
    add("--eta", type=float, default=0.8)
    add("--eta-b", type=float, default=0.8)
    add("--seed", type=int, default=0)
    add("--device", default="auto")
    add("--json", action="store_true", help="print JSON instead of a table")
    return guarded(lambda: _run(parser.parse_args()))


def _run(args: argparse.Namespace) -> None:
    if args.items < 2:
        raise UserError(f"--items must be at least 2, got {args.items}")
    args.gap /= 1000  # ms
    how = DegradationSettings(**{name: getattr(args, name) for name in DegradationSettings.__dataclass_fields__})
    settings = RestoreSettings(steps=args.steps, eta=args.eta, eta_b=args.eta_b, seed=args.seed)
    restorer = Restorer.from_pretrained(args.model, args.device)
    scores = measure_methods(restorer, read_items(args.data), args.items, how, settings, args.seed)
    whole = {"degradation": asdict(how), "items": args.items, "scores": [asdict(row) for row in scores]}
    print_result(args.json, whole, restoration_table(scores, args.items, how))


if __name__ == "__main__":
    sys.exit(main())
