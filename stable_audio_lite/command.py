"""The argument parser and the runner that all commands share: user errors are one line, and all commands end alike.

The exit status is 0, or the one that the command returns; 2 after a mistake that the user can fix, which is reported in
one line on stderr, or after several in single files; 130 after Ctrl-C and 143 after SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeAlias

from stable_audio_lite.errors import UserError
from stable_audio_lite.files import check_apart, check_place, expanded, resolved

_NO_MEMORY = ("out of memory", "can't allocate memory")


class Parser(argparse.ArgumentParser):
    """An argument parser that keeps the line breaks of its description and reports mistakes in one line."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Exit with one line, without the usage that argparse would print before it."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
"""Registry of subcommand parsers; each sets `run`, a function of the parsed arguments that may return a status."""


def file_path(text: str) -> Path:
    """Parse a path; `~` is the home folder, and `-` is refused, which elsewhere stands for a pipe."""
    if text.strip() in ("", "-"):
        raise argparse.ArgumentTypeError(f"{text!r} names no file; sound and settings go through files, not pipes")
    try:
        return expanded(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Declare --overwrite, without which no command replaces a file."""
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there already")


def check_outputs(outputs: Sequence[Path], inputs: Sequence[Path] = (), *, overwrite: bool) -> None:
    """Check, before any work, that all outputs can be written.

    Raises:
        UserError: one is an input, or another output, can't be written, or is there already and may not be replaced.
    """
    check_apart(inputs, outputs)
    if len({resolved(path) for path in outputs}) < len(outputs):
        raise UserError(f"{outputs[-1]}: is to be written twice; give each file a name of its own")
    for path in outputs:
        check_place(path)
        if (os.path.lexists(path) or resolved(path).exists()) and not overwrite:
            raise UserError(f"{path}: is there already; choose another place or give --overwrite")


class Failures:
    """Mistakes in single files of a command that takes several, which goes on past them."""

    def __init__(self) -> None:
        self._names: list[str] = []

    @contextlib.contextmanager
    def of(self, name: object) -> Iterator[None]:
        """Print a mistake in the file of that name as one line, instead of raising it."""
        try:
            yield
        except BrokenPipeError:
            raise
        except (UserError, OSError) as error:
            text = " ".join(str(error).split())
            print(f"error: {text if str(name) in text else f'{name}: {text}'}", file=sys.stderr)
            self._names.append(str(name))

    def status(self, total: int) -> int:
        """Name the files that failed, of `total` in all; returns the command's exit status."""
        if self._names and total > 1:
            print(f"{len(self._names)} of {total} failed: {', '.join(self._names)}", file=sys.stderr)
        return 2 if self._names else 0


def tolerate_encodings() -> None:
    """Print what the terminal's encoding lacks with escapes: a prompt stops no batch, a name no summary."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def guarded(action: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Run a command's `action`; returns its exit status.

    A `UserError` or an `OSError` becomes one line; anything else is a bug and shows its traceback. SIGTERM ends it with
    status 143 and leaves nothing half-written, unless the caller has set another way.
    """
    tolerate_encodings()
    with _terminable():
        return _guarded(action, interrupted)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM raise SystemExit, so that temporary files are removed on the way out."""

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _guarded(action: Callable[[], int | None], interrupted: str) -> int:
    try:
        try:
            status = action() or 0
        except SystemExit:  # after --help, say
            _flush()
            raise
        _flush()
        return status
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_output()  # whose reader is gone
        return 1
    except Exception as error:
        if (line := explained(error)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2


def _flush() -> None:
    """Write what was printed, while it can still be told that it can't be."""
    try:
        if sys.stdout is not None:  # closed by who started us
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_output()
        raise UserError(f"standard output: can't be written ({error.strerror})") from error


def _drop_output() -> None:
    """Leave the interpreter nothing to flush when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explained(error: BaseException) -> str | None:
    """Word an error that is no bug as the one line that its user sees; None for a bug."""
    if isinstance(error, (UserError, OSError)):
        return " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return "out of memory; work on less at once (a smaller batch, shorter sounds)"
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY):
        return "out of memory; work on less at once (a smaller batch, shorter sounds), or choose another device"
    return None
