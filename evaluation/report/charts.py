"""Charts as SVG, for a page whose colours are its style sheet's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.result import MetricValue, format_value

_WIDTH, _HEIGHT, _MARGIN = 200, 24, 8  # of a strip
_CELL, _LEFT, _BELOW, _MOST = 44, 64, 46, 40  # of a histogram; more columns than _MOST are not drawn


def strip(metric: MetricValue, columns: Sequence[str]) -> str:
    """A metric's value and interval on a line, among its baselines; `columns` number the colours."""
    known = {name: value for name, value in metric.baselines.items() if math.isfinite(value)}
    ends = [v for v in (metric.value, metric.low, metric.high, *known.values()) if math.isfinite(v)]
    if not known or not math.isfinite(metric.value):
        return ""
    low, span = min(ends), (max(ends) - min(ends)) or 1.0

    def at(value: float) -> str:
        return f"{_MARGIN + (_WIDTH - 2 * _MARGIN) * (value - low) / span:.1f}"

    middle = _HEIGHT // 2
    parts = [f'<line class="axis" x1="0" x2="{_WIDTH}" y1="{middle}" y2="{middle}"/>']
    for name, value in known.items():
        parts.append(
            f'<line class="mark c{columns.index(name) % 6}" x1="{at(value)}" x2="{at(value)}" y1="3" y2="21"/>'
        )
    if metric.has_interval:
        parts.append(
            f'<line class="interval" x1="{at(metric.low)}" x2="{at(metric.high)}" y1="{middle}" y2="{middle}"/>'
        )
    parts.append(f'<circle class="value" cx="{at(metric.value)}" cy="{middle}" r="4"/>')
    return f'<svg class="strip" viewBox="0 0 {_WIDTH} {_HEIGHT}" aria-hidden="true">{"".join(parts)}</svg>'


def histogram(cells: Sequence[Mapping[str, Any]]) -> str:
    """Rows of `metrics.summary`'s "timing_histogram": lengths asked for to the right, measured ones upward.

    A cell is as opaque as its share of the column; outlined are those where lengths are as asked for. "" for no rows,
    or others than these.
    """
    width, places = _places(cells)
    if not places or not all(0 <= place < _MOST for column, row, _ in places for place in (column, row)):
        return ""
    totals = {column: sum(n for other, _, n in places if other == column) for column, _, _ in places}
    first = min(min(column, row) for column, row, _ in places)
    count = max(max(column, row) for column, row, _ in places) - first + 1
    size = count * _CELL

    def corner(column: int, row: int) -> tuple[int, int]:
        return _LEFT + (column - first) * _CELL, size - (row - first + 1) * _CELL

    parts = []
    for column, row, number in places:
        (x, y), share = corner(column, row), number / totals[column]
        strong = " strong" if share > 0.5 else ""
        parts.append(f'<rect class="cell" x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" opacity="{share:.3f}"/>')
        parts.append(f'<text class="count{strong}" x="{x + _CELL // 2}" y="{y + _CELL // 2 + 5}">{number}</text>')
    for place in range(first, first + count):
        x, y = corner(place, place)
        parts.append(f'<rect class="asked" x="{x}" y="{y}" width="{_CELL}" height="{_CELL}"/>')
    for place in range(first, first + count + 1):
        x, y = corner(place, place)
        label = format_value(place * width)
        parts.append(f'<text class="tick" x="{x}" y="{size + 18}">{label}</text>')
        parts.append(f'<text class="tick side" x="{_LEFT - 8}" y="{y + _CELL + 5}">{label}</text>')
    parts.append(f'<text class="tick" x="{_LEFT + size // 2}" y="{size + 40}">seconds asked for</text>')
    parts.append(
        f'<text class="tick" transform="translate(14 {size // 2}) rotate(-90)">seconds until the sound ends</text>'
    )
    box = f"0 -12 {_LEFT + size + 16} {size + _BELOW + 12}"
    return (
        f'<svg class="histogram" viewBox="{box}" width="{_LEFT + size + 16}" role="img" '
        f'aria-label="Histogram of measured lengths for lengths asked for; the table has its numbers">'
        f"{''.join(parts)}</svg>"
    )


def _places(cells: Sequence[Mapping[str, Any]]) -> tuple[float, list[tuple[int, int, int]]]:
    """Width of the bins, and (column, row, number) of each cell; none where a value is missing or no number."""
    names = ("requested_from", "requested_to", "measured_from", "n")
    rows: list[list[Any]] = [[cell.get(name) for name in names] for cell in cells]
    if not rows or not all(isinstance(v, (int, float)) and math.isfinite(v) for row in rows for v in row):
        return 0.0, []
    width = rows[0][1] - rows[0][0]
    if not width > 0 or not all(row[3] > 0 for row in rows):
        return 0.0, []
    return width, [(round(row[0] / width), round(row[2] / width), int(row[3])) for row in rows]
