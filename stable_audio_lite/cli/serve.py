"""`stable-audio-lite serve`: a service over HTTP."""

from __future__ import annotations

import argparse
import ipaddress
import math
import os
import sys

from stable_audio_lite.cli.options import add_models
from stable_audio_lite.command import Commands
from stable_audio_lite.errors import UserError

TOKEN = "STABLE_AUDIO_LITE_TOKEN"
_ABOUT = f"""Answer requests for sound over HTTP; /openapi.json describes them, docs/service.md shows how to use it.

Clients must send the bearer token in {TOKEN}, where that is set. SIGTERM and Ctrl-C take no more
requests, finish what runs and hand back what waits; a second one ends it at once."""


def add_command(commands: Commands) -> None:
    """Add `serve` to the command line."""
    parser = commands.add_parser("serve", help="answer requests for sound over HTTP", description=_ABOUT)
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine alone)")
    add("--port", type=int, default=8000, help="port to listen at, 0 for a free one (default: 8000)")
    add_models(parser)
    add("--batch", type=int, default=8, help="sounds sampled at once (default: 8)")
    add("--queue", type=int, default=64, help="requests that may wait; more are refused (default: 64)")
    add("--max-seconds", type=float, default=60, help="longest sound, to make or to send (default: 60)")
    add("--max-steps", type=int, default=250, help="most sampling steps (default: 250)")
    add("--max-count", type=int, default=8, help="most sounds of a request (default: 8)")
    add("--max-upload", type=float, default=25, metavar="MB", help="largest sound that is sent (default: 25)")
    add("--max-work", type=float, default=600, metavar="SECONDS", help="time that a batch may take (default: 600)")
    add("--keep", type=float, default=600, metavar="SECONDS", help="time that sounds can be fetched (default: 600)")
    add("--grace", type=float, default=30, metavar="SECONDS", help="time to finish in after a signal (default: 30)")


def _run(args: argparse.Namespace) -> None:
    for name in ("batch", "queue", "max_seconds", "max_steps", "max_count", "max_upload", "max_work", "keep", "grace"):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be above 0 and finite, got {getattr(args, name):g}")
    try:
        from stable_audio_lite.server.app import create_app
        from stable_audio_lite.server.host import open_socket, serve_app
    except ModuleNotFoundError as error:
        advice = "pip install 'stable-audio-lite[serve]'"
        raise UserError(f"serve needs {error.name}; install it with: {advice}") from error
    from stable_audio_lite.server.jobs import Bounds, Jobs
    from stable_audio_lite.server.messages import ServiceLimits
    from stable_audio_lite.server.models import ModelStore

    listener, token = open_socket(args.host, args.port), os.environ.get(TOKEN)
    store = ModelStore(args.model, args.lora, args.device, args.dtype)
    store.load(store.choose())
    bounds = Bounds(waiting=args.queue, batch=args.batch, work_seconds=args.max_work, keep_seconds=args.keep)
    limits = ServiceLimits(
        seconds=args.max_seconds,
        steps=args.max_steps,
        count=args.max_count,
        upload_bytes=round(args.max_upload * 1e6),
    )
    jobs = Jobs(store, bounds)
    host, port = listener.getsockname()[:2]
    if not token and not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        print(f"note: everyone who reaches {host}:{port} may use it; set {TOKEN} to ask for a token", file=sys.stderr)
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"{address} serves {', '.join(store.names)} on {store.device}", flush=True)
    serve_app(create_app(jobs, limits, token), jobs, listener, args.grace)
