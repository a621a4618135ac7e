"""Time and peak memory of commands, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from evaluation.benchmarks.networks import Subject, play_window
from evaluation.benchmarks.table import Row
from evaluation.benchmarks.timing import Spread
from stable_audio_lite.audio.io import write_audio_blocks
from stable_audio_lite.errors import UserError

NOISE_RATE = 44100
_PROMPT = "solo piano, slow, classical"
_REFERENCE = 20  # clips
_LOAD = "import sys; from stable_audio_lite import StableAudio; StableAudio.from_pretrained(sys.argv[1], sys.argv[2])"
_MEASURED = """
import atexit, resource, runpy, sys
_, report, kind, what, *arguments = sys.argv

def tell():
    if sys.platform == "linux":  # where what getrusage says begins with the parent's
        with open("/proc/self/status") as lines:
            peak = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    with open(report, "w") as file:
        file.write(str(peak))

atexit.register(tell)
sys.argv = [what, *arguments]
if kind == "-m":
    runpy.run_module(what, run_name="__main__", alter_sys=True)
else:
    exec(what, {"__name__": "__main__"})
"""
"""Runs what `python` would, -m or -c, and leaves its peak memory in MB in a file."""
_WINDOW = """
import sys, torch
from evaluation.benchmarks.networks import Subject, play_window
play_window(Subject.of(sys.argv[1]), torch.device(sys.argv[2]), getattr(torch, sys.argv[3]))
"""


@dataclass(frozen=True)
class Ran:
    """Wall time and peak resident memory of a process."""

    seconds: float
    megabytes: float


def run_python(arguments: Sequence[str]) -> Ran:
    """Run Python with `arguments` in a new process.

    Raises:
        UserError: it fails; with the last line that it printed about it.
    """
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _MEASURED, str(report := Path(folder) / "peak"), *arguments]
        process = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - begun
        if process.returncode:
            said = (process.stderr.strip().splitlines() or [""])[-1]
            raise UserError(f"python {' '.join(arguments)}: failed ({said[:200]})")
        return Ran(seconds, float(report.read_text(encoding="utf-8")))


def load_rows(bundle: str, seconds: float, device: str, repeats: int) -> Iterator[Row]:
    """Measure from a command's start to a loaded model, and to a first sound on disk, with its memory.

    Raises:
        UserError: a command fails.
    """
    loads, sounds = [], []
    with tempfile.TemporaryDirectory() as folder:
        output = ["-o", str(Path(folder) / "sound.wav"), "--overwrite"]
        asked = ["--model", bundle, "--seconds", f"{seconds:g}", "--seed", "0", "--device", device]
        for turn in range(repeats + 1):
            pair = (
                run_python(["-c", _LOAD, bundle, device]),
                run_python(["-m", "stable_audio_lite.cli", "generate", _PROMPT, *asked, *output]),
            )
            if turn:  # the first fills the disk's cache
                loads.append(pair[0])
                sounds.append(pair[1])
    length = f"{seconds:g} s of sound"
    for what, how, unit, figure in (
        ("load", "a new process", "s", _spread(loads, "seconds")),
        ("first sound", f"a new process, {length}", "s", _spread(sounds, "seconds")),
        ("first sound, peak memory", length, "MB", _spread(sounds, "megabytes")),
    ):
        yield Row(part="load", what=what, how=how, unit=unit, figure=figure)


def codec_rows(bundle: str, minutes: Sequence[float], repeats: int) -> Iterator[Row]:
    """Measure the memory that encoding and decoding files of different lengths take.

    Raises:
        UserError: a command fails.
    """
    for length in minutes:
        peaks = []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as folder:
                peaks.append(codec_peaks(bundle, length, Path(folder)))
        for what, figures in zip(("encode", "decode"), zip(*peaks, strict=True), strict=True):
            how = f"a file of {length:g} min"
            yield Row(part="memory", what=f"{what}, peak memory", how=how, unit="MB", figure=Spread.of(figures))


def codec_peaks(bundle: str, minutes: float, folder: Path) -> tuple[float, float]:
    """Peak memory in MB of encoding and of decoding a file of `minutes`.

    Raises:
        UserError: a command fails.
    """
    sound, latents = folder / "noise.wav", folder / "noise.safetensors"
    write_audio_blocks(sound, noise(60 * minutes), NOISE_RATE)
    rest = ["--overwrite", "--model", bundle, "-o", str(folder)]
    encoding, decoding = (
        run_python(["-m", "stable_audio_lite.cli", command, str(file), *rest]).megabytes
        for command, file in (("encode", sound), ("decode", latents))
    )
    return encoding, decoding


def noise(seconds: float) -> Iterator[np.ndarray]:
    """Stereo noise, a second at a time."""
    rng = np.random.default_rng(0)
    left = round(seconds * NOISE_RATE)
    while left > 0:
        yield (0.1 * rng.standard_normal((2, min(left, NOISE_RATE)))).astype(np.float32)
        left -= NOISE_RATE


def window_rows(model: str, device: torch.device, dtype: torch.dtype, repeats: int) -> Iterator[Row]:
    """Measure the memory that a sound of the whole window takes, sampled and decoded in one go; on a GPU, its own.

    Raises:
        UserError: a command fails.
    """
    subject, peaks = Subject.of(model), []
    name = str(dtype).removeprefix("torch.")
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            play_window(subject, device, dtype)
            peaks.append(torch.cuda.max_memory_reserved(device) / 2**20)
        else:
            peaks.append(run_python(["-c", _WINDOW, model, str(device), name]).megabytes)
    how = f"{name}, {subject.config.window_seconds:.1f} s"
    yield Row(part="memory", what="whole window, peak memory", how=how, unit="MB", figure=Spread.of(peaks))


def evaluation_rows(clap: str, clips: Sequence[int], repeats: int) -> Iterator[Row]:
    """Measure the memory that evaluating few and many sounds takes, by Fréchet distance of CLAP embeddings.

    Raises:
        UserError: the evaluation fails.
    """
    for count in clips:
        figures = [evaluation_peak(count, 10.0, ["--metrics", "fd_clap", "--clap", clap]) for _ in range(repeats)]
        how = f"{count} clips of 10 s"
        yield Row(part="memory", what="evaluate, peak memory", how=how, unit="MB", figure=Spread.of(figures))


def evaluation_peak(count: int, seconds: float, options: Sequence[str]) -> float:
    """Peak resident memory in MB of evaluating that many clips against 20 others, with nothing kept from before.

    Raises:
        UserError: the evaluation fails.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = [_write_clips(folder / str(seed), n, seconds, seed) for seed, n in enumerate((count, _REFERENCE))]
        places = ["--cache", str(folder / "cache"), "-o", str(folder / "result.json")]
        return run_python(["-m", "evaluation.run", *map(str, sources), *places, *options]).megabytes


def _write_clips(folder: Path, count: int, seconds: float, seed: int) -> Path:
    """Write `count` different stereo clips, of a few bits a sample so that many of them fit on a disk."""
    import soundfile

    folder.mkdir()
    rng = np.random.default_rng(seed)
    for number in range(count):
        samples = rng.integers(-4, 5, (round(seconds * NOISE_RATE), 2), np.int16)
        soundfile.write(folder / f"{number:05d}.flac", samples, NOISE_RATE)
    return folder


def _spread(runs: Sequence[Ran], name: str) -> Spread:
    return Spread.of([getattr(run, name) for run in runs])
