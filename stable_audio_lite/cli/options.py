"""Options that several commands share."""

from __future__ import annotations

import argparse
import re
from typing import Any

from stable_audio_lite.command import Parser, add_overwrite, file_path
from stable_audio_lite.errors import UserError

_MOST_ITEMS = 10_000
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_SAMPLING = ("seconds", "seconds_start", "seconds_total", "steps", "cfg", "rescale", "negative", "sampler")


def add_model(parser: Parser, default: str) -> None:
    """Declare --model, --device and --dtype."""
    add = parser.add_argument
    add("--model", default=default, help=f"a shipped model, a bundle's folder or a hub id (default: {default})")
    _add_device(parser)


def _add_device(parser: Parser) -> None:
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ... (default: auto)")
    add("--dtype", default="auto", choices=_DTYPES, help="number type of the weights (default: auto)")


def add_models(parser: Parser) -> None:
    """Declare --model and --lora, of which a server takes several, --device and --dtype."""
    add = parser.add_argument
    models = "shipped models, bundles' folders or hub ids; the first is the default (default: starter)"
    add("--model", nargs="+", default=["starter"], metavar="MODEL", help=models)
    add("--lora", nargs="+", default=[], type=file_path, metavar="FOLDER", help="LoRAs that can be asked for")
    _add_device(parser)


def add_sampling(parser: Parser) -> None:
    """Declare what all commands that generate take."""
    add = parser.add_argument
    add("--bpm", type=float, help="tempo, which the prompt then says")
    add("--key", metavar="KEY", help="such as 'A minor' or 'Eb major', which the prompt then says")
    add("--negative", metavar="TEXT", help="what not to hear; replaces the unconditional half of guidance")
    add("--seconds-start", type=float, help="where in the described piece the sound begins (default: 0, or after FILE)")
    add("--seconds-total", type=float, help="length of the described piece (default: it ends with the sound)")
    add("--seed", type=int, help="of the first item, the next one more each (default: random, printed)")
    add("--steps", type=int, help="sampling steps (default: the model's)")
    add("--cfg", type=float, help="guidance scale, 1 is none (default: the model's)")
    add("--rescale", type=float, help="0..1, guidance pulled back to the unguided level (default: the model's)")
    add("--sampler", help="how to sample (default: the model's; an unknown name lists them)")
    add("--count", type=int, default=1, help="items per prompt (default: 1)")
    add_model(parser, "starter")
    add("--lora", metavar="FOLDER", type=file_path, help="a LoRA that was trained for this model")
    add("--lora-strength", type=float, help="1 is as trained (default: 1)")
    add_overwrite(parser)


def check_count(count: int) -> None:
    """Refuse a number of items per prompt that nobody means, such as a seed.

    Raises:
        UserError: it is below 1, or too large.
    """
    if not 1 <= count <= _MOST_ITEMS:
        raise UserError(f"--count must lie in 1..{_MOST_ITEMS}, got {count}")


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """Pick the arguments that `StableAudio.generate` and `extend` take by the same names."""
    return {name: getattr(args, name) for name in _SAMPLING}


def stretch(text: str) -> tuple[float, float]:
    """Parse a stretch of a sound, START-END in seconds."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)-(\d+\.?\d*|\.\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not START-END in seconds, as in 1.5-1.8")
    return float(match[1]), float(match[2])
