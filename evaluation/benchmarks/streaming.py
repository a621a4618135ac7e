"""Memory that encoding and decoding files of different lengths takes.

    python -m evaluation.benchmarks.streaming starter --minutes 1 10

Writes noise of each length, runs `stable-audio-lite encode` and `decode` on it, each in a process of its own, and
prints their peak resident memory.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from stable_audio_lite.audio.io import write_audio_blocks
from stable_audio_lite.errors import UserError

SAMPLE_RATE = 44100


def noise(seconds: float) -> Iterator[np.ndarray]:
    """Stereo noise, a second at a time."""
    rng = np.random.default_rng(0)
    left = round(seconds * SAMPLE_RATE)
    while left > 0:
        yield (0.1 * rng.standard_normal((2, min(left, SAMPLE_RATE)))).astype(np.float32)
        left -= SAMPLE_RATE


def peak_megabytes(arguments: list[str]) -> float:
    """Peak resident memory of one `stable-audio-lite` command.

    Raises:
        UserError: the command fails.
    """
    process = subprocess.Popen([sys.executable, "-m", "stable_audio_lite.cli", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"stable-audio-lite {' '.join(arguments)}: failed")
    return usage.ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)


def measure(bundle: str, minutes: float, folder: Path) -> tuple[float, float]:
    """Peak memory in MB of encoding and of decoding a file of `minutes`."""
    sound, latents = folder / "noise.wav", folder / "noise.safetensors"
    write_audio_blocks(sound, noise(60 * minutes), SAMPLE_RATE)
    model = ["--model", bundle, "-o", str(folder)]
    encoding = peak_megabytes(["encode", str(sound), *model])
    return encoding, peak_megabytes(["decode", str(latents), "--overwrite", *model])


def main() -> None:
    """Print a line for each length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="'starter', a bundle's folder or a hub id")
    parser.add_argument("--minutes", type=float, nargs="+", default=[1.0, 10.0])
    args = parser.parse_args()
    first: tuple[float, float] | None = None
    for minutes in args.minutes:
        with tempfile.TemporaryDirectory() as folder:
            try:
                encoding, decoding = measure(args.bundle, minutes, Path(folder))
            except UserError as error:
                sys.exit(f"error: {error}")
        first = first or (encoding, decoding)
        print(
            f"{minutes:g} min: encode {encoding:.0f} MB ({encoding / first[0]:.2f}x), "
            f"decode {decoding:.0f} MB ({decoding / first[1]:.2f}x)",
            flush=True,
        )


if __name__ == "__main__":
    main()
