"""Atomic writing: nothing half-written is ever left under its final name, and nothing is written over its source."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stable_audio_lite.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

UNPROMPTED = "sound"
"""Stands for the prompt in names of files of sounds that have none."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes `path`'s place, on failure it is removed.

    The temporary name keeps the suffix, so that writers which choose a format by suffix still do.

    Raises:
        UserError: the folder can't be made or written, or the disk is full.
    """
    final = Path(path)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=final.parent, prefix=f".{final.stem[:40]}-", suffix=final.suffix)
        os.close(handle)
    except OSError as error:
        raise UserError(f"{final}: can't be written ({error.strerror}); choose another place") from error
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, final)
    except OSError as error:
        raise UserError(f"{final}: can't be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder as `replacing` does a file: the old one stays intact until the new one is complete.

    Raises:
        UserError: the parent can't be written, or the disk is full.
    """
    final = Path(path)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}-"))
    except OSError as error:
        raise UserError(f"{final}: can't be written ({error.strerror})") from error
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        if final.exists():
            old = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}-old-"))
            os.replace(final, old / final.name)
            os.replace(temporary, final)
            shutil.rmtree(old)
        else:
            os.replace(temporary, final)
    except OSError as error:
        raise UserError(f"{final}: can't be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other runs out of `folder`, which is made if need be, until the context or the process ends.

    The system holds the lock, so that not even a killed process leaves it behind.

    Raises:
        UserError: another run is in there, or the folder can't be made or written.
    """
    try:
        import fcntl
    except ImportError:  # not a Unix
        yield
        return
    path = Path(folder) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise UserError(f"output: {folder} can't be made or written ({error.strerror}); choose another") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            other = f"process {number}" if (number := file.read().strip()) else "another process"
            raise UserError(f"output: {other} is at work in {folder}; wait for it, or choose another") from error
        except OSError:
            pass  # a file system without locks
        os.ftruncate(file.fileno(), 0)
        with contextlib.suppress(OSError):  # a full disk, which what is written there will name
            os.write(file.fileno(), str(os.getpid()).encode())
        yield


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Add a line to a file, which is made if need be.

    Raises:
        UserError: it can't be written, or the disk is full.
    """
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror}); mend that, and the run can go on") from error


def check_place(path: str | os.PathLike[str]) -> None:
    """Check, before the work begins, that `path` can be written; leaves nothing behind.

    Raises:
        UserError: `path` is a folder, or its folder can't be written.
    """
    final = Path(path)
    if final.is_dir():
        raise UserError(f"{final}: is a folder; give the name of a file")
    existing = next(parent for parent in final.absolute().parents if os.path.lexists(parent))
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise UserError(f"{final}: can't be written ({error.strerror}); choose another place") from error


def check_utf8(path: str | os.PathLike[str]) -> None:
    """Refuse a path that isn't valid UTF-8, which neither settings nor safetensors can name.

    Raises:
        UserError: it isn't.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path}: its name is not valid UTF-8; rename it") from error


def resolved(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path without links, but for those that lead to themselves."""
    return Path(os.path.realpath(path))


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path with the home folder in the place of `~`.

    Raises:
        UserError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: no such home folder; write it out") from error


def check_apart(sources: Iterable[object], outputs: Iterable[str | os.PathLike[str]]) -> None:
    """Check that no output is the same file as one of the sources, by whatever name; only paths count as sources.

    Raises:
        UserError: one is.
    """
    paths = [Path(source) for source in sources if isinstance(source, (str, os.PathLike))]
    known = {(found.st_dev, found.st_ino) for found in map(_stat, paths) if found}
    for output in outputs:
        if (found := _stat(Path(output))) and (found.st_dev, found.st_ino) in known:
            raise UserError(f"{output}: is the file that is read; write to another place")


def _stat(path: Path) -> os.stat_result | None:
    try:
        return resolved(path).stat()  # also where a folder on the way isn't there yet
    except OSError:
        return None


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors as safetensors.

    Raises:
        OSError: the disk is full, or the place can't be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{error}; free some space") from error
    os.chmod(path, 0o644)  # safetensors writes files that only their owner can read


def expand_home(path: str) -> str:
    """Replace a leading `~` in a path or an address by the home folder, as a shell would."""
    return str(expanded(path)) if path.startswith("~") else path


def file_stem(prompt: str) -> str:
    """Letters and digits of a prompt as the beginning of a file's name."""
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:40].rstrip("-") or UNPROMPTED


def sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
