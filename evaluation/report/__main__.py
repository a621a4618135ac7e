"""One page for one model: metrics beside what gives them meaning, pictures and players, real beside generated.

    python -m evaluation.report result.json -o report.html
    python -m evaluation.report result.json -o report.html --embed     # one file to send, with copies of the sounds

The page opens from disk and loads nothing but the sounds, which it links where they lie.
"""

from __future__ import annotations

import argparse
import sys

from evaluation.report.page import write_report
from stable_audio_lite.command import Parser, add_overwrite, check_outputs, file_path, guarded
from stable_audio_lite.errors import UserError


def main() -> int:
    """Run the command; returns its exit status."""
    parser = Parser(prog="python -m evaluation.report", description=__doc__)
    parser.add_argument("result", type=file_path, help="JSON that evaluation.run wrote")
    parser.add_argument("-o", "--output", type=file_path, metavar="FILE", help="the page (default: RESULT with .html)")
    add_overwrite(parser)
    parser.add_argument("--embed", action="store_true", help="copy the sounds into the page, as MP3")
    parser.add_argument("--prompts", type=int, default=200, help="prompts shown with their sounds (default: 200)")
    return guarded(lambda: _run(parser.parse_args()))


def _run(args: argparse.Namespace) -> None:
    page = args.output or args.result.with_suffix(".html")
    check_outputs([page], [args.result], overwrite=args.overwrite)
    if args.prompts < 0:
        raise UserError(f"--prompts must be 0 or more, got {args.prompts}")
    cards = write_report(args.result, page, embed=args.embed, prompts=args.prompts)
    if mute := [card for card in cards if card.trouble]:
        first = mute[0].trouble
        print(f"{len(mute)} of {len(cards)} sounds have no picture and player; the first: {first}", file=sys.stderr)
    print(page)


if __name__ == "__main__":
    sys.exit(main())
