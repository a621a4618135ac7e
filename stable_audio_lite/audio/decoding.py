"""Sound files as decoding gives them: what libsndfile reads, and what ffmpeg reads where it is installed.

Headers are not trusted: a length that they leave out or guess is counted, and one that the file lacks, or a rate that
no sound has, is refused. Channels come in the order of WAV files; `to_stereo` mixes them by ITU-R BS.775-3.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from stable_audio_lite.errors import UserError

if TYPE_CHECKING:
    import soundfile

RATES = (1000, 768000)
"""Lowest and highest sample rate in Hz that is taken for one."""

_BLOCK = 1 << 18  # frames read at once: a length that is a lie asks for no memory
_PREROLL = 1 << 14  # frames decoded before those that are read
_ENDLESS = 1 << 48  # frames; a length beyond stands for an unknown one
_SHORTENED = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "OGG")

# Shares of a place in the left and in the right channel; LFE is left out, a rear centre is a surround on both sides.
_H = 0.5**0.5
_SHARES = {"L": (1, 0), "R": (0, 1), "C": (_H, _H), "l": (_H, 0), "r": (0, _H), "S": (0.5, 0.5), "E": (0, 0)}
_PLACES = {3: "LRC", 4: "LRlr", 5: "LRClr", 6: "LRCElr", 7: "LRCESlr", 8: "LRCElrlr"}  # without a map, by number
_MAPPED = {2: "L", 3: "R", 4: "C", 5: "L", 6: "R", 7: "C", 8: "S", 9: "l", 10: "r", 11: "E", 14: "l", 15: "r"}
_OGG_ORDER = {3: (0, 2, 1), 5: (0, 2, 1, 3, 4), 6: (0, 2, 1, 5, 3, 4), 7: (0, 2, 1, 6, 5, 3, 4)}
_OGG_ORDER |= {8: (0, 2, 1, 7, 5, 6, 3, 4)}


@dataclasses.dataclass(frozen=True)
class Stored:
    """Audio inside something larger: `open` returns its bytes as a seekable file, `name` says where they are.

    `longest` is for what strangers send: a sound of more seconds is refused, however little it takes to say so, and
    ffmpeg, which would decode all of it to disk, is not asked.
    """

    name: str
    open: Callable[[], BinaryIO] = dataclasses.field(compare=False, repr=False)
    longest: float | None = None

    def __str__(self) -> str:
        return self.name


AudioSource = str | Path | Stored
"""A place to read audio from."""


class FileWindow(io.RawIOBase):
    """Bytes offset..offset + size of a file, as a file of their own that has the bytes `patch` at its `place`."""

    def __init__(self, file: BinaryIO, offset: int, size: int, place: int = 0, patch: bytes = b""):
        self._file, self._offset, self._size, self._at = file, offset, size, 0
        self._place, self._patch = place, patch

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        data = self._file.read(max(min(len(buffer), self._size - self._at), 0))
        first, last = max(self._place, self._at), min(self._place + len(self._patch), self._at + len(data))
        if first < last:
            patch = self._patch[first - self._place : last - self._place]
            data = data[: first - self._at] + patch + data[last - self._at :]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class AudioFile:
    """An open sound file, to be read once from its beginning to its end; a context manager.

    Attributes:
        sample_rate: Hz.
        channels: number of channels.
        frames: length in samples per channel.
        format: libsndfile's name of the container.
    """

    def __init__(self, path: AudioSource):
        """Open it.

        Raises:
            UserError: it is missing, truncated (where the header shows it), not audio, empty, has a rate outside of
                `RATES`, or channels whose places are unknown.
        """
        self.path, self._at = path, 0
        try:
            self._file = file = _opened(path)
        except OSError as error:
            raise UserError(f"{path}: can't be opened ({' '.join(str(error).split())[:160]})") from error
        try:
            self.sample_rate, self.channels, self.format = file.samplerate, file.channels, file.format
            # In MP3s libsndfile seeks to about the place, and in a stream without a length not at all.
            self._seeks = file.format != "MP3" and not _unknown_length(file)
            if not RATES[0] <= self.sample_rate <= RATES[1]:
                low, high = RATES
                raise UserError(f"{path}: has a rate of {self.sample_rate} Hz, allowed are {low} to {high}; mend it")
            self._shares = _shares(file)
            if self._shares is None:
                raise UserError(f"{path}: has {self.channels} channels whose places are unknown; mix it to stereo")
            self._most = math.inf if (longest := _longest(path)) is None else longest * self.sample_rate
            self.frames = self._count() if _unknown_length(file) else file.frames
            if self.frames <= 0:
                raise UserError(f"{path}: holds no samples")
            if self.frames > self._most:
                raise UserError(f"{path}: lasts longer than {_longest(path):g} s; give less of it")
        except BaseException:
            self._file.close()
            raise

    @property
    def tags(self) -> dict[str, str]:
        """Title and comment, "" where there is none."""
        return {name: getattr(self._file, name) for name in ("title", "comment")}

    def __enter__(self) -> AudioFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, begin: int, end: int) -> np.ndarray:
        """Frames begin..end as (C, T) float32; what lies before `begin` can't be read afterwards.

        Raises:
            UserError: the file is damaged or truncated there, or holds NaN.
        """
        if self._seeks and begin != self._at:  # after a seek, a lossy decoder's first samples are not right
            self._seek(max(begin - _PREROLL, 0) if self.format == "OGG" else begin)
        parts = []
        while self._at < end:
            first = self._at
            block = self._next((begin if first < begin else end) - first)
            if not len(block):
                wanted = f"{end - begin} samples after {begin}"
                raise UserError(f"{self.path}: truncated, ends at {first}, expected {wanted}; fetch it again")
            if first >= begin:
                parts.append(block)
        samples = np.concatenate(parts).T if parts else np.zeros((self.channels, 0), np.float32)
        if not np.isfinite(samples).all():
            raise UserError(f"{self.path}: holds NaN or infinite samples; mend or remove it")
        return (
            samples[list(_OGG_ORDER[self.channels])]
            if self.format == "OGG" and self.channels in _OGG_ORDER
            else samples
        )

    def to_stereo(self, samples: np.ndarray) -> np.ndarray:
        """Mix (C, T) of this file to (2, T): mono on both sides, more than two channels by ITU-R BS.775-3."""
        if self.channels == 1:
            return np.repeat(samples, 2, axis=0)
        return samples if self.channels == 2 else np.asarray(self._shares, np.float32).T @ samples

    def _seek(self, begin: int) -> None:
        import soundfile

        try:
            self._at = self._file.seek(begin)
        except soundfile.SoundFileError as error:
            raise UserError(f"{self.path}: damaged or truncated ({error}); fetch it again") from error

    def _next(self, frames: int) -> np.ndarray:
        """Up to `frames` of the next frames, (T, C)."""
        import soundfile

        try:
            block = self._file.read(min(frames, _BLOCK), dtype="float32", always_2d=True)
        except soundfile.SoundFileError as error:
            raise UserError(f"{self.path}: damaged or truncated ({error}); fetch it again") from error
        self._at += len(block)
        return block

    def _count(self) -> int:
        """The number of frames that decoding gives; the file is as if just opened then."""
        key = _identity(self.path)
        if key not in _counted or math.isfinite(self._most):  # a stranger's name and size identify nothing
            with self._file:
                while self._at <= self._most and len(self._next(_BLOCK)):
                    pass
            frames, self._at, self._file = self._at, 0, _opened(self.path)
            if math.isfinite(self._most):
                return frames
            _counted[key] = frames
        return _counted[key]


def _longest(path: AudioSource) -> float | None:
    return path.longest if isinstance(path, Stored) else None


_counted: dict[tuple[str, int, int], int] = {}


def _identity(path: AudioSource) -> tuple[str, int, int]:
    """Identify a file among others, and from itself after a change."""
    if isinstance(path, Stored):
        with path.open() as file:
            return path.name, file.seek(0, io.SEEK_END), 0
    status = os.stat(path)
    return os.path.abspath(path), status.st_size, status.st_mtime_ns


def _shares(file: soundfile.SoundFile) -> list[tuple[float, float]] | None:
    """Shares of each channel in left and right; None where there is no telling."""
    from soundfile import _ffi, _snd

    places: str | None = _PLACES.get(file.channels)
    if file.channels > 2 and file.format in ("WAV", "WAVEX", "RF64", "W64", "CAF"):
        found = _ffi.new("int[]", file.channels)
        if _snd.sf_command(file._file, 0x1100, found, _ffi.sizeof(found)):  # SFC_GET_CHANNEL_MAP_INFO
            names = [_MAPPED.get(place, "") for place in found]
            places = "".join(names) if all(names) else places if not any(found) else None
    return [] if file.channels < 3 else [_SHARES[place] for place in places] if places else None


def _opened(path: AudioSource) -> soundfile.SoundFile:
    """Open a file by libsndfile; its length is the decoded one, or `_unknown_length`."""
    import soundfile

    if not isinstance(path, Stored) and not Path(path).is_file():
        raise UserError(f"{path}: no such audio file")
    try:
        stream = _with_length(path)
        file = soundfile.SoundFile(stream or (path.open() if isinstance(path, Stored) else os.fsencode(path)))
        if file.format in _SHORTENED and (loss := _shortened(file.extra_info)):
            file.close()
            raise UserError(f"{path}: truncated, {loss}; fetch it again")
        if file.format == "OGG" and (file.frames > _ENDLESS or "Junk after the last page" in file.extra_info):
            file.close()
            return _converted(path, "several streams in one Ogg file")
        if file.format == "MP3" and (stream := _without_length(path)):
            file.close()
            file = soundfile.SoundFile(stream)
    except (soundfile.SoundFileError, TypeError):  # TypeError: raw samples, by their suffix
        return _converted(path, "no WAV, AIFF, FLAC, OGG or MP3")
    file.seekable = lambda: False  # else soundfile seeks after each read, which in lossy files leads elsewhere
    return file


def _unknown_length(file: soundfile.SoundFile) -> bool:
    return file.frames > _ENDLESS or isinstance(file.name, _Endless)


def _shortened(log: str) -> str | None:
    """Find in libsndfile's log how a file was truncated, which it reads to its early end without complaint."""
    if "Last page lacks an end-of-stream bit" in log:
        return "its last page is missing"
    for match in re.finditer(r"^\s*(?:data|SSND|riff|Riff size) *: (\d+) \(should be (\d+)\)", log, re.MULTILINE):
        claimed, found = int(match[1]), int(match[2])
        if found < claimed and not _stands_for_unknown(claimed):
            return f"holds {found} of {claimed} bytes"
    return None


