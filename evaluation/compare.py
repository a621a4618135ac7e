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

from evaluation.result import MetricValue, Result, different_settings, format_value, load_result
from stable_audio_lite.command import Failures, Parser, file_path, guarded
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
            keys = "; ".join(f"{key} ({_shortened(a)}, {_shortened(b)})" for key, (a, b) in different.items())
            raise UserError(f"{paths[0]} and {path} don't compare, their settings differ: {keys}; evaluate both alike")


def differ(one: MetricValue, other: MetricValue) -> bool:
    """True where two values differ at the 5 % level, by their intervals: independent, roughly normal errors add.

    Half the width of a 95 % interval is 1.96 standard errors, and a difference's error is the root of the sum of both
    squares. Overlap of the intervals alone is a stricter rule (Schenker & Gentleman 2001). Without an interval, no.
    """
    spread = math.hypot((one.high - one.low) / 2, (other.high - other.low) / 2)
    return abs(one.value - other.value) > spread


def best(metrics: Sequence[MetricValue | None]) -> MetricValue | None:
    """The best of one metric's values; None where neither direction is better, or there is none."""
    known = [metric for metric in metrics if metric and math.isfinite(metric.value)]
    if not known or known[0].higher_is_better is None:
        return None
    return (max if known[0].higher_is_better else min)(known, key=lambda metric: metric.value)


def comparison_table(results: Sequence[Result], paths: Sequence[Path]) -> str:
    """The table in Markdown, and what its signs mean."""
    lines = ["| metric | " + " | ".join(_names(results, paths)) + " |", "|---|" + "---|" * len(results)]
    for name in dict.fromkeys(metric.name for result in results for metric in result.metrics):
        metrics = [result.metric(name) for result in results]
        first = next(metric for metric in metrics if metric)
        winner = best(metrics)
        sizes = {metric.n for metric in metrics if metric}
        cells = [_cell(metric, winner, winner or first, several=len(sizes) > 1) for metric in metrics]
        sign = {True: " ↑", False: " ↓", None: ""}[first.higher_is_better]
        size = f" (n = {first.n} {first.unit}".rstrip() + ")" if len(sizes) == 1 else ""
        lines.append(f"| {_plain(name + sign + size)} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", LEGEND])


def _cell(metric: MetricValue | None, winner: MetricValue | None, held_against: MetricValue, several: bool) -> str:
    if metric is None:
        return "not measured"
    value = format_value(metric.value)
    value = f"**{value}**" if winner and metric.value == winner.value else value
    size = f", n = {metric.n}" if several else ""
    alike = "" if metric is held_against or differ(metric, held_against) else f" {ALIKE}"
    span = f" [{format_value(metric.low)}, {format_value(metric.high)}]" if metric.has_interval else ""
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


def _shortened(value: object) -> str:
    text = "not there" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def main() -> int:
    """Run the command; returns its exit status."""
    parser = Parser(description=__doc__)
    parser.add_argument("results", nargs="+", type=file_path, metavar="RESULT", help="JSON that evaluation.run wrote")
    return guarded(lambda: _run(parser.parse_args()))


def _run(args: argparse.Namespace) -> int:
    if len(args.results) < 2:
        raise UserError("give at least two results to compare")
    found, failures = {}, Failures()
    for path in args.results:
        with failures.of(path):
            found[path] = load_result(path)
    if len(found) > 1:
        paths, results = list(found), list(found.values())
        check_comparable(results, paths)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # the table's signs are in no Windows code page
        print(comparison_table(results, paths))
    return failures.status(len(args.results))


if __name__ == "__main__":
    sys.exit(main())
