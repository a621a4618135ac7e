"""The subcommand that evaluation adds to `stable-audio-lite`."""

from __future__ import annotations

from evaluation.run import ABOUT, add_arguments, main_of
from stable_audio_lite.command import Commands


def add_evaluate(commands: Commands) -> None:
    """Add `evaluate` to the command line."""
    summary = "how good generated sounds are, beside recordings"
    parser = commands.add_parser("evaluate", help=summary, description=ABOUT)
    parser.set_defaults(run=main_of)
    add_arguments(parser)
