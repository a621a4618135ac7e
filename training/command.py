"""The command line that every trainer shares: --config FILE."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from stable_audio_lite.config import load_config
from stable_audio_lite.errors import UserError

T = TypeVar("T")


def main(description: str | None, cls: type[T], run: Callable[[T], Any]) -> None:
    """Parse --config into `cls`, run, and print where the result is; mistakes end in one line and exit status 2."""
    main_of(description, lambda path: run(load_config(path, cls)))


def main_of(description: str | None, run: Callable[[Path], Any]) -> None:
    """The same for what reads the config's file itself."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, help="YAML file with the run's settings")
    arguments = parser.parse_args()
    try:
        print(run(arguments.config))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
