"""The command line that every trainer shares: --config FILE."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from stable_audio_lite.command import Parser, file_path, guarded
from stable_audio_lite.config import load_config

T = TypeVar("T")


def main(description: str | None, cls: type[T], run: Callable[[T], Any]) -> None:
    """Parse --config into `cls`, run, and print where the result is; ends the process."""
    parser = Parser(description=description)
    parser.add_argument("--config", required=True, type=file_path, help="YAML file with the run's settings")
    stopped = "stopped; the same command goes on from the last checkpoint"
    sys.exit(guarded(lambda: print(run(load_config(parser.parse_args().config, cls))), stopped))
