"""Ctrl-C and SIGTERM, answered between two steps of a run."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

_STOPPING = b"\nstopping after this step\n"


class Stopped(KeyboardInterrupt):
    """The end of a run that signal `number` asked for; its message says what it leaves."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number


class Signals:
    """Context in which SIGTERM and Ctrl-C are noted; a process alone is stopped at once by a second Ctrl-C."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.number = accelerator, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stopping(self) -> bool:
        """Check whether any process was asked to stop; all of them have to call this."""
        if self.accelerator.num_processes > 1:
            own = torch.tensor([self.number], device=self.accelerator.device)
            self.number = int(self.accelerator.gather(own).max())
        return self.number > 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A launcher passes on the Ctrl-C that its processes get from the terminal as well.
        if self.number == number == signal.SIGINT and self.accelerator.num_processes == 1:
            raise KeyboardInterrupt
        self.number = number
        if self.accelerator.is_main_process:
            os.write(2, _STOPPING)  # print may be what the signal interrupts
