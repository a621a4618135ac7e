"""Memory that encoding and decoding files of different lengths takes.

    python -m evaluation.benchmarks.streaming starter --minutes 1 10

Writes noise of each length, runs `stable-audio-lite encode` and `decode` on it, each in a process of its own, and
prints their peak resident memory.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from evaluation.benchmarks.memory import NOISE_RATE, peak_megabytes
from stable_audio_lite.audio.io import write_audio_blocks
from stable_audio_lite.command import Parser, guarded


def noise(seconds: float) -> Iterator[np.ndarray]:
    """Stereo noise, a second at a time."""
    rng = np.random.default_rng(0)
    left = round(seconds * NOISE_RATE)
    while left > 0:
        yield (0.1 * rng.standard_normal((2, min(left, NOISE_RATE)))).astype(np.float32)
        left -= NOISE_RATE


def codec_peaks(bundle: str, minutes: float, folder: Path) -> tuple[float, float]:
    """Peak memory in MB of encoding and of decoding a file of `minutes`."""
    sound, latents = folder / "noise.wav", folder / "noise.safetensors"
    write_audio_blocks(sound, noise(60 * minutes), NOISE_RATE)
    model = ["--model", bundle, "-o", str(folder)]
    encoding = peak_megabytes("stable_audio_lite.cli", ["encode", str(sound), "--overwrite", *model])
    return encoding, peak_megabytes("stable_audio_lite.cli", ["decode", str(latents), "--overwrite", *model])


def main() -> int:
    """Run the command; returns its exit status."""
    parser = Parser(description=__doc__)
    parser.add_argument("bundle", help="'starter', a bundle's folder or a hub id")
    parser.add_argument("--minutes", type=float, nargs="+", default=[1.0, 10.0])
    return guarded(lambda: _run(parser.parse_args()))


def _run(args: argparse.Namespace) -> None:
    first: tuple[float, float] | None = None
    for minutes in args.minutes:
        with tempfile.TemporaryDirectory() as folder:
            peaks = codec_peaks(args.bundle, minutes, Path(folder))
        first = first or peaks
        encoding, decoding = (f"{peak:.0f} MB ({peak / one:.2f}x)" for peak, one in zip(peaks, first, strict=True))
        print(f"{minutes:g} min: encode {encoding}, decode {decoding}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
