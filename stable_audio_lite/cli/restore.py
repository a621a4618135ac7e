"""`stable-audio-lite restore`: repair of a sound file."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from stable_audio_lite.cli.options import add_model, stretch
from stable_audio_lite.cli.progress import ProgressBar
from stable_audio_lite.command import Commands, add_overwrite, check_outputs, file_path
from stable_audio_lite.errors import UserError

if TYPE_CHECKING:
    from stable_audio_lite.restoration.degradations import Degradation

_OPTION_OF = {"inpaint": "gap", "bandwidth": "cutoff", "denoise": "noise_db", "dereverb": "room"}
"""The option that only this task takes."""


def add_command(commands: Commands) -> None:
    """Add `restore` to the command line."""
    about = """Repair a sound file of any length: missing stretches or frequencies, noise, a known room's reverberation.

The shipped model works on frequencies up to 8 kHz; what a file holds above stays as it is, except within gaps. On a CPU
it takes long: how long is told before it starts."""
    parser = commands.add_parser("restore", help="repair a sound file", description=about)
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("file", metavar="IN", type=file_path, help="the sound")
    add("-o", "--output", type=file_path, required=True, help="a .wav or .flac file")
    add_overwrite(parser)
    add("--task", required=True, choices=tuple(_OPTION_OF), help="what is wrong with it")
    add(
        "--gap",
        nargs="+",
        metavar="START-END",
        type=stretch,
        help="inpaint: what is missing, in seconds",
    )
    cutoff = "bandwidth: where the sound's frequencies end (default: by its rate)"
    add("--cutoff", type=float, metavar="HZ", help=cutoff)
    add("--noise-db", type=float, metavar="DB", help="denoise: level, full scale is 0 (default: estimated)")
    add("--room", type=file_path, metavar="FILE", help="dereverb: the room's impulse response, which it needs")
    add("--steps", type=int, default=50, help="sampling steps (default: 50)")
    add("--eta", type=float, default=0.8, help="share of fresh noise in what is unknown, 0..1 (default: 0.8)")
    add("--eta-b", type=float, default=0.8, help="weight of what is known, 0..1 (default: 0.8)")
    add("--seed", type=int, help="of the noise (default: random, printed)")
    add("--batch", type=int, default=4, help="windows worked on at once (default: 4)")
    add_model(parser, "restorer")


def _run(args: argparse.Namespace) -> None:
    _check_options(args)
    from stable_audio_lite.audio.io import audio_info, check_writable

    check_writable(args.output)
    check_outputs([args.output], [args.file, *([args.room] if args.room else [])], overwrite=args.overwrite)
    header = audio_info(args.file)
    from stable_audio_lite.restoration.restorer import Restorer, RestoreSettings

    settings = RestoreSettings(steps=args.steps, eta=args.eta, eta_b=args.eta_b, seed=args.seed, batch=args.batch)
    model = Restorer.from_pretrained(args.model, args.device, args.dtype)
    degradation = _degradation(args, header.sample_rate, model.sample_rate)
    samples = round(header.seconds * model.sample_rate)
    seconds = model.estimate_seconds(samples, header.channels, degradation, settings)
    print(f"about {seconds:.0f} s for {header.seconds:.1f} s of sound on {model.device}", file=sys.stderr, flush=True)
    if header.sample_rate > model.sample_rate:
        kept = "within gaps there is nothing" if args.task == "inpaint" else "the file stays as it is"
        print(f"the model works on up to {model.sample_rate // 2} Hz; above, {kept}", file=sys.stderr, flush=True)
    started = time.perf_counter()
    with ProgressBar(1) as progress:
        done = model.restore_file(args.file, args.output, degradation, settings, progress.within(0, 1))
    rest = ", ".join(f"{key} {value}" for key, value in done.settings.items() if value is not None)
    quieter = f", attenuated to {done.gain:.3f}" if done.gain < 1 else ""
    working = time.perf_counter() - started
    print(f"{args.output}: {rest}{quieter}\n{done.seconds:.1f} s of sound in {working:.1f} s on {model.device}")


def _check_options(args: argparse.Namespace) -> None:
    for task, option in _OPTION_OF.items():
        if task != args.task and getattr(args, option) is not None:
            raise UserError(f"--{option.replace('_', '-')}: belongs to --task {task}, not to {args.task}")
    if args.task == "inpaint" and not args.gap:
        raise UserError("--task inpaint: say what is missing, as in --gap 1.5-1.8")
    if args.task == "dereverb" and args.room is None:
        raise UserError(
            "--task dereverb: give --room FILE, the room's impulse response; guessing it makes recordings worse"
        )


def _degradation(args: argparse.Namespace, rate: int, model_rate: int) -> Degradation:
    from stable_audio_lite.audio.io import read_audio
    from stable_audio_lite.restoration.degradations import Bandwidth, Denoise, Dereverb, Inpaint

    if args.task == "inpaint":
        return Inpaint(tuple(args.gap))
    if args.task == "bandwidth":
        if args.cutoff is None and rate >= model_rate:
            raise UserError(f"--task bandwidth: give --cutoff, for {args.file} has a rate of {rate} Hz")
        return Bandwidth(rate / 2 if args.cutoff is None else args.cutoff)
    if args.task == "denoise":
        return Denoise(args.noise_db)
    return Dereverb(read_audio(args.room, model_rate).mean(0))
