"""`stable-audio-lite encode` and `decode`: audio files to latents and back."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from stable_audio_lite.cli.options import add_model
from stable_audio_lite.command import Commands, Failures, Parser, add_overwrite, check_outputs, file_path
from stable_audio_lite.errors import UserError

if TYPE_CHECKING:
    from stable_audio_lite.codec import Codec


def add_encode(commands: Commands) -> None:
    """Add `encode` to the command line."""
    about = "Encode audio files of any length to latents, in constant memory."
    parser = commands.add_parser("encode", help="audio files to latents", description=about)
    parser.set_defaults(run=_encode)
    _add_files(parser, "audio files", "folder for NAME.safetensors")


def add_decode(commands: Commands) -> None:
    """Add `decode` to the command line."""
    about = "Decode latents of any length to sound, in constant memory."
    parser = commands.add_parser("decode", help="latents to audio files", description=about)
    parser.set_defaults(run=_decode)
    _add_files(parser, "what encode wrote", "folder for the sounds")
    parser.add_argument("--format", default="wav", choices=("wav", "flac"), help="of the sounds (default: wav)")


def _add_files(parser: Parser, files: str, output: str) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", type=file_path, help=files)
    parser.add_argument("-o", "--output", type=file_path, required=True, help=output)
    add_overwrite(parser)
    add_model(parser, "starter-vae")


def _encode(args: argparse.Namespace) -> int:
    def encode(codec: Codec, path: Path, output: Path) -> str:
        made = codec.encode_file(path, output)
        return f"{output}: {made.channels} channels x {made.frames} frames, {made.seconds:.2f} s"

    return _each(args, ".safetensors", encode)


def _decode(args: argparse.Namespace) -> int:
    def decode(codec: Codec, path: Path, output: Path) -> str:
        gain = codec.decode_file(path, output)
        return f"{output}{f': attenuated to {gain:.3f}' if gain < 1 else ''}"

    return _each(args, f".{args.format}", decode)


def _each(args: argparse.Namespace, suffix: str, work: Callable[[Codec, Path, Path], str]) -> int:
    """Work on every file, past those that fail, and print what comes of it; returns the exit status."""
    outputs, failures = _outputs(args, suffix), Failures()
    for path in args.files:
        with failures.of(path):
            _check_file(path)
    if files := [pair for pair in zip(args.files, outputs, strict=True) if pair[0].is_file()]:
        from stable_audio_lite.codec import Codec

        codec = Codec.from_pretrained(args.model, args.device, args.dtype)
    for path, output in files:
        with failures.of(path):
            print(work(codec, path, output), flush=True)
    return failures.status(len(args.files))


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the files in it, as in {path}/*")
    if not path.is_file():
        raise UserError(f"{path}: no such file")


def _outputs(args: argparse.Namespace, suffix: str) -> list[Path]:
    """One path in the folder per file, none of which is there or would be written twice."""
    if args.output.is_file():
        raise UserError(f"{args.output}: is a file; -o is the folder to write to")
    outputs = [args.output / f"{path.stem}{suffix}" for path in args.files]
    if len(set(outputs)) < len(outputs):
        twice = next(path for path in outputs if outputs.count(path) > 1)
        raise UserError(f"two of the files would become {twice}; rename one or run the command twice")
    check_outputs(outputs, args.files, overwrite=args.overwrite)
    return outputs
