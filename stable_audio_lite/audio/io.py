"""Audio files in and out.

Reading seeks to the wanted stretch, so a short crop of an hour-long file costs what a short file costs, except in MP3
and what only ffmpeg reads. Any rate and channel count becomes stereo at the wanted rate: mono is duplicated, more
channels are mixed by the weights of ITU-R BS.775, the rate is changed by soxr. Writing is 24-bit WAV or FLAC,
attenuated only where it would clip, with the prompt and the settings stored inside the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import struct
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stable_audio_lite.audio.decoding import AudioFile, AudioSource, Stored
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import check_place, replacing

if TYPE_CHECKING:
    import torch

WRITABLE = (".wav", ".flac")
SOFTWARE = "Stable Audio Lite"
OPUS_RATE = 48000
"""Hz of sound in Opus, which knows no 44.1 kHz."""

# Seconds read on each side of a crop, so that its edges are resampled as they would be inside the whole file.
_MARGIN = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioInfo:
    """A file's rate in Hz, channels, length in sample frames and in seconds."""

    sample_rate: int
    channels: int
    frames: int

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return self.frames / self.sample_rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metadata:
    """The prompt (or None) and the settings that `write_audio` stored inside a file."""

    title: str | None
    settings: dict[str, Any]


def audio_info(path: AudioSource) -> AudioInfo:
    """Read a file's rate, channels and length, which is that of the whole decoded file.

    Raises:
        UserError: as `AudioFile`.
    """
    with AudioFile(path) as file:
        return AudioInfo(sample_rate=file.sample_rate, channels=file.channels, frames=file.frames)


def read_audio(
    path: AudioSource, sample_rate: int = 44100, start_seconds: float = 0.0, seconds: float | None = None
) -> torch.Tensor:
    """Read a stretch of a file as stereo: (2, T) float32, full scale is 1, T = round(seconds * sample_rate).

    T is smaller where the file ends before the stretch does. `seconds` None reads to the end.

    Raises:
        UserError: the file is missing, truncated, empty, not audio or holds NaN, or the stretch starts after its end.
    """
    import torch

    if start_seconds < 0 or (seconds is not None and seconds <= 0):
        raise UserError(f"{path}: can't read {seconds} s from {start_seconds} s; give start >= 0 and seconds > 0")
    with AudioFile(path) as file:
        rate, length = file.sample_rate, file.frames
        first = round(start_seconds * rate)
        if first >= length:
            raise UserError(f"{path}: has {length / rate:.2f} s, so nothing starts at {start_seconds:.2f} s")
        margin = 0 if rate == sample_rate else math.ceil(_MARGIN * rate)
        last = length if seconds is None else min(length, first + math.ceil(seconds * rate))
        begin = max(0, first - margin)
        samples = file.to_stereo(file.read(begin, min(length, last + margin)))
    wanted = (last - first) / rate if seconds is None else min(seconds, (length - first) / rate)
    if rate != sample_rate:
        samples = resample(samples, rate, sample_rate)
    skip = round((first - begin) * sample_rate / rate)
    stretch = samples[:, skip : skip + round(wanted * sample_rate)]
    return torch.from_numpy(np.ascontiguousarray(stretch))


def audio_hash(path: AudioSource) -> str:
    """Hexadecimal SHA-256 of the stored bytes, whatever they decode to."""
    with path.open() if isinstance(path, Stored) else open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def audio_blocks(path: AudioSource, frames: int = 1 << 18, stereo: bool = False) -> Iterator[np.ndarray]:
    """A whole file at its own rate as successive (C, <= frames) float32 arrays, with all its channels or as stereo.

    Raises:
        UserError: as `read_audio`, once reading reaches the fault.
    """
    with AudioFile(path) as file:
        for begin in range(0, file.frames, frames):
            block = file.read(begin, min(begin + frames, file.frames))
            yield file.to_stereo(block) if stereo else block


def stereo_blocks(path: AudioSource, sample_rate: int, frames: int = 1 << 18) -> Iterator[torch.Tensor]:
    """Read a whole file as `read_audio` does, in successive (2, T) pieces; memory does not grow with the file.

    Raises:
        UserError: as `read_audio`, once reading reaches the fault.
    """
    import torch

    rate = audio_info(path).sample_rate
    for block in resample_blocks(audio_blocks(path, frames, stereo=True), rate, sample_rate, 2):
        if block.shape[1]:
            yield torch.from_numpy(np.ascontiguousarray(block))


