"""The subcommand that evaluation adds to `stable-audio-lite`; nothing heavy is imported until it runs."""

from __future__ import annotations

import argparse

from evaluation.options import ABOUT, add_arguments, options_of
from stable_audio_lite.command import Commands


def add_evaluate(commands: Commands) -> None:
    """Add `evaluate` to the command line."""
    summary = "how good generated sounds are, beside recordings"
    parser = commands.add_parser("evaluate", help=summary, description=ABOUT)
    parser.set_defaults(run=_evaluate)
    add_arguments(parser)


def _evaluate(args: argparse.Namespace) -> None:
    options = options_of(args)
    from evaluation.run import run

    run(options)
