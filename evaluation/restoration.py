"""Does restoration help? Held-out sounds are spoiled and repaired: by nothing, by classical means, by the model.

    python -m evaluation.restoration BUNDLE corpus/held_out --task inpaint --items 30
    python -m evaluation.restoration BUNDLE corpus/held_out --task dereverb --rt60 0.8 --blind --json

A stretch of each sound, `--seconds` or two windows of the model long, is spoiled in one way:

- inpaint: `--gap` ms in its middle are silent; "line" draws the waveform straight across the gap, "magnitudes" draws
  those of the spectrogram across it and lets phases turn on as they did before
- bandwidth: frequencies above `--cutoff` are cut; "octave" repeats the octave below it above it, 12 dB quieter
- denoise: white noise of `--snr` dB; "wiener" is a filter by spectral subtraction, its noise known
- dereverb: a room whose noise decays by 60 dB in `--rt60` s; "wpe" is weighted prediction error. With `--blind` the
  room is estimated, otherwise it is known to the model (not to WPE)

SI-SDR of the stretch, and the log-spectral distance over the frames of the gap, the rows above the cut-off, or
everything: each with its 95 % bootstrap interval, as is the difference between restoration and each other answer on the
same sounds. Sounds that are shorter, or silent in the middle, are passed over.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.bootstrap import interval
from evaluation.reconstruction import si_sdr
from stable_audio_lite.audio.io import read_audio
from stable_audio_lite.audio.spectrogram import Spectrogram, SpectrogramConfig
from stable_audio_lite.data.manifest import Item, read_items
from stable_audio_lite.errors import UserError
from stable_audio_lite.restoration.degradations import Bandwidth, Degradation, Denoise, Dereverb, Inpaint, noise_std
from stable_audio_lite.restoration.restorer import Restorer, RestoreSettings
from stable_audio_lite.restoration.room import convolve
from stable_audio_lite.restoration.wpe import wpe

TASKS = ("inpaint", "bandwidth", "denoise", "dereverb")
WINDOWS = 2  # of the model, that a stretch is long at least
_FLOOR = 1e-4  # -80 dB: magnitude, relative to the loudest, below which a cell counts as silent
_REVERB_DB = -3.0  # energy of a room's reverberation relative to its direct sound


@dataclass(frozen=True, kw_only=True)
class Spoiled:
    """A sound and what was done to it.

    Attributes:
        clean: (1, T).
        heard: (1, T), what is left of it.
        task: for the model.
        classical: (1, T) by name, the classical answers.
        cells: boolean, broadcastable to (F, frames), which the log-spectral distance is measured over.
    """

    clean: Tensor
    heard: Tensor
    task: Degradation
    classical: dict[str, Tensor]
    cells: Tensor


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Mean over the sounds with its 95 % interval; `gain` is that of restoration minus this answer, paired."""

    answer: str
    measure: str
    mean: float
    low: float
    high: float
    gain: float
    gain_low: float
    gain_high: float


@dataclass(frozen=True, kw_only=True)
class Spoiling:
    """How sounds are spoiled: see the options of the command."""

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
        if min(self.gap, self.cutoff, self.rt60, self.seconds) <= 0 or not math.isfinite(self.snr):
            raise UserError("--gap, --cutoff, --rt60 and --seconds must be above 0, and --snr finite")

    def samples(self, config: SpectrogramConfig) -> int:
        """Samples of a stretch: two windows of the model at least, and whole frames."""
        frames = math.ceil(self.seconds * config.sample_rate / config.hop)
        return max(frames, WINDOWS * config.frames) * config.hop