def _stands_for_unknown(size: int) -> bool:
    """Recognise the sizes that programs declare when they write to a pipe: some at most of 31 or of 32 bits."""
    return size == 0 or 0x7FFFEF00 <= size <= 0x80001000 or 0xFFFFEF00 <= size <= 0xFFFFFFFF


class _Endless(FileWindow):
    """An MP3 that seems far longer than it is: libsndfile guesses a length from the size, and stops there."""

    _TIMES = 64  # a frame may have 20 times the bytes of another

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        beyond = (self._TIMES - 1) * self._size if whence == io.SEEK_END else 0
        return super().seek(offset + beyond, whence)

    def readinto(self, buffer: Any) -> int:
        left = self._TIMES * self._size - self._at
        if left > 128:
            return super().readinto(buffer)
        count = max(min(len(buffer), left), 0)  # where an ID3v1 tag is looked for
        buffer[:count] = bytes(count)
        self._at += count
        return count


def _without_length(path: AudioSource) -> _Endless | None:
    """Open an MP3 whose length nothing tells, or something wrongly; None if its Xing or Info header does."""
    file = path.open() if isinstance(path, Stored) else open(path, "rb")
    start, header = _after_id3(file), 0
    head = file.read(4096)
    if match := re.search(rb"\xff[\xe0-\xff].{11,34}(Xing|Info)(.{4})(.{4})(.{4})", head, re.DOTALL):
        flags, frames, size = (int.from_bytes(match[i], "big") for i in (2, 3, 4))
        file.seek(start + match.start() + size)
        more = file.read(3)
        if flags & 1 and frames and not (flags & 2 and (more == b"ID3" or more[:2] == match[0][:2])):
            file.close()
            return None
        header = start + match.start(1)  # it tells the length of a part: hide it
    return _Endless(file, 0, _end_without_tags(file), header, bytes(4) if header else b"")


