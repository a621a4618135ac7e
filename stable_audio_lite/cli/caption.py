"""`stable-audio-lite caption`: captions for a folder of music, from its files' tags and its folders' names."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from stable_audio_lite.command import Commands, add_overwrite, check_outputs, file_path
from stable_audio_lite.errors import UserError

_SHOWN = 10
_ABOUT = """Write a caption for each file of FOLDER into FOLDER/metadata.jsonl, for training to read.

A file keeps the caption that lies beside it, in a .txt or .json of the same name. All others get one by the template:
a text with fields in braces, where a part between commas is left out if the file doesn't have that tag.
Fields: title (or else the file's name), artist, album, genre, bpm, key, folder, name."""


def add_command(commands: Commands) -> None:
    """Add `caption` to the command line."""
    parser = commands.add_parser("caption", help="captions from tags and names of files", description=_ABOUT)
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=file_path, help="a folder of audio")
    add("--template", metavar="TEXT", help='default: "{genre}, {folder}, {title}, {bpm} bpm, {key}"')
    add("--dry-run", action="store_true", help=f"write nothing, show {_SHOWN} of the captions")
    place = "another place for the list, for a folder that can't be written"
    add("-o", "--output", metavar="LIST.jsonl", type=file_path, help=place)
    add_overwrite(parser)


def _run(args: argparse.Namespace) -> None:
    from stable_audio_lite.data.captions import TEMPLATE, CaptionTemplate, describe_files
    from stable_audio_lite.data.manifest import unlisted_items
    from stable_audio_lite.files import replacing

    folder: Path = args.folder
    output: Path = args.output or folder / "metadata.jsonl"
    if output.suffix != ".jsonl":
        raise UserError(f"{output}: must end in .jsonl")
    template = CaptionTemplate(TEMPLATE if args.template is None else args.template)
    items = unlisted_items(folder)
    if not args.dry_run:
        lists = [] if args.output else [folder / "metadata.csv"]  # which this one would hide
        check_outputs([output, *(file for file in lists if file.exists())], overwrite=args.overwrite)
    captions = describe_files(items, folder, template)
    rows = [
        item.metadata | {"file_name": _name(Path(str(item.path)), output.parent)} | ({"text": text} if text else {})
        for item, text in zip(items, captions, strict=True)
    ]
    without = [row["file_name"] for row in rows if not row.get("text")]
    if len(without) == len(rows):
        raise UserError(f"{folder}: no file has a tag for {args.template!r}; {{title}} and {{folder}} are always there")
    for row in rows[: _SHOWN if args.dry_run else 0]:
        print(f"{row['file_name']}: {row.get('text', '(no caption)')}")
    if without:
        print(f"{len(without)} of {len(rows)} files get no caption, such as {without[0]}")
    if args.dry_run:
        print(f"{len(rows)} files; nothing is written yet (leave out --dry-run)")
        return
    with replacing(output) as temporary:
        temporary.write_text("".join(map(_line, rows)), encoding="utf-8", newline="\n")
    print(f"{output}: {len(rows) - len(without)} captions")


def _line(row: dict[str, Any]) -> str:
    """A row as JSON, readable where it can be: names of files need not be valid UTF-8."""
    line = json.dumps(row, ensure_ascii=False)
    return (line if line.isprintable() else json.dumps(row)) + "\n"


def _name(path: Path, place: Path) -> str:
    """The name of a file in a list at `place`: relative to it where the file is below, else absolute."""
    absolute = Path(os.path.abspath(path))
    below = absolute.is_relative_to(os.path.abspath(place))
    return (absolute.relative_to(os.path.abspath(place)) if below else absolute).as_posix()
