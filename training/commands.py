"""The subcommands that training adds to `stable-audio-lite`; nothing heavy is imported until it runs."""

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


_TRAIN = """Train on your own music, and export a bundle that `generate` plays. FOLDER is checked and encoded, then
a LoRA on the starter is trained, for half an hour or so unless you say otherwise. Run again, the same command goes on
where it stopped. All settings are in NAME/pre_encode.yaml and NAME/train_diffusion.yaml, to be changed before that.

Captions are in FOLDER/metadata.jsonl or .csv, or in a .txt or .json beside each file; see also `caption`.
Several GPUs: accelerate launch --multi_gpu --num_processes 8 -m stable_audio_lite.cli train FOLDER -o NAME"""


def add_train(commands: Commands) -> None:
    """Add `train` to the command line."""
    parser = commands.add_parser("train", help="train on your own music", description=_TRAIN)
    parser.set_defaults(run=_train)
    add = parser.add_argument
    add("data", metavar="FOLDER", help="captioned audio: a folder, a list, shards or a Hugging Face data set")
    add("-o", "--output", metavar="NAME", required=True, type=file_path, help="folder of the run, with NAME/bundle")
    add("--from", dest="base", metavar="BUNDLE", default="starter", help="what to go on from (default: starter)")
    add("--full", action="store_true", help="train all weights instead of a LoRA")
    add("--steps", type=int, help="steps in all (default: what half an hour allows, 200 to 2,000)")
    add("--batch-size", type=int, help="of each process (default: 16, or what fits in memory)")
    add("--learning-rate", type=float, help="default: 1e-3, with --full 1e-4")
    add("--config", metavar="FILE", type=file_path, help="YAML with other settings of training.train_diffusion")


def _train(args: argparse.Namespace) -> int:
    from training.command import stoppable
    from training.fine_tune import FineTuning, fine_tune

    options = {key: value for key, value in vars(args).items() if key != "run"}
    return stoppable(lambda: fine_tune(FineTuning(**options)))


def _plan(args: argparse.Namespace) -> None:
    if args.steps < 1 or args.processes < 1:
        raise UserError(f"--steps and --processes must be at least 1, got {args.steps} and {args.processes}")
    from training.plan import plan

    print(plan(args.config, steps=args.steps, processes=args.processes, profiled=args.profile).as_text())
