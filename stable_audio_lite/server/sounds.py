"""Sounds as the service takes them in, from strangers, and gives them out, whole or piece by piece as they are made."""

from __future__ import annotations

import io
import struct
from typing import Literal, get_args

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from stable_audio_lite.audio.decoding import Stored
from stable_audio_lite.audio.io import OPUS_RATE, encode_audio, read_metadata, stereo_blocks
from stable_audio_lite.audio.levels import Leveller
from stable_audio_lite.edits import Sound
from stable_audio_lite.errors import UserError
from stable_audio_lite.server.jobs import Job

SoundFormat = Literal["wav", "flac", "opus"]
MEDIA_TYPES: dict[SoundFormat, str] = {"wav": "audio/wav", "flac": "audio/flac", "opus": "audio/ogg"}
assert set(MEDIA_TYPES) == set(get_args(SoundFormat))

_UNKNOWN = 0xFFFFFFFF  # a length that a WAV's header can't tell yet


def read_sound(data: bytes, sample_rate: int, longest: float) -> Sound:
    """Read an uploaded file, from memory, at a rate in Hz; turned down where it exceeds full scale.

    Raises:
        UserError: it is no audio that libsndfile reads, damaged, or longer than `longest` seconds.
    """
    stored = Stored("sound", lambda: io.BytesIO(data), longest)
    blocks = list(stereo_blocks(stored, sample_rate))
    if not blocks:
        raise UserError("sound: is too short to be heard")
    audio = torch.cat(blocks, 1)
    audio /= max(float(audio.abs().max()), 1.0)
    return Sound(audio, sample_rate, "sound", settings=read_metadata(stored).settings)


def encode_sound(job: Job, item: int, kind: SoundFormat) -> bytes:
    """Encode a whole sound of a job, with its settings inside, attenuated where it exceeds full scale."""
    samples = job.audio(item).numpy()
    samples = samples / max(float(np.abs(samples).max(initial=0.0)), 1.0)
    return encode_audio(samples, job.sample_rate, f".{kind}", job.settings[item])


class SoundStream:
    """Encodes successive pieces of a sound whose length nobody knows yet, turned down where they are too loud."""

    def __init__(self, kind: SoundFormat, sample_rate: int, channels: int):
        """Begin a sound of `sample_rate` Hz."""
        self._leveller, self._resampler, rate = Leveller(sample_rate), None, sample_rate
        self._sink, self._channels = _Sink(), channels
        if kind == "opus":
            rate = OPUS_RATE
            self._resampler = soxr.ResampleStream(sample_rate, rate, channels, dtype="float32", quality="HQ")
        container, subtype = {"wav": ("RAW", "PCM_24"), "flac": ("FLAC", "PCM_24"), "opus": ("OGG", "OPUS")}[kind]
        if kind == "wav":
            self._sink.write(_wav_header(rate, channels))
        self._file = soundfile.SoundFile(
            self._sink,
            "w",
            rate,
            channels,
            format=container,
            subtype=subtype,
            endian="LITTLE" if kind == "wav" else None,
        )

    def encode(self, piece: Tensor) -> bytes:
        """Encode the next (C, T); there may be no bytes yet."""
        self._write(self._leveller.levelled(piece).T.numpy(), last=False)
        return self._sink.taken()

    def end(self) -> bytes:
        """Encode what is left."""
        self._write(np.zeros((0, self._channels), np.float32), last=True)
        self._file.close()
        return self._sink.taken()

    def _write(self, samples: np.ndarray, last: bool) -> None:
        samples = np.ascontiguousarray(samples)
        if self._resampler is not None:
            samples = self._resampler.resample_chunk(samples, last=last)
        self._file.write(samples)


class _Sink(io.RawIOBase):
    """A file whose bytes are taken as they come; what is written over those, such as a length, is lost."""

    def __init__(self) -> None:
        self._begin, self._data, self._at = 0, bytearray(), 0

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        place = self._at - self._begin
        if place >= 0:
            self._data[place : place + len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        end = self._begin + len(self._data)
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: end}[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def taken(self) -> bytes:
        """Return the bytes since the last call."""
        data = bytes(self._data)
        self._begin += len(data)
        self._data.clear()
        return data


def _wav_header(rate: int, channels: int) -> bytes:
    """Header of a WAV of 24 bits and unknown length."""
    width = 3 * channels
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, channels, rate, rate * width, width, 24)
    return struct.pack("<4sI4s", b"RIFF", _UNKNOWN, b"WAVE") + form + struct.pack("<4sI", b"data", _UNKNOWN)
