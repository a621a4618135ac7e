"""The argument parser and the runner that all commands share: user errors are one line, and all commands end alike.

The exit status is 0, or the one that the command returns; 2 after a mistake that the user can fix, which is reported in
one line on stderr; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn, TypeAlias

from stable_audio_lite.errors import UserError

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


def guarded(action: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Run a command's `action`; returns its exit status.

    A `UserError` or an `OSError` becomes one line; anything else is a bug and shows its traceback.
    """
    try:
        return action() or 0
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output is gone; leave the interpreter nothing to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError:
        message = "out of memory; work on less at once (a smaller batch, shorter sounds)"
    except (UserError, OSError) as error:
        message = " ".join(str(error).split())
    except RuntimeError as error:
        if not any(words in str(error) for words in _NO_MEMORY):
            raise
        message = "out of memory; work on less at once (a smaller batch, shorter sounds), or choose another device"
    print(f"error: {message}", file=sys.stderr)
    return 2
