"""A process that serves the page: to this machine or behind a password, and calling no other machine itself."""

from __future__ import annotations

import asyncio
import hmac
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stable_audio_lite.server.addresses import stay_local
from stable_audio_lite.server.host import serve_app
from stable_audio_lite.server.page import STYLE, TITLE, Page
from stable_audio_lite.server.studio import Studio

UPLOAD_BYTES = 256 << 20
"""Size of the largest sound that is taken."""

_POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'"
_GRACE_SECONDS = 10.0  # that a sound which is being made has after Ctrl-C
_GUESS_SECONDS = 1.0  # that a wrong password costs
_FONT, _MONO = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")


def serve_page(studio: Studio, listening: socket.socket, password: str | None = None) -> None:
    """Serve the page until the process is asked to stop, from when on it calls no other machine.

    Args:
        studio: makes the sounds; Gradio keeps its files in `studio.folder` too.
        listening: from `stable_audio_lite.server.host.open_socket`.
        password: to ask everyone for; None: whoever reaches the address may come in.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(studio.folder)
    stay_local()
    app = page_app(studio, password)
    name, port = listening.getsockname()[:2]
    print(f"http://{f'[{name}]' if ':' in name else name}:{port}  (Ctrl-C ends it)", flush=True)
    serve_app(app, studio.jobs, listening, _GRACE_SECONDS)


def page_app(studio: Studio, password: str | None = None) -> FastAPI:
    """Build the page's application: that of Gradio, whose pages may load from nowhere else."""
    page = Page(studio)
    page.blocks.queue(default_concurrency_limit=None)
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page.blocks,
        path="/",
        auth=_asker(password) if password else None,
        auth_message=f"{TITLE}: any name, and the password that its owner gave you",
        max_file_size=UPLOAD_BYTES,
        show_error=False,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=_theme(),
        css_paths=STYLE,
    )
    app.add_middleware(_Policy)
    return app


def _theme() -> gr.themes.Base:
    theme = gr.themes.Default(primary_hue="violet", neutral_hue="slate", font=_FONT, font_mono=_MONO)
    return theme.set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_text_color="white",
    )


class _Policy:
    """Adds the header by which a browser refuses to load anything from elsewhere."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
            await send(message)

        await self._app(scope, receive, answer)


def _asker(password: str) -> Callable[[str, str], Coroutine[Any, Any, bool]]:
    async def check(name: str, given: str) -> bool:
        if hmac.compare_digest(given.encode(), password.encode()):
            return True
        await asyncio.sleep(_GUESS_SECONDS)
        return False

    return check
