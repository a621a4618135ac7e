"""`stable-audio-lite doctor`: what is wrong with this installation or a text encoder."""

from __future__ import annotations

import argparse

from stable_audio_lite.command import Commands

_ABOUT = """Look at packages, programs, the device, and whether a text encoder tells captions apart.
The exit status is 1 if something is bad."""


def add_command(commands: Commands) -> None:
    """Add `doctor` to the command line."""
    summary = "what is wrong with this installation or a text encoder"
    parser = commands.add_parser("doctor", help=summary, description=_ABOUT)
    parser.set_defaults(run=_run)
    sources = "'starter', a bundle's folder, or a CLAP: transformers folder, hub id or LAION .pt (default: starter)"
    parser.add_argument("source", nargs="?", default="starter", metavar="MODEL", help=sources)


def _run(args: argparse.Namespace) -> int:
    from stable_audio_lite.doctor import run_checks

    findings = run_checks(args.source)
    print("\n".join(finding.as_text() for finding in findings))
    return int(any(finding.state == "bad" for finding in findings))
