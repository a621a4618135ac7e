"""`stable-audio-lite info`: facts about a model or a generated file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from stable_audio_lite.command import Commands
from stable_audio_lite.files import expanded


def add_command(commands: Commands) -> None:
    """Add `info` to the command line."""
    about = "Parameters, shape and window of a model of any kind, or what is stored in a generated file."
    parser = commands.add_parser("info", help="parameters, shape and window of a model", description=about)
    parser.set_defaults(run=_run)
    parser.add_argument(
        "path", help="a config (a file, or stable_audio/paper), a bundle (a folder, a hub id, starter), or a sound"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(args: argparse.Namespace) -> None:
    path = expanded(args.path)
    suffix = path.suffix.lower()
    if suffix in (".wav", ".flac") or (path.is_file() and suffix not in (".yaml", ".yml")):
        facts = _sound(path)
    else:
        from stable_audio_lite.describe import describe

        facts = describe(args.path)
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    for key, value in _flat(facts):
        rounded = f" ({value / 1e6:.1f} M)" if key.startswith("parameters.") else ""
        print(f"{key:28} {value}{rounded}")


def _sound(path: Path) -> dict[str, Any]:
    from stable_audio_lite.audio.io import audio_info, read_metadata

    header, stored = audio_info(path), read_metadata(path).settings
    return {"sample_rate": header.sample_rate, "channels": header.channels, **stored, "seconds": header.seconds}


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Rows of dotted key and value; lists become "64 x 4096" or "vae, unet"."""
    rows: list[tuple[str, Any]] = []
    for key, value in facts.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            rows.append((prefix + key, (", " if value and isinstance(value[0], str) else " x ").join(map(str, value))))
        else:
            rows.append((prefix + key, value))
    return rows