def resample_blocks(blocks: Iterable[np.ndarray], rate: int, new_rate: int, channels: int) -> Iterator[np.ndarray]:
    """Resample (channels, T) blocks as `resample` does all of them together; some of the pieces may be empty."""
    if rate == new_rate:
        yield from blocks
        return
    import soxr

    stream = soxr.ResampleStream(rate, new_rate, channels, dtype="float32", quality="HQ")
    for block in blocks:
        yield stream.resample_chunk(np.array(block.T, order="C")).T
    yield stream.resample_chunk(np.zeros((0, channels), np.float32), last=True).T


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Change the rate of (C, T) samples from `rate` to `new_rate` Hz with soxr's high-quality setting."""
    if rate == new_rate:
        return samples
    import soxr

    # A copy in C order: soxr doesn't take a single frame whose array is a transposed view.
    return soxr.resample(np.array(samples.T, order="C"), rate, new_rate, quality="HQ").T.astype(np.float32)


def check_writable(path: str | Path) -> None:
    """Check, before the work begins, that `write_audio` can write to `path`; leaves nothing behind.

    Raises:
        UserError: the suffix is not one of `WRITABLE`, `path` is a folder, or its folder can't be written.
    """
    path = Path(path)
    if path.suffix.lower() not in WRITABLE:
        raise UserError(f"{path}: unknown suffix '{path.suffix}'; allowed: {', '.join(WRITABLE)}")
    check_place(path)


def write_audio(path: str | Path, samples: Any, sample_rate: int, metadata: dict[str, Any] | None = None) -> float:
    """Write (C, T) float samples, a tensor or an array, as 24-bit WAV or FLAC, by suffix.

    `metadata` is stored inside the file: its "prompt" as the title, all of it as JSON in the comment; `read_metadata`
    reads it back.

    Returns:
        The gain applied: 1.0, or less where the peak would have clipped.

    Raises:
        UserError: unknown suffix, NaN or infinite samples, or the place can't be written.
    """
    path = Path(path)
    check_writable(path)
    values = _finite(path, samples)
    gain = 1.0 / max(float(np.abs(values).max(initial=0.0)), 1.0)
    encoded = encode_audio(values * gain, sample_rate, path.suffix.lower(), metadata)
    with replacing(path) as temporary:
        temporary.write_bytes(encoded)
    return gain


def encode_audio(samples: np.ndarray, sample_rate: int, suffix: str, metadata: dict[str, Any] | None = None) -> bytes:
    """Encode (C, T) samples within -1..1 as a 24-bit ".wav" or ".flac", or as ".opus", as `write_audio` does."""
    tags = _tags(metadata)
    if suffix == ".wav":
        return _with_wav_tags(_encode(samples, sample_rate, "WAV", "PCM_24", {}), tags)
    if suffix == ".flac":
        return _encode(samples, sample_rate, "FLAC", "PCM_24", tags)
    return _encode(resample(samples, sample_rate, OPUS_RATE), OPUS_RATE, "OGG", "OPUS", tags)


def write_audio_blocks(
    path: str | Path, blocks: Iterable[Any], sample_rate: int, metadata: dict[str, Any] | None = None, channels: int = 2
) -> float:
    """Write (channels, T) blocks as `write_audio` does all together; they wait on disk until the peak is known.

    Returns:
        The gain applied: 1.0, or less where the peak would have clipped.

    Raises:
        UserError: as `write_audio`.
    """
    import soundfile

    path = Path(path)
    check_writable(path)
    container = path.suffix[1:].upper()
    peak = 0.0
    try:
        with replacing(path) as final, tempfile.TemporaryFile(dir=final.parent) as raw:
            for block in blocks:
                values = _finite(path, block)
                if values.shape[0] != channels:
                    raise ValueError(f"expected blocks ({channels}, T), got {values.shape}")
                peak = max(peak, float(np.abs(values).max(initial=0.0)))
                raw.write(values.T.tobytes())
            gain = 1.0 / max(peak, 1.0)
            raw.seek(0)
            tags = _tags(metadata) if metadata else {}
            with soundfile.SoundFile(
                str(final), "w", sample_rate, channels, format=container, subtype="PCM_24"
            ) as file:
                for name, text in tags.items() if container == "FLAC" else ():
                    setattr(file, name, text)
                while data := raw.read(4 * channels << 18):
                    file.write(np.frombuffer(data, np.float32).reshape(-1, channels) * gain)
            if tags and container == "WAV":
                _append_wav_tags(final, tags)
    except soundfile.SoundFileError as error:
        raise UserError(f"{path}: can't be written ({error}); free some space, or choose .flac beyond 4 GB") from error
    return gain


