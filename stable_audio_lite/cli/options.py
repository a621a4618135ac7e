"""Options that several commands share."""

from __future__ import annotations

from stable_audio_lite.command import Parser

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_model(parser: Parser, default: str) -> None:
    """Declare --model, --device and --dtype."""
    add = parser.add_argument
    add("--model", default=default, help=f"a shipped model, a bundle's folder or a hub id (default: {default})")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ... (default: auto)")
    add("--dtype", default="auto", choices=_DTYPES, help="number type of the weights (default: auto)")
