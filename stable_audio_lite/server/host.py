"""The service's process: a socket, uvicorn, and a stop that loses nothing.

At the first SIGTERM or Ctrl-C it takes no more jobs, hands back those that wait and finishes those that run; it ends
when every client has fetched its sounds, or after a while. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import math
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from stable_audio_lite.errors import UserError
from stable_audio_lite.server.jobs import Jobs

_LAST_ANSWERS = 5.0  # seconds that answers may take once all jobs have ended
_HANG_UP = 5  # seconds after which those that go on when nobody listens any more are cancelled


def open_socket(host: str, port: int) -> socket.socket:
    """Listen at an address; port 0 takes a free one.

    Raises:
        UserError: the address is taken, or none of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"can't listen at {host}:{port} ({reason}); choose another host or port") from error


def serve_app(app: FastAPI, jobs: Jobs, listener: socket.socket, grace: float) -> None:
    """Answer requests until a signal comes; then give what runs up to `grace` seconds, and end the queue."""
    patience = math.ceil(_LAST_ANSWERS) + _HANG_UP
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=patience, server_header=False)
    try:
        _Server(config, jobs, grace).run(sockets=[listener])
    finally:
        jobs.close()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, jobs: Jobs, grace: float):
        super().__init__(config)
        self._jobs, self._grace, self._asked = jobs, grace, 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._asked:
            self.force_exit = True
            super().handle_exit(sig, frame)
        self._asked = self._asked or time.monotonic()

    async def on_tick(self, counter: int) -> bool:
        if self._asked:
            late = time.monotonic() > self._asked + self._grace
            self._jobs.stop(at_once=late)
            if late or self._jobs.idle:
                return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(_LAST_ANSWERS, self._hang_up)
        await super().shutdown(sockets)

    def _hang_up(self) -> None:
        """End answers without an end, such as those that keep an open page up to date."""
        for connection in list(self.server_state.connections):
            connection.transport.close()  # type: ignore[union-attr]
