"""Speed and memory of a model on this machine, in one table.

    python -m evaluation.benchmarks                                        # the starter, everything
    python -m evaluation.benchmarks runs/student --steps 8 --only load generate -o speed.json
    python -m evaluation.benchmarks configs/stable_audio/paper.yaml --frames 1024 --seconds 24

Parts: load (time to a loaded model, to a first sound, its memory), generate (speed by length, steps and number type),
unet (a step with guidance), vae (encode, decode), train (a step of U-Net and of VAE), memory (of a sound as long as the
window, and of coding long files). Networks are also given as a share of the rate of this machine's matrix products.
Peers with the same weights take turns where they are installed: descript-audio-codec, stable-audio-tools, diffusers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from stable_audio_lite.command import Parser, add_overwrite, check_outputs, file_path, guarded
from stable_audio_lite.errors import UserError

if TYPE_CHECKING:
    import torch

    from evaluation.benchmarks.table import Row

_PARTS = ("load", "generate", "unet", "vae", "train", "memory")
_WHOLE = ("load", "generate")  # need a bundle


def main() -> int:
    """Run the command; returns its exit status."""
    parser = Parser(prog="python -m evaluation.benchmarks", description=__doc__)
    add = parser.add_argument
    about = "a bundle, or a model's YAML, whose networks get random weights (default: starter)"
    add("model", nargs="?", default="starter", help=about)
    add("--only", nargs="+", choices=_PARTS, metavar="PART", help=f"of {', '.join(_PARTS)} (default: all that can be)")
    about = "of sounds that are made; the first also of what is loaded for and coded (default: 10 4)"
    add("--seconds", type=float, nargs="+", default=[10.0, 4.0], help=about)
    add("--frames", type=int, help="of latents in a step of the U-Net (default: the model's window)")
    add("--steps", type=int, nargs="+", default=[], help="of generation (default: the model's)")
    add("--dtypes", nargs="+", help="number types (default: this machine's best, and float32)")
    add("--minutes", type=float, nargs="+", default=[1.0], help="of the files whose coding takes memory (default: 1)")
    add("--clips", type=int, nargs="+", default=[], help="also the memory of evaluating so many clips (default: none)")
    add("--repeats", type=int, default=5, help="measurements of each figure (default: 5)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    add("-o", "--output", type=file_path, help="JSON file for the figures and the machine's description")
    add_overwrite(parser)
    return guarded(lambda: _run(parser.parse_args()))


def _run(args: argparse.Namespace) -> None:
    from evaluation.benchmarks.machine import describe_machine
    from evaluation.benchmarks.table import CostTable
    from evaluation.output import without_nan
    from stable_audio_lite.devices import choose_device, choose_dtype
    from stable_audio_lite.files import replacing

    sizes = {"seconds": min(args.seconds), "frames": args.frames, "repeats": args.repeats}
    sizes |= {"steps": min(args.steps, default=1), "minutes": min(args.minutes), "clips": min(args.clips, default=1)}
    for name, value in sizes.items():
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be above 0, got {value:g}")
    if args.output is not None:
        check_outputs([args.output], overwrite=args.overwrite)
    device = choose_device(args.device)
    names = args.dtypes or ["auto", "float32"]
    dtypes = list(dict.fromkeys(choose_dtype(name, device) for name in names))
    table = CostTable(model=args.model, machine=describe_machine(device), repeats=args.repeats)
    for row in _rows(args, device, dtypes):
        table.rows.append(row)
        print(f"{row.what}, {row.how}: {row.figure} {row.unit}", file=sys.stderr, flush=True)
    print(table.as_text())
    if args.output is not None:
        with replacing(args.output) as temporary:
            temporary.write_text(json.dumps(without_nan(table.as_dict()), indent=2) + "\n", encoding="utf-8")


def _rows(args: argparse.Namespace, device: torch.device, dtypes: list[torch.dtype]) -> Iterator[Row]:
    """Measure the parts that are asked for, each row as soon as it is there."""
    from evaluation.benchmarks import generation, networks, processes

    subject = networks.Subject.of(args.model)
    folder, config = subject.folder, subject.config
    parts = args.only or [part for part in _PARTS if folder is not None or part not in _WHOLE]
    if folder is None and (whole := [part for part in parts if part in _WHOLE]):
        raise UserError(f"--only {whole[0]}: {args.model} has no weights; give a bundle")
    if max(args.seconds) > config.window_seconds and {"load", "generate"} & set(parts):
        print(f"sounds longer than {config.window_seconds:.1f} s are made in several windows", file=sys.stderr)
    sizes = networks.Sizes(frames=args.frames or config.latent_frames, seconds=args.seconds[0])
    measured = (subject, sizes, device, dtypes, args.repeats)
    if "load" in parts:
        yield from processes.load_rows(str(folder), args.seconds[0], str(device), args.repeats)
    if "generate" in parts:
        asked = (args.seconds, args.steps, str(device), dtypes, args.repeats)
        yield from generation.generation_rows(str(folder), *asked)
    if "unet" in parts:
        yield from networks.unet_rows(*measured)
    if "vae" in parts:
        yield from networks.vae_rows(*measured)
    if "train" in parts:
        yield from networks.training_rows(*measured)
    if "memory" in parts:
        yield from processes.window_rows(args.model, device, dtypes[0], args.repeats)
    if "memory" in parts and folder is not None:
        yield from processes.codec_rows(str(folder), args.minutes, args.repeats)
        yield from processes.evaluation_rows(str(folder), args.clips, args.repeats)


if __name__ == "__main__":
    sys.exit(main())
