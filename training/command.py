"""The command line that every trainer shares: --config FILE."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch

from stable_audio_lite.command import Parser, file_path, guarded
from stable_audio_lite.config import load_config
from training.signals import Stopped

T = TypeVar("T")


def main(description: str | None, cls: type[T], run: Callable[[T], Any]) -> None:
    """Parse --config into `cls`, run, and print where the result is; ends the process.

    A run that a signal stopped ends with exit status 128 and the signal's number.
    """
    parser = Parser(description=description)
    parser.add_argument("--config", required=True, type=file_path, help="YAML file with the run's settings")
    arguments = parser.parse_args()
    stopped = "stopped; the same command goes on from what is finished"

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise Stopped(number, stopped)

    def action() -> int:
        try:
            print(run(load_config(arguments.config, cls)))
        except Stopped as stop:
            if message := str(stop):
                print(message, file=sys.stderr)
            return 128 + stop.number
        return 0

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and (
        not torch.accelerator.is_available() or torch.backends.mps.is_available()
    ):
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # or each of the processes would run on its own
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(guarded(action, stopped))
