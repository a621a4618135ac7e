"""Results side by side: a Markdown table with intervals, the best in bold, what may be chance marked.

    python -m evaluation.compare starter.json tuned.json

Results whose settings differ don't compare, and are refused with the keys that differ.
"""

from __future__ import annotations

import argparse
import html
import io
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from evaluation.result import Figure, Result, different_settings, load_result, shown
from stable_audio_lite.errors import UserError

ALIKE = "≈"
LEGEND = (
    "In brackets: 95 % bootstrap intervals. ↑, ↓: larger, smaller is better; **bold**: the best, or where neither is "
    f"better the first column stands for it. {ALIKE}: not significantly different from that one, as |difference| ≤ "
    "√(h₁² + h₂²) with h half the width of each interval (5 % level, sounds drawn independently)."
)


def check_comparable(results: Sequence[Result], paths: Sequence[Path]) -> None:
    """Refuse results that were not measured alike.

    Raises:
        UserError: settings differ; the message lists them.
    """
    for result, path in zip(results[1:], paths[1:], strict=True):
        if different := different_settings(results[0].settings, result.settings):
            keys = "; ".join(f"{key} ({_value(a)}, {_value(b)})" for key, (a, b) in different.items())
            raise UserError(f"{paths[0]} and {path} don't compare, their settings differ: {keys}; evaluate both alike")


def differ(one: Figure, other: Figure) -> bool:
    """Whether two figures differ at the 5 % level, by their intervals: those of independent, roughly normal errors add.

    Half the width of a 95 % interval is 1.96 standard errors, and a difference's error is the root of the sum of both
    squares. Overlap of the intervals alone is a stricter rule (Schenker & Gentleman 2001). Without an interval, no.
    """
    spread = math.hypot((one.high - one.low) / 2, (other.high - other.low) / 2)
    return abs(one.value - other.value) > spread


def best(figures: Sequence[Figure | None]) -> Figure | None:
    """The best of one metric's figures; None where neither direction is better, or there is none."""
    known = [figure for figure in figures if figure and math.isfinite(figure.value)]
    if not known or known[0].higher_is_better is None:
        return None
    return (max if known[0].higher_is_better else min)(known, key=lambda figure: figure.value)


def as_markdown(results: Sequence[Result], paths: Sequence[Path]) -> str:
    """The table and what its signs mean."""
    lines = ["| metric | " + " | ".join(_names(results, paths)) + " |", "|---|" + "---|" * len(results)]
    for name in dict.fromkeys(figure.name for result in results for figure in result.figures):
        figures = [result.figure(name) for result in results]
        first = next(figure for figure in figures if figure)
        winner = best(figures)
        sizes = {figure.n for figure in figures if figure}
        cells = [_cell(figure, winner, winner or first, several=len(sizes) > 1) for figure in figures]
        sign = {True: " ↑", False: " ↓", None: ""}[first.higher_is_better]
        size = f" (n = {first.n} {first.unit}".rstrip() + ")" if len(sizes) == 1 else ""
        lines.append(f"| {_plain(name + sign + size)} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", LEGEND])


def _cell(figure: Figure | None, winner: Figure | None, held_against: Figure, several: bool) -> str:
    if figure is None:
        return "not measured"
    value = f"**{shown(figure.value)}**" if winner and figure.value == winner.value else shown(figure.value)
    size = f", n = {figure.n}" if several else ""
    alike = "" if figure is held_against or differ(figure, held_against) else f" {ALIKE}"
    span = f" [{shown(figure.low)}, {shown(figure.high)}]" if figure.has_interval else ""
    return f"{value}{span}{size}{alike}"


def _names(results: Sequence[Result], paths: Sequence[Path]) -> list[str]:
    """Models by name, and by file where several have the same."""
    names = [result.model for result in results]
    return [
        _plain(name if names.count(name) == 1 else f"{name} ({path})") for name, path in zip(names, paths, strict=True)
    ]


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, within a table's cell."""
    readable = " ".join(text.encode("utf-8", "replace").decode().split())
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(readable, quote=False))


def _value(value: object) -> str:
    text = "not there" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def main() -> None:
    """Run the command; mistakes end in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT", help="JSON that evaluation.run wrote")
    args = parser.parse_args()
    try:
        if len(args.results) < 2:
            raise UserError("give at least two results to compare")
        results = [load_result(path) for path in args.results]
        check_comparable(results, args.results)
        table = as_markdown(results, args.results)
    except UserError as error:
        sys.exit(f"error: {error}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # the table's signs are in no Windows code page
    print(table)


if __name__ == "__main__":
    main()