def _finite(path: Path, samples: Any) -> np.ndarray:
    values = np.asarray(samples, dtype=np.float32)
    if not np.isfinite(values).all():
        raise UserError(f"{path}: not written, the audio holds NaN or infinite samples (try dtype float32)")
    return values


def read_metadata(path: AudioSource) -> Metadata:
    """Read back what `write_audio` stored; settings are empty where the file holds none of ours.

    Raises:
        UserError: the file is missing or not audio.
    """
    with AudioFile(path) as file:
        tags = _read_wav_tags(path) if file.format == "WAV" else file.tags
    try:
        settings = json.loads(tags.get("comment") or "{}")
    except (ValueError, RecursionError):  # a comment that somebody else wrote
        settings = {}
    return Metadata(title=tags.get("title") or None, settings=settings if isinstance(settings, dict) else {})


def _tags(metadata: dict[str, Any] | None) -> dict[str, str]:
    tags = {"software": SOFTWARE}
    if metadata:
        tags["title"] = str(metadata.get("prompt", ""))
        tags["comment"] = json.dumps(metadata, ensure_ascii=False)
    return tags


def _encode(samples: np.ndarray, sample_rate: int, container: str, subtype: str, tags: dict[str, str]) -> bytes:
    """Encode in memory: a full disk is then an ordinary error of one write."""
    import soundfile

    buffer = io.BytesIO()
    channels = len(samples)
    with soundfile.SoundFile(buffer, "w", sample_rate, channels, format=container, subtype=subtype) as file:
        for name, text in tags.items():
            if text:
                setattr(file, name, text)
        file.write(samples.T)
    return buffer.getvalue()


# libsndfile silently drops WAV texts beyond 2 kB, so the INFO chunk is written and read here.
_WAV_IDS = {"title": b"INAM", "comment": b"ICMT", "software": b"ISFT"}


def _wav_list(tags: dict[str, str]) -> bytes:
    info = b"INFO"
    for name, text in tags.items():
        data = text.encode("utf-8") + b"\0"
        info += _WAV_IDS[name] + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
    return b"LIST" + struct.pack("<I", len(info)) + info


def _with_wav_tags(wav: bytes, tags: dict[str, str]) -> bytes:
    body = wav[8:] + b"\0" * (len(wav) % 2) + _wav_list(tags)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _append_wav_tags(path: Path, tags: dict[str, str]) -> None:
    with path.open("r+b") as file:
        size = file.seek(0, io.SEEK_END)
        file.write(b"\0" * (size % 2) + _wav_list(tags))
        size = file.tell()
        file.seek(4)
        file.write(struct.pack("<I", size - 8))


def _read_wav_tags(path: AudioSource) -> dict[str, str]:
    names = {identity: name for name, identity in _WAV_IDS.items()}
    with path.open() if isinstance(path, Stored) else open(path, "rb") as file:
        if file.read(12)[:4] != b"RIFF":  # read by ffmpeg
            return {}
        while len(header := file.read(8)) == 8:
            identity, size = struct.unpack("<4sI", header)
            if identity == b"LIST" and file.read(4) == b"INFO":
                return {names[i]: text for i, text in _info_texts(file.read(size - 4)) if i in names}
            file.seek(size + size % 2 - (4 if identity == b"LIST" else 0), io.SEEK_CUR)
    return {}


def _info_texts(data: bytes) -> list[tuple[bytes, str]]:
    texts, at = [], 0
    while at + 8 <= len(data):
        identity, size = struct.unpack_from("<4sI", data, at)
        texts.append((identity, data[at + 8 : at + 8 + size].rstrip(b"\0").decode("utf-8", "replace")))
        at += 8 + size + size % 2
    return texts
