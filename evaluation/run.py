"""Measure generated sounds against recordings, and store what was found.

    python -m evaluation.run music/ corpus/held_out --clap starter --metrics fd_clap,clap_score -o result.json
    accelerate launch --num_processes 8 -m evaluation.run music/ recordings/ --vae starter

Every metric stands beside its baselines, the same between halves of the recordings, for white noise, with shuffled
captions and through the VAE alone, with its 95 % bootstrap interval over the generated sounds. `--training DATA` lists
the training sounds that are most like each, beside how like them the recordings are. Embeddings are kept: the same
command goes on where it was stopped.

Nothing heavy is imported here, so that mistakes and `--help` answer at once. `ABOUT`, `add_arguments` and `main_of` are
the seam by which `stable-audio-lite evaluate` finds this command.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from stable_audio_lite.command import Parser, add_overwrite, check_outputs, file_path, guarded
from stable_audio_lite.errors import UserError

ABOUT = """Measure generated sounds against recordings, each metric beside what it is for real sounds and for noise.

Metrics: fd_openl3, fd_passt, fd_clap (Fréchet distances), fd_inf_openl3, ... (the same extrapolated to infinitely many
sounds), kl_passt, clap_score. One whose weights are not there says what to fetch, and the others go on; without any,
CLAP is the shipped starter's, which knows little but its own corpus. The exit status is 2 if a metric that was asked
for is not measured, or none."""

_Kind = Literal["peak", "lufs"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Sources, metrics and settings of an evaluation; see `add_arguments`."""

    generated: str
    reference: str | None
    metrics: tuple[str, ...]
    output: Path
    name: str | None
    training: str | None
    vae: str | None
    openl3: str | None
    content: str
    passt: str | None
    clap: str | None
    weights: Path
    level: tuple[_Kind, float]
    save_statistics: Path | None
    cache: Path
    device: str
    workers: int
    batch: int

    @property
    def statistics(self) -> Path | None:
        """REFERENCE, where it is a `.npz`, or None."""
        return Path(self.reference) if self.reference and self.reference.endswith(".npz") else None

    @property
    def recordings(self) -> str | None:
        """REFERENCE, where it is sounds, or None."""
        return None if self.statistics else self.reference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare all options on `parser`."""
    add = parser.add_argument
    sources = "a folder of audio, perhaps with metadata.jsonl, a .jsonl, .csv or .txt list, .tar shards, hf:owner/name"
    add("generated", metavar="GENERATED", help=f"sounds under test: {sources}")
    add("reference", metavar="REFERENCE", nargs="?", help="recordings, likewise; or statistics, a .npz")
    add("--metrics", default="", metavar="A,B,...", help="default: fd_openl3,kl_passt,clap_score,fd_clap")
    add("-o", "--output", type=file_path, default=Path("result.json"), help="default: result.json")
    add_overwrite(parser)
    add("--name", help="of the model in reports (default: GENERATED's)")
    add(
        "--training", metavar="DATA", help="what the model learned from: the sounds of it that are most like each sound"
    )
    add("--vae", metavar="BUNDLE", help="'starter', a bundle's folder or a hub id: recordings go through its VAE alone")
    add("--openl3", metavar="FILE", help="weights: a path, or owner/name/file on the hub (default: in --weights)")
    add("--content", default="music", choices=("music", "env"), help="what OpenL3 was trained on (default: music)")
    add("--passt", metavar="FILE", help="weights, likewise")
    add(
        "--clap",
        metavar="SOURCE",
        help="LAION's .pt, likewise; a transformers folder or hub id; a bundle (default: in --weights, else 'starter')",
    )
    add(
        "--weights", metavar="FOLDER", type=file_path, default=Path("weights"), help="where they lie (default: weights)"
    )
    add("--level", default="peak:-1", metavar="KIND:DB", help="peak:-1 by definition, or lufs:-23 (default: peak:-1)")
    add("--save-statistics", metavar="FOLDER", type=file_path, help="also write the reference's statistics, NAME.npz")
    add("--cache", metavar="FOLDER", type=file_path, help="of embeddings (default: in ~/.cache/stable-audio-lite)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ... (default: auto)")
    add("--workers", type=int, default=2, help="sounds worked on at once in each process (default: 2)")
    add("--batch", type=int, default=16, help="windows of a sound that go through a network at once (default: 16)")


def options_of(args: argparse.Namespace) -> Options:
    """The parsed arguments, checked.

    Raises:
        UserError: one is out of range.
    """
    if args.workers < 1 or args.batch < 1:
        raise UserError(f"--workers and --batch must be at least 1, got {args.workers} and {args.batch}")
    if args.output.suffix != ".json":
        raise UserError(f"-o: {args.output}: give a name that ends in .json")
    if args.save_statistics and (args.reference or ".npz").endswith(".npz"):
        raise UserError("--save-statistics: of recordings; give their folder or list as REFERENCE")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    own = {
        "metrics": tuple(dict.fromkeys(name.strip() for name in args.metrics.split(",") if name.strip())),
        "level": _level(args.level),
        "cache": args.cache or caches / "stable-audio-lite" / "embeddings",
    }
    return Options(**{name: own.get(name, getattr(args, name)) for name in Options.__dataclass_fields__})


def _level(text: str) -> tuple[_Kind, float]:
    kind, _, number = text.partition(":")
    try:
        decibels = float(number)
    except ValueError:
        decibels = math.nan
    if kind not in get_args(_Kind) or not -70 < decibels <= 0:
        raise UserError(f"--level: {text!r} is neither peak:DB nor lufs:DB with a number from -70 to 0, as in peak:-1")
    return cast(_Kind, kind), decibels


def main_of(args: argparse.Namespace) -> int:
    """Evaluate, store and print; returns the exit status.

    Raises:
        UserError: an argument is out of range, as `evaluation.evaluate.evaluate`, or the result can't be written.
    """
    options = options_of(args)
    there = options.save_statistics.glob("*.npz") if options.save_statistics else ()
    check_outputs([options.output, *there], overwrite=args.overwrite)
    from evaluation.evaluate import evaluate
    from evaluation.metrics.registry import METRICS
    from evaluation.result import result_table, save_result

    warnings.filterwarnings("ignore")
    if (result := evaluate(options)) is None:
        # Not the first process. Torch aborts now and then while it ends, and the launcher would stop the first one too.
        os._exit(0)
    print(result_table(result))
    lacking = [name for name in options.metrics if name in result.missing]
    if found := any(result.metric(name) for name in METRICS):
        save_result(result, options.output)
        print(options.output)
    if found and not lacking:
        return 0
    print(f"error: not measured: {', '.join(lacking) or 'anything'}; the lines above say why", file=sys.stderr)
    return 2


def main() -> int:
    """Run the command; returns its exit status."""
    parser = Parser(description=ABOUT)
    add_arguments(parser)
    return guarded(lambda: main_of(parser.parse_args()), "stopped; the same command goes on with what is embedded")


if __name__ == "__main__":
    sys.exit(main())
