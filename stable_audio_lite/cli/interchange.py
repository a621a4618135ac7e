"""`stable-audio-lite import` and `export`: checkpoints of stable-audio-tools and diffusers to bundles and back."""

from __future__ import annotations

import argparse
from pathlib import Path

from stable_audio_lite.command import Commands, add_overwrite, check_outputs, file_path
from stable_audio_lite.errors import UserError


def add_import(commands: Commands) -> None:
    """Add `import` to the command line."""
    about = """Make a bundle of a checkpoint: a system of stable-audio-tools like Stable Audio 1.0's, a VAE
of stable-audio-tools (dac or oobleck, as Stable Audio Open's), or diffusers' AutoencoderOobleck.
Only tensors are read: nothing in a file is ever run."""
    parser = commands.add_parser("import", help="checkpoints of stable-audio-tools to bundles", description=about)
    parser.set_defaults(run=_import)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", type=file_path, help=".ckpt or .safetensors, wrapped by Lightning or not")
    add("--config", required=True, type=file_path, help="its model_config.json, or diffusers' config.json")
    add("-o", "--output", metavar="BUNDLE", required=True, type=file_path, help="folder to write")
    add("--ema", action="store_true", help="take the averaged weights of a checkpoint that Lightning wrote")
    add("--vae-only", action="store_true", help="take only the VAE, of a system of any kind")
    add("--clap", metavar="SOURCE", help="the system's CLAP: LAION's .pt, a bundle or a hub id (default: left out)")
    add_overwrite(parser)


def add_export(commands: Commands) -> None:
    """Add `export` to the command line."""
    about = "Make a checkpoint of stable-audio-tools of a bundle, or of a VAE where it has no U-Net."
    parser = commands.add_parser("export", help="bundles to checkpoints of stable-audio-tools", description=about)
    parser.set_defaults(run=_export)
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="a bundle's folder, a shipped model or a hub id")
    add("-o", "--output", metavar="CHECKPOINT", required=True, type=file_path, help=".safetensors or .ckpt to write")
    add("--config", required=True, type=file_path, help="model_config.json to write")
    add_overwrite(parser)


def _import(args: argparse.Namespace) -> None:
    output: Path = args.output
    if output.exists() and not args.overwrite and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output}: is there already; choose another folder or give --overwrite")
    from stable_audio_lite.bundle import PARTS, part_path
    from stable_audio_lite.interchange.checkpoint import import_checkpoint

    import_checkpoint(args.checkpoint, args.config, output, ema=args.ema, vae_only=args.vae_only, clap=args.clap)
    parts = [name for name in PARTS if part_path(output, name).is_file()]
    print(f"{output}: {', '.join(parts)}")
    if "unet" in parts and "text_encoder" not in parts:
        print("no text encoder: import again with --clap to generate, or train on with a CLAP of its own")


def _export(args: argparse.Namespace) -> None:
    if args.output.suffix not in (".safetensors", ".ckpt"):
        raise UserError(f"{args.output}: must end in .safetensors or .ckpt")
    check_outputs([args.output, args.config], overwrite=args.overwrite)
    from stable_audio_lite.interchange.checkpoint import export_checkpoint

    described = export_checkpoint(args.bundle, args.output, args.config)
    print(f"{args.output}: {'the VAE alone' if described.scale is None else 'the whole system'}")
    if described.scale is not None:
        print(f"{args.config}: set clap_ckpt_path to the LAION-CLAP checkpoint that it was trained with")
