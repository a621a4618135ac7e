"""`stable-audio-lite encode` and `decode`: audio files to latents and back."""

from __future__ import annotations

import argparse
from pathlib import Path

from stable_audio_lite.cli.options import add_model
from stable_audio_lite.command import Commands, Parser
from stable_audio_lite.errors import UserError


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
    parser.add_argument("--overwrite", action="store_true", help="replace sounds that are there")


def _add_files(parser: Parser, files: str, output: str) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", type=Path, help=files)
    parser.add_argument("-o", "--output", type=Path, required=True, help=output)
    add_model(parser, "starter-vae")


def _encode(args: argparse.Namespace) -> None:
    outputs = _outputs(args.files, args.output, ".safetensors")
    from stable_audio_lite.codec import Codec

    codec = Codec.from_pretrained(args.model, args.device, args.dtype)
    for path, output in zip(args.files, outputs, strict=True):
        made = codec.encode_file(path, output)
        print(f"{output}: {made.channels} channels x {made.frames} frames, {made.seconds:.2f} s", flush=True)


def _decode(args: argparse.Namespace) -> None:
    outputs = _outputs(args.files, args.output, f".{args.format}")
    if not args.overwrite and (there := [path for path in outputs if path.exists()]):
        raise UserError(
            f"{there[0]}: is there already, perhaps the original; choose another folder or give --overwrite"
        )
    from stable_audio_lite.codec import Codec

    codec = Codec.from_pretrained(args.model, args.device, args.dtype)
    for path, output in zip(args.files, outputs, strict=True):
        gain = codec.decode_file(path, output)
        print(f"{output}{f': attenuated to {gain:.3f}' if gain < 1 else ''}", flush=True)


def _outputs(files: list[Path], folder: Path, suffix: str) -> list[Path]:
    """One path in `folder` per file; two files of one name, which would overwrite each other, are refused."""
    if folder.is_file():
        raise UserError(f"{folder}: is a file; -o is the folder to write to")
    if missing := [path for path in files if not path.is_file()]:
        raise UserError(f"{missing[0]}: no such file")
    outputs = [folder / f"{path.stem}{suffix}" for path in files]
    if len(set(outputs)) < len(outputs):
        twice = next(path for path in outputs if outputs.count(path) > 1)
        raise UserError(f"two of the files would become {twice}; rename one or run the command twice")
    return outputs
