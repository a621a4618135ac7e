"""Memory that evaluating few and many sounds takes.

    python -m evaluation.benchmarks.memory --clips 100 1000
    python -m evaluation.benchmarks.memory --clips 100 1000 --metrics fd_openl3,fd_clap --weights weights

Writes clips of faint noise, runs `python -m evaluation.run` on them against 20 others, in a process of its own and
without what an earlier run kept, and prints its peak resident memory. Options beyond these go to that command.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from stable_audio_lite.command import Parser, guarded
from stable_audio_lite.errors import UserError

NOISE_RATE = 44100
_REFERENCE = 20  # clips


def peak_megabytes(module: str, arguments: list[str]) -> float:
    """Peak resident memory of `python -m MODULE ARGUMENTS`.

    Raises:
        UserError: the command fails.
    """
    process = subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"python -m {module} {' '.join(arguments)}: failed")
    return usage.ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)


def write_clips(folder: Path, count: int, seconds: float, seed: int) -> Path:
    """Write `count` different stereo clips, of a few bits a sample so that many of them fit on a disk."""
    import soundfile

    folder.mkdir()
    rng = np.random.default_rng(seed)
    for number in range(count):
        samples = rng.integers(-4, 5, (round(seconds * NOISE_RATE), 2), np.int16)
        soundfile.write(folder / f"{number:05d}.flac", samples, NOISE_RATE)
    return folder


def evaluation_peak(count: int, seconds: float, options: list[str]) -> float:
    """Peak resident memory in MB of evaluating that many clips.

    Raises:
        UserError: the evaluation fails.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = [write_clips(folder / str(seed), n, seconds, seed) for seed, n in enumerate((count, _REFERENCE))]
        places = ["--cache", str(folder / "cache"), "-o", str(folder / "result.json")]
        return peak_megabytes("evaluation.run", [*map(str, sources), *places, *options])


def main() -> int:
    """Run the command; returns its exit status."""
    parser = Parser(description=__doc__)
    parser.add_argument("--clips", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--seconds", type=float, default=10.0)
    args, options = parser.parse_known_args()
    return guarded(lambda: _run(args, options or ["--metrics", "fd_clap", "--clap", "starter"]))


def _run(args: argparse.Namespace, options: list[str]) -> None:
    first: float | None = None
    for count in args.clips:
        peak = evaluation_peak(count, args.seconds, options)
        first = first or peak
        print(f"{count} clips of {args.seconds:g} s: {peak:.0f} MB ({peak / first:.2f}x)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