def _with_length(path: AudioSource) -> FileWindow | None:
    """Open a CAF that was written to a pipe, or a WAV that was never closed, as if its header told the length."""
    file = path.open() if isinstance(path, Stored) else open(path, "rb")
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(12)
    # For each: where chunks begin, their header's layout, and the length that stands for an unknown one.
    kinds = {b"caff": (8, ">4sq", -1), b"RIFF": (12, "<4sI", 0)}
    place, layout, unknown = kinds.get(head[:4], (size, "<4sI", 0))
    width = struct.calcsize(layout)
    while place + width < size:
        file.seek(place)
        kind, length = struct.unpack(layout, file.read(width))
        if kind == b"data":
            if length == unknown and (unknown or int.from_bytes(head[4:8], "little") <= place):
                left = struct.pack(layout[0] + layout[-1], min(size - place - width, 0xFFFFFFFF))
                return FileWindow(file, 0, size, place + 4, left)
            break
        place += width + max(length, 0) + (length % 2 if head[:4] == b"RIFF" else 0)
    file.close()
    return None


def _after_id3(file: BinaryIO) -> int:
    """Seek to the first byte after the tags at the beginning."""
    start = 0
    while len(head := file.read(10)) == 10 and head.startswith(b"ID3"):
        size = sum((byte & 127) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        start += size + (20 if head[5] & 16 else 10)
        file.seek(start)
    file.seek(start)
    return start


def _end_without_tags(file: BinaryIO) -> int:
    """The file's size without ID3v1 and APE tags at its end."""
    end = file.seek(0, io.SEEK_END)
    file.seek(max(end - 128, 0))
    if file.read(3) == b"TAG":
        end -= 128
    file.seek(max(end - 32, 0))
    foot = file.read(32)
    if foot.startswith(b"APETAGEX"):
        size = int.from_bytes(foot[12:16], "little") + (32 if foot[23] & 128 else 0)
        end -= size if size < end else 0
    return end


def _converted(path: AudioSource, what: str) -> soundfile.SoundFile:
    """Open what ffmpeg makes of a file that libsndfile doesn't read since it is `what`."""
    import soundfile

    if _longest(path) is not None:
        raise UserError(f"{path}: can't be read as audio ({what}); convert it")
    if shutil.which("ffmpeg") is None:
        raise UserError(f"{path}: can't be read as audio ({what}); convert it, or install ffmpeg for more kinds")
    try:
        return soundfile.SoundFile(_decoded(path, _identity(path)).name)
    except (soundfile.SoundFileError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: can't be read as audio, or truncated ({what}; ffmpeg: {reason})") from error


@lru_cache(maxsize=4)
def _decoded(path: AudioSource, identity: tuple[str, int, int]) -> Any:
    """A temporary WAV file, deleted with the object, that ffmpeg made of a file which it finds no fault with."""
    decoded = tempfile.NamedTemporaryFile(suffix=".wav")
    with tempfile.NamedTemporaryFile() as whole:
        if isinstance(path, Stored):
            with path.open() as file:
                shutil.copyfileobj(file, whole)
            whole.flush()
        source = whole.name if isinstance(path, Stored) else os.path.abspath(path)
        # No other address than this file's is opened, whatever a playlist may name.
        command = ["ffmpeg", "-v", "error", "-nostdin", "-xerror", "-protocol_whitelist", "file"]
        command += ["-i", f"file:{source}", "-map", "0:a:0", "-c:a", "pcm_f32le", "-f", "wav", "-rf64", "auto"]
        done = subprocess.run([*command, "-y", decoded.name], capture_output=True, text=True, errors="replace")
    if done.returncode or done.stderr.strip():
        last = ([f"status {done.returncode}"] + done.stderr.strip().splitlines())[-1]
        raise subprocess.SubprocessError(last.removeprefix(f"file:{source}: "))
    return decoded