def spoil(clean: Tensor, how: Spoiling, spectrogram: Spectrogram, seed: int) -> Spoiled:
    """Spoil (1, T) sound, T a multiple of the hop, by the generator of `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return {"inpaint": _gap, "bandwidth": _band, "denoise": _noise, "dereverb": _room}[how.task](
        clean, how, spectrogram, generator
    )


def _gap(clean: Tensor, how: Spoiling, spectrogram: Spectrogram, generator: torch.Generator) -> Spoiled:
    config = spectrogram.config
    first = (clean.shape[1] - round(how.gap * config.sample_rate)) // 2
    last = clean.shape[1] - first
    heard = clean.clone()
    heard[:, first:last] = 0
    task = Inpaint(((first / config.sample_rate, last / config.sample_rate),))
    unknown = task.observe(spectrogram, clean[0], 1).operator.singular[0] == 0
    line, magnitudes = heard.clone(), heard.clone()
    line[0, first:last] = torch.lerp(heard[0, first - 1], heard[0, last], torch.linspace(0, 1, last - first + 2)[1:-1])
    magnitudes[:, first:last] = spectrogram.decode(interpolate(spectrogram.encode(heard), unknown))[:, first:last]
    classical = {"line": line, "magnitudes": magnitudes}
    return Spoiled(clean=clean, heard=heard, task=task, classical=classical, cells=unknown[None])


def interpolate(x: Tensor, unknown: Tensor) -> Tensor:
    """Fill unknown frames of (1, 2, F, T), which are neighbours: magnitudes on a line, phases turning on as before."""
    z = torch.complex(x[0, 0], x[0, 1])
    first, last = int(unknown.nonzero()[0]), int(unknown.nonzero()[-1])
    before, after = z[:, first - 1], z[:, min(last + 1, z.shape[1] - 1)]
    steps = torch.arange(1, last - first + 2) / (last - first + 2)
    magnitude = before.abs()[:, None] * (1 - steps) + after.abs()[:, None] * steps
    turn = (z[:, first - 1] * z[:, first - 2].conj()).angle()[:, None] * torch.arange(1, last - first + 2)
    z[:, first : last + 1] = torch.polar(magnitude, before.angle()[:, None] + turn)
    return torch.stack((z.real, z.imag))[None]


def _band(clean: Tensor, how: Spoiling, spectrogram: Spectrogram, generator: torch.Generator) -> Spoiled:
    config = spectrogram.config
    task = Bandwidth(how.cutoff)
    known = task.observe(spectrogram, clean[0], 1).operator.singular[:, 0] > 0
    spectrum = torch.fft.rfft(clean)
    hertz = torch.arange(spectrum.shape[1]) * config.sample_rate / clean.shape[1]
    heard = torch.fft.irfft(spectrum * (hertz <= how.cutoff), clean.shape[1])
    x = spectrogram.encode(heard)
    count = int(known.sum())
    fill = x.clone()
    rows = torch.arange(count, config.bins)
    fill[:, :, rows] = x[:, :, count - 1 - (rows - count) % max(1, count // 2)] * 0.25
    return Spoiled(
        clean=clean,
        heard=heard,
        task=task,
        classical={"octave": spectrogram.decode(fill)},
        cells=~known[:, None],
    )


def _noise(clean: Tensor, how: Spoiling, spectrogram: Spectrogram, generator: torch.Generator) -> Spoiled:
    level = float(clean.square().mean().sqrt()) * 10 ** (-how.snr / 20)
    heard = clean + level * torch.randn(clean.shape, generator=generator)
    level_db = 20 * math.log10(level)
    y = spectrogram.encode(heard)
    noise = 2 * noise_std(spectrogram.config, level_db) ** 2
    power = F.avg_pool1d(y.square().sum(1), 3, stride=1, padding=1, count_include_pad=False)
    gain = (1 - noise / power.clamp_min(1e-20)).clamp_min(0.01)
    return Spoiled(
        clean=clean,
        heard=heard,
        task=Denoise(level_db),
        classical={"wiener": spectrogram.decode(y * gain[:, None])},
        cells=torch.ones(1, 1, dtype=torch.bool),
    )


def room_response(rt60: float, sample_rate: int, generator: torch.Generator) -> Tensor:
    """Direct sound, then noise from 5 ms on that decays by 60 dB in `rt60` s: (T,)."""
    time = torch.arange(round(1.2 * rt60 * sample_rate)) / sample_rate
    tail = torch.randn(time.shape, generator=generator) * 10 ** (-3 * time / rt60) * (time >= 0.005)
    response = tail * 10 ** (_REVERB_DB / 20) / tail.square().sum().sqrt()
    response[0] = 1
    return response


def _room(clean: Tensor, how: Spoiling, spectrogram: Spectrogram, generator: torch.Generator) -> Spoiled:
    response = room_response(how.rt60, spectrogram.config.sample_rate, generator)
    heard = convolve(clean[0], response)[None]
    return Spoiled(
        clean=clean,
        heard=heard,
        task=Dereverb(None if how.blind else response),
        classical={"wpe": spectrogram.decode(wpe(spectrogram.encode(heard)))},
        cells=torch.ones(1, 1, dtype=torch.bool),
    )


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


def evaluate(
    restorer: Restorer, items: Sequence[Item], count: int, how: Spoiling, settings: RestoreSettings, seed: int = 0
) -> list[Figure]:
    """Figures of every answer over the first `count` items that are long enough and audible.

    Raises:
        UserError: there are fewer.
    """
    from tqdm import tqdm

    rows: dict[str, list[tuple[float, float]]] = {}
    spectrogram = restorer.spectrogram
    stretches = (clean for item in items if (clean := stretch(item, spectrogram, how)) is not None)
    for number, clean in enumerate(tqdm(itertools.islice(stretches, count), total=count, unit="sound")):
        spoiled = spoil(clean, how, spectrogram, seed + number)
        own = dataclasses.replace(settings, seed=seed + number)
        found = restorer.restore(spoiled.heard, spoiled.task, own)
        for name, answer in {"nothing": spoiled.heard, **spoiled.classical, "restoration": found}.items():
            distance = log_spectral_distance(spectrogram, answer, clean, spoiled.cells)
            rows.setdefault(name, []).append((si_sdr(answer, clean), distance))
    if (usable := len(rows.get("nothing", []))) < count:
        seconds = how.samples(spectrogram.config) / spectrogram.config.sample_rate
        raise UserError(f"{usable} of the {len(items)} sounds have {seconds:.1f} s of sound, --items asks for {count}")
    return figures(rows)


def stretch(item: Item, spectrogram: Spectrogram, how: Spoiling) -> Tensor | None:
    """The first stretch of a sound as mono (1, T), or None where it is shorter or its middle is silent."""
    config = spectrogram.config
    samples = how.samples(config)
    audio = read_audio(item.path, config.sample_rate, 0.0, samples / config.sample_rate).mean(0, keepdim=True)
    if audio.shape[1] < samples:
        return None
    middle = round(how.gap * config.sample_rate) // 2
    loud = audio[:, samples // 2 - middle : samples // 2 + middle].square().mean().sqrt()
    return audio if loud > 1e-3 else None


def figures(rows: dict[str, list[tuple[float, float]]]) -> list[Figure]:
    """Means and intervals of (SI-SDR, distance) of each answer, and what restoration gains on it."""
    found = []
    for index, measure in enumerate(("SI-SDR dB", "LSD dB")):
        best = np.array([row[index] for row in rows["restoration"]])
        for answer, values in rows.items():
            own = np.array([row[index] for row in values])
            low, high = interval(own)
            gain_low, gain_high = interval(best - own)
            found.append(
                Figure(
                    answer=answer,
                    measure=measure,
                    mean=float(own.mean()),
                    low=low,
                    high=high,
                    gain=float((best - own).mean()),
                    gain_low=gain_low,
                    gain_high=gain_high,
                )
            )
    return found


def as_text(found: Sequence[Figure], count: int, how: Spoiling) -> str:
    """A table."""
    lines = [f"{how.task}, {count} sounds", f"{'':12}{'':12}{'mean':>8}{'95 %':>18}{'restoration minus it':>30}"]
    for row in found:
        gain = f"{row.gain:+.2f} ({row.gain_low:+.2f} to {row.gain_high:+.2f})" if row.answer != "restoration" else ""
        spread = f"{row.low:.2f} to {row.high:.2f}"
        lines.append(f"{row.measure:12}{row.answer:12}{row.mean:8.2f}{spread:>18}{gain:>30}")
    return "\n".join(lines)


def main() -> None:
    """Run the command; mistakes end in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    args = parser.parse_args()
    try:
        if args.items < 2:
            raise UserError(f"--items must be at least 2, got {args.items}")
        how = Spoiling(
            task=args.task,
            gap=args.gap / 1000,
            cutoff=args.cutoff,
            snr=args.snr,
            rt60=args.rt60,
            blind=args.blind,
            seconds=args.seconds,
        )
        settings = RestoreSettings(steps=args.steps, eta=args.eta, eta_b=args.eta_b, seed=args.seed)
        restorer = Restorer.from_pretrained(args.model, args.device)
        found = evaluate(restorer, read_items(args.data), args.items, how, settings, args.seed)
    except UserError as error:
        sys.exit(f"error: {error}")
    whole = {"spoiling": asdict(how), "items": args.items, "figures": [asdict(row) for row in found]}
    print(json.dumps(whole, indent=2) if args.json else as_text(found, args.items, how))


if __name__ == "__main__":
    main()
