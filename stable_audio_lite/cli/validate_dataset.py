"""`stable-audio-lite validate-dataset`: what is in a data set, and what is wrong with it."""

from __future__ import annotations

import argparse
import json

from stable_audio_lite.command import Commands
from stable_audio_lite.errors import UserError

_ABOUT = """Read every file of a data set: hours, rates, channels; broken, silent, clipped or uncaptioned files;
captions that a text encoder doesn't read to their ends.
The exit status is 1 if a file is broken."""


def add_command(commands: Commands) -> None:
    """Add `validate-dataset` to the command line."""
    summary = "what is in a data set, and what is wrong with it"
    parser = commands.add_parser("validate-dataset", help=summary, description=_ABOUT)
    parser.set_defaults(run=_run)
    parser.add_argument("path", metavar="DATA", help="a folder of audio, WebDataset shards or a Hugging Face data set")
    parser.add_argument("--workers", type=int, default=4, help="files read at once (default: 4)")
    encoder = "bundle with the text encoder that captions are for (default: starter)"
    parser.add_argument("--model", default="starter", help=encoder)
    parser.add_argument("--json", action="store_true", help="print JSON with every faulty file")


def _run(args: argparse.Namespace) -> int:
    if args.workers < 1:
        raise UserError(f"--workers must be at least 1, got {args.workers}")
    from stable_audio_lite.data.validate import validate

    report = validate(args.path, args.workers, args.model)
    print(json.dumps(report.as_json(), indent=2) if args.json else report.as_text())
    return 1 if "broken" in report.faults else 0
