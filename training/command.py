"""The command line that every trainer shares: --config FILE."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from stable_audio_lite.command import Parser, file_path, guarded
from stable_audio_lite.config import load_config
from training.signals import Stopped

T = TypeVar("T")
_STOPPED = "stopped; the same command goes on from what is finished"


def main(description: str | None, cls: type[T], run: Callable[[T], Any]) -> None:
    """Parse --config into `cls`, run, and print where the result is; ends the process as `stoppable` says."""
    parser = Parser(description=description)
    parser.add_argument("--config", required=True, type=file_path, help="YAML file with the run's settings")
    arguments = parser.parse_args()
    sys.exit(guarded(lambda: stoppable(lambda: print(run(load_config(arguments.config, cls))))))


def shared_processes() -> PartialState:
    """The processes of a command, without settling a training's number type, as Accelerator would."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def stoppable(action: Callable[[], Any]) -> int:
    """Do the `action` of a command that can go on later; returns its exit status, after a signal 128 and its number."""

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise Stopped(number, _STOPPED)

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and (
        not torch.accelerator.is_available() or torch.backends.mps.is_available()
    ):
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # or each of the processes would run on its own
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        action()
    except KeyboardInterrupt as stop:
        stopped = stop if isinstance(stop, Stopped) else Stopped(signal.SIGINT, _STOPPED)
        if message := str(stopped):
            print(message, file=sys.stderr)
        return 128 + stopped.number
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0
