"""Charts for a page whose colours are its style sheet's: strips as SVG, the histogram of timing as a grid."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.result import MetricValue

_WIDTH, _HEIGHT, _MARGIN = 200, 24, 8  # of a strip
Bin = tuple[float, float]
"""Edges in seconds."""


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


def timing_grid(cells: Sequence[Mapping[str, Any]]) -> tuple[list[Bin], dict[Bin, list[tuple[int, float]]]] | None:
    """Arrange rows of `metrics.summary`'s "timing_histogram" as a grid, or None where they are none such.

    Returns the bins of lengths asked for, ascending, and by bin of measured lengths, descending, how many sounds are in
    each cell and their share of the column.
    """
    counts: Counter[tuple[Bin, Bin]] = Counter()
    try:
        for cell in cells:
            sides = ("requested", "measured")
            asked, measured = ((float(cell[f"{side}_from"]), float(cell[f"{side}_to"])) for side in sides)
            counts[asked, measured] += int(cell["n"])
        columns, rows = (sorted({bins[side] for bins in counts}, reverse=bool(side)) for side in (0, 1))
        totals = {column: sum(counts[column, row] for row in rows) for column in columns}
        grid = {
            row: [(counts[column, row], counts[column, row] / totals[column]) for column in columns] for row in rows
        }
    except (LookupError, TypeError, ValueError, ArithmeticError):
        return None
    return (columns, grid) if grid else None
