"""`stable-audio-lite ui`: a page in the browser."""

from __future__ import annotations

import argparse
import os

from stable_audio_lite.cli.options import add_models
from stable_audio_lite.command import Commands, file_path
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import check_place
from stable_audio_lite.server.addresses import is_loopback

PASSWORD = "STABLE_AUDIO_LITE_PASSWORD"
_ABOUT = """Serve a page to make sound on: words, sounds to start from, players, spectrograms and a gallery.
It is for this machine alone, unless --host says otherwise; it calls no other machine."""


def add_command(commands: Commands) -> None:
    """Add `ui` to the command line."""
    parser = commands.add_parser("ui", help="a page in the browser to make sound on", description=_ABOUT)
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add_models(parser)
    add("--keep", metavar="FOLDER", type=file_path, help="keep each sound here too (default: only until the page ends)")
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine alone)")
    add("--port", type=int, default=7860, help="port to listen at, 0 for a free one (default: 7860)")
    add("--password", help=f"ask everyone for it (default: that of {PASSWORD}, or none; needed with another --host)")


def _run(args: argparse.Namespace) -> None:
    import tempfile

    password = args.password or os.environ.get(PASSWORD)
    if not is_loopback(args.host) and not password:
        raise UserError(f"--host {args.host}: opens the page to other machines; give --password, or set {PASSWORD}")
    if args.keep is not None:
        check_place(args.keep / "sound.wav")
    try:
        from stable_audio_lite.server.host import open_socket
        from stable_audio_lite.server.page_host import serve_page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError("the page needs Gradio; pip install 'stable-audio-lite[ui]'") from error
    listening = open_socket(args.host, args.port)
    from stable_audio_lite.server.jobs import Jobs
    from stable_audio_lite.server.models import ModelStore
    from stable_audio_lite.server.studio import Studio

    store = ModelStore(args.model, args.lora, args.device, args.dtype)
    store.load(store.choose())  # what is wrong with the default model shows before anyone comes
    with tempfile.TemporaryDirectory(prefix="stable-audio-lite-", ignore_cleanup_errors=True) as folder:
        serve_page(Studio(Jobs(store), folder, args.keep), listening, password)
