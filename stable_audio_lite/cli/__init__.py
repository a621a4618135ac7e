"""The `stable-audio-lite` command, one file per subcommand.

Packages built on this one add their own subcommands (`plan`, `evaluate`) through entry points of the group
`stable_audio_lite.commands`: each names a function that takes the subparsers and adds its parser.

Nothing heavy is imported before the arguments are known to be good, so that mistakes and `--help` answer at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.metadata import entry_points

from stable_audio_lite import __version__
from stable_audio_lite.cli import (
    caption,
    codec,
    continuation,
    corpus,
    doctor,
    generate,
    info,
    interchange,
    restore,
    serve,
    ui,
    validate_dataset,
)
from stable_audio_lite.command import Parser, guarded

ENTRY_POINTS = "stable_audio_lite.commands"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit status."""
    return guarded(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int | None:
    args = build_parser().parse_args(argv)
    warnings.filterwarnings("ignore")
    return args.run(args)


def build_parser() -> Parser:
    """Build the parser of all commands, those of other installed packages included."""
    parser = Parser(prog="stable-audio-lite", description="Text to music and sound.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    generate.add_command(commands)
    continuation.add_command(commands)
    restore.add_command(commands)
    ui.add_command(commands)
    serve.add_command(commands)
    codec.add_encode(commands)
    codec.add_decode(commands)
    info.add_command(commands)
    interchange.add_import(commands)
    interchange.add_export(commands)
    corpus.add_command(commands)
    caption.add_command(commands)
    validate_dataset.add_command(commands)
    for entry_point in entry_points(group=ENTRY_POINTS):
        entry_point.load()(commands)
    doctor.add_command(commands)
    return parser
