"""Curves of runs, to tell a broken one from an early one: where each figure began, stands, and how fast it moves.

    python -m training.curves runs/vae runs/vae_decoder -o curves.png
    python -m training.curves runs/diffusion --figures loss/v held_out/v

Reads `losses.jsonl` of each run's `output`. Without `--figures`, those measured on held-out data.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stable_audio_lite.audio.plot import check_plottable
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import replacing


@dataclass(frozen=True)
class Curve:
    """One figure of one run.

    Attributes:
        steps, values: (N,), in the order of the steps; of a step that was done again, the last.
    """

    run: str
    figure: str
    steps: np.ndarray
    values: np.ndarray

    def smooth(self, share: float = 0.05) -> np.ndarray:
        """Means (N,) over the points within `share` of all before and after each."""
        reach = int(share * len(self.values))
        total = np.concatenate(([0.0], self.values.cumsum()))
        last = np.minimum(np.arange(len(self.values)) + reach + 1, len(self.values))
        first = np.maximum(np.arange(len(self.values)) - reach, 0)
        return (total[last] - total[first]) / (last - first)

    def per_doubling(self) -> float:
        """Change for twice the steps, by a line through the run's later half over log2(step); NaN for one point."""
        later = self.steps >= max(self.steps[-1] / 2, 1)
        if later.sum() < 2:
            return math.nan
        return float(np.polyfit(np.log2(self.steps[later]), self.values[later], 1)[0])


def read_curves(run: str | Path, figures: Sequence[str] = ()) -> list[Curve]:
    """The figures of a run by name, or all measured on held-out data.

    Raises:
        UserError: there is no such run or figure, or a line of it is damaged.
    """
    path = Path(run) / "losses.jsonl"
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); give the `output` of a training run") from error
    rows: dict[int, dict[str, float]] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.setdefault(int(row["step"]), {}).update(row)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: line {number} is no row of figures") from error
    known = sorted({name for row in rows.values() for name in row} - {"step"})
    names = list(figures) or [name for name in known if name.startswith("held_out/")]
    if missing := [name for name in names if name not in known] or not names:
        raise UserError(
            f"{path}: has no {', '.join(missing) if names else 'held-out figures'}; it has {', '.join(known)}"
        )
    curves = []
    for name in names:
        points = sorted((step, row[name]) for step, row in rows.items() if name in row)
        steps, values = np.array(points, float).T
        curves.append(Curve(str(run), name, steps + 1, values))
    return curves


def draw(path: str | Path, curves: Sequence[Curve]) -> None:
    """Write a PNG with a panel for each figure and a line for each run.

    Raises:
        UserError: `path` isn't a .png or can't be written, or matplotlib is missing.
    """
    check_plottable(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(c.figure for c in curves))
    columns = min(len(names), 2)
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(5.5 * columns, 3.2 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes, names, strict=False):
        for curve in (c for c in curves if c.figure == name):
            axis.plot(curve.steps, curve.smooth(), label=curve.run, linewidth=1.2)
        axis.set(title=name, xlabel="step", xscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def main() -> None:
    """Print a line for each figure and run, and draw them where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="`output` folders of training runs")
    parser.add_argument("--figures", nargs="+", default=[], help="names, as in TensorBoard")
    parser.add_argument("-o", "--output", help="a .png to draw into")
    args = parser.parse_args()
    try:
        curves = [curve for run in args.runs for curve in read_curves(run, args.figures)]
        if args.output:
            draw(args.output, curves)
    except UserError as error:
        sys.exit(f"error: {error}")
    print("figure, run: first -> last (smallest), change for twice the steps")
    for c in curves:
        print(
            f"{c.figure}, {c.run}: {c.values[0]:.4g} at {c.steps[0]:.0f} -> {c.smooth()[-1]:.4g} at {c.steps[-1]:.0f} "
            f"({np.nanmin(c.values):.4g}), {c.per_doubling():+.3g}"
        )


if __name__ == "__main__":
    main()
