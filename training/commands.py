"""The subcommand that training adds to `stable-audio-lite`; nothing heavy is imported until it runs."""

from __future__ import annotations

import argparse

from stable_audio_lite.command import Commands, file_path
from stable_audio_lite.errors import UserError

_ABOUT = """Parameters, memory by part, disk, speed, time to finish and the largest batch of a training run, measured
over a few of its steps on this machine. Nothing is written."""


def add_plan(commands: Commands) -> None:
    """Add `plan` to the command line."""
    summary = "what a training run will take: memory, disk, time"
    parser = commands.add_parser("plan", help=summary, description=_ABOUT)
    parser.set_defaults(run=_plan)
    parser.add_argument("config", metavar="CONFIG", type=file_path, help="a trainer's YAML file")
    parser.add_argument("--steps", type=int, default=3, help="steps to time (default: 3)")
    parser.add_argument("--processes", type=int, default=1, help="of the run (default: 1)")
    parser.add_argument("--profile", action="store_true", help="also show which operations take the time of a step")


def _plan(args: argparse.Namespace) -> None:
    if args.steps < 1 or args.processes < 1:
        raise UserError(f"--steps and --processes must be at least 1, got {args.steps} and {args.processes}")
    from training.plan import plan

    print(plan(args.config, steps=args.steps, processes=args.processes, profiled=args.profile).as_text())
