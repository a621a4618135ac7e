"""`stable-audio-lite continue`: what follows a sound, of any length."""

from __future__ import annotations

import argparse
import itertools
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from stable_audio_lite.cli.generate import numbered, texts_of, told
from stable_audio_lite.cli.options import add_sampling, check_count, sampling_of
from stable_audio_lite.cli.progress import ProgressBar
from stable_audio_lite.cli.prompts import prompts_of
from stable_audio_lite.command import Commands, Failures, check_outputs, file_path

if TYPE_CHECKING:
    import torch

    from stable_audio_lite.pipeline import StableAudio

_ABOUT = """Go on where a sound ends. What is written begins with FILE's own samples (at the model's rate, in stereo,
turned down where they exceed full scale); the rest is made in windows that go on from one another, in constant
memory. FILE's own prompt is used where it holds one and none is given."""


def add_command(commands: Commands) -> None:
    """Add `continue` to the command line."""
    parser = commands.add_parser("continue", help="make what follows a sound", description=_ABOUT)
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("file", metavar="FILE", type=file_path, help="the sound")
    add("prompt", nargs="?", metavar="PROMPT", help="what to hear after it")
    add("--seconds", type=float, required=True, help="length to add")
    add("-o", "--output", type=file_path, help="a .wav or .flac file (default: FILE's name and the seed, .wav)")
    add_sampling(parser)


def _run(args: argparse.Namespace) -> int:
    check_count(args.count)
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    outputs = numbered(args.output or Path(f"{args.file.stem}-{seed}.wav"), args.count)
    from stable_audio_lite.audio.io import check_writable, write_audio_blocks
    from stable_audio_lite.audio.levels import Leveller

    for path in outputs:
        check_writable(path)
    check_outputs(outputs, [args.file], overwrite=args.overwrite)
    prompts = prompts_of(args, args.file)
    from stable_audio_lite.edits import Sound
    from stable_audio_lite.pipeline import StableAudio

    model = StableAudio.from_pretrained(args.model, args.device, args.dtype, args.lora, args.lora_strength)
    after, failures = Sound.read(args.file, model.sample_rate, model.window_seconds), Failures()
    prompt, channels = next(iter(prompts), None), model.representation.audio_channels
    with ProgressBar(args.count, lambda: model.remarks(texts_of(prompts, args.negative))) as progress:
        for item, path in enumerate(outputs):
            within = progress.within(item, item + 1)
            made = model.extend(prompt, after=after, seed=seed + item, progress=within, **sampling_of(args))
            leveller = Leveller(made.sample_rate)
            blocks = itertools.chain(_source(args.file, model), map(leveller.levelled, made.pieces))
            with failures.of(path):
                gain = write_audio_blocks(path, blocks, made.sample_rate, made.settings, channels)
                progress.clear()
                level = f", turned down to {leveller.least:.3f}" if leveller.least < 1 else ""
                level += f", all of it attenuated to {gain:.3f}, for FILE exceeds full scale" if gain < 1 else ""
                print(f"{told(path, made.settings)}{level}", flush=True)
    return failures.status(args.count)


def _source(path: Path, model: StableAudio) -> Iterator[torch.Tensor]:
    """The sound that is continued, as it is read."""
    from stable_audio_lite.audio.io import stereo_blocks

    for block in stereo_blocks(path, model.sample_rate):
        yield block if model.representation.audio_channels == 2 else block.mean(0, keepdim=True)
