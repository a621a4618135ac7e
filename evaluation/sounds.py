"""The sounds of an evaluation: what lies in each file, what was asked for, and what was done about odd ones.

Every file is read through once. What can't be read, or holds no samples, is left out with the reason; all else is
evaluated, and `treatments` says how it was fitted to the metrics.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evaluation.result import SoundRecord
from stable_audio_lite import bundle
from stable_audio_lite.audio.io import AudioSource, Stored, audio_blocks, audio_hash, audio_info, read_metadata
from stable_audio_lite.codec import Codec
from stable_audio_lite.data.item import Item
from stable_audio_lite.files import sha256

DESCRIBED_SECONDS = 300.0
"""Seconds from the beginning of a file by which it is described, and its loudness measured."""

_USUAL_RATE = 44100
_FULL_BAND = 32000  # Hz: a lower rate lacks frequencies that others have and networks take in
_SHORT = 1.0  # seconds of OpenL3's window, the shortest


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A sound that can be embedded.

    Attributes:
        source: the file; of a made clip, the recording that it is made from.
        key: names the samples: the file's SHA-256, and what is done to them.
        record: what is reported of it.
        make: writes what is to be embedded instead to a path; None: the file itself is.
    """

    source: AudioSource
    key: str
    record: SoundRecord
    make: Callable[[Path], None] | None = None

    @contextlib.contextmanager
    def file(self) -> Iterator[AudioSource]:
        """The file that holds the sound, while it is needed."""
        if self.make is None:
            yield self.source
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "made.wav"
            self.make(path)
            yield path


def read_clip(item: Item, prompts: Collection[str] = ()) -> Clip:
    """Read a file through. Of several captions, the first that is among `prompts`, or the first.

    Raises:
        UserError: it is missing, broken, empty or holds NaN.
    """
    info = audio_info(item.path)
    peak = max(float(abs(block).max()) for block in audio_blocks(item.path))
    stored = {} if isinstance(item.path, Stored) else read_metadata(item.path).settings
    prompt = next((c for c in item.captions if c in prompts), next(iter(item.captions), stored.get("prompt", "")))
    record = SoundRecord(
        path=str(item.path),
        seconds=info.seconds,
        sample_rate=info.sample_rate,
        channels=info.channels,
        treatment=treatments(info.sample_rate, info.channels, info.seconds, silent=not peak),
        prompt=prompt if isinstance(prompt, str) else "",
        requested=_requested(item.metadata) or _requested(stored),
    )
    return Clip(source=item.path, key=audio_hash(item.path), record=record)


def treatments(sample_rate: int, channels: int, seconds: float, *, silent: bool) -> tuple[str, ...]:
    """Words for what is done to a sound of this kind before it is measured."""
    found = []
    if channels != 2:
        found.append("mono: both channels alike" if channels == 1 else f"{channels} channels: mixed by ITU-R BS.775")
    if sample_rate < _FULL_BAND:
        found.append(f"{sample_rate} Hz: resampled, nothing above {sample_rate / 2:g} Hz")
    elif sample_rate != _USUAL_RATE:
        found.append(f"{sample_rate} Hz: resampled")
    if seconds < _SHORT:
        found.append(f"{seconds:.2f} s: filled up with silence (OpenL3), as it is (PaSST), repeated (CLAP)")
    if seconds > DESCRIBED_SECONDS:
        found.append(f"{seconds:.0f} s: width and structure of the first {DESCRIBED_SECONDS:.0f} s, no end looked for")
    if silent:
        found.append("silent: at no level, else as any other")
    return tuple(found)


def _requested(row: dict[str, Any]) -> float | None:
    """The length in seconds that a generated file's settings, or a list's row, say was asked for."""
    asked = [_number(row.get("seconds"))]
    if (total := _number(row.get("seconds_total"))) is not None:
        asked.append(total - (_number(row.get("seconds_start")) or 0.0))
    known = [seconds for seconds in asked if seconds is not None and seconds > 0]
    return min(known, default=None)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def white_noise(clip: Clip) -> Clip:
    """Noise as long as a recording, another in each channel and for each recording, at its rate."""

    def make(path: Path) -> None:
        import numpy as np
        import soundfile

        left, rate = round(clip.record.seconds * clip.record.sample_rate), clip.record.sample_rate
        rng = np.random.default_rng(int(clip.key[:16], 16))
        try:
            with soundfile.SoundFile(str(path), "w", rate, 2, format="RF64", subtype="FLOAT") as file:
                while left > 0:
                    file.write(0.1 * rng.standard_normal((min(left, rate), 2), np.float32))
                    left -= rate
        except soundfile.SoundFileError as error:
            raise OSError(f"{path}: can't be written ({error}); free some space") from error

    return _made(clip, "noise", make)


def _made(clip: Clip, how: str, make: Callable[[Path], None]) -> Clip:
    record = replace(clip.record, treatment=(), requested=None)
    return Clip(source=clip.source, key=f"{clip.key} {how}", record=record, make=make)


class VAERoundTrip:
    """A bundle's VAE, by which recordings are encoded and decoded: the best that its model can do."""

    def __init__(self, name: str, device: str):
        """Load it from "starter", a folder or a hub id.

        Raises:
            UserError: there is no such bundle or device, or a file is damaged.
        """
        self.codec = Codec.from_pretrained(name, device, "float32")
        self.hash = sha256(bundle.part_path(bundle.resolve(name), "vae"))[:12]

    def __call__(self, clip: Clip) -> Clip:
        """The clip that the VAE makes of a recording."""

        def make(path: Path) -> None:
            latents = path.with_suffix(".safetensors")
            self.codec.encode_file(clip.source, latents)
            self.codec.decode_file(latents, path)

        return _made(clip, f"vae {self.hash}", make)
