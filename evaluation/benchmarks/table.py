"""The table of a model's figures: a row for each thing measured, as text and as plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from evaluation.benchmarks.timing import Spread


@dataclass(frozen=True, kw_only=True)
class Peer:
    """The same by another implementation, with the same weights.

    Attributes:
        name: of the implementation.
        figure: its own, in the row's unit.
        ratio: our speed as a multiple of its, turn by turn.
        difference: largest difference of its output from ours, relative to the peak; None: not compared.
    """

    name: str
    figure: Spread
    ratio: Spread
    difference: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing measured.

    Attributes:
        part: the group that it belongs to.
        what: the thing.
        how: number type and size.
        unit: of the figure.
        figure: median and range.
        share: its rate of floating-point operations as a share of a matrix product's, turn by turn.
        peers: the same by other implementations.
    """

    part: str
    what: str
    how: str
    unit: str
    figure: Spread
    share: Spread | None = None
    peers: tuple[Peer, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CostTable:
    """All rows of a run.

    Attributes:
        model: measured.
        machine: as `describe_machine` says.
        repeats: measurements of each figure.
        rows: in order.
    """

    model: str
    machine: dict[str, Any]
    repeats: int
    rows: list[Row] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def as_text(self) -> str:
        """A Markdown table under a line about the machine."""
        features = ", ".join(self.machine["features"])
        lines = [
            f"{self.model} on {self.machine['processor']} ({features}), {self.machine['threads']} of "
            f"{self.machine['cores']} cores, {self.machine['device']}, torch {self.machine['torch']}; "
            f"median and range of {self.repeats}",
            "",
            "| | | | of matrix products |",
            "|---|---|---|---|",
        ]
        for row in self.rows:
            share = "" if row.share is None else f"{row.share.median:.2f}"
            lines.append(f"| {row.what} | {row.how} | {row.figure} {row.unit} | {share} |")
            for peer in row.peers:
                equal = "" if peer.difference is None else f", outputs differ by {peer.difference:.0e} of the peak"
                lines.append(
                    f"| | {peer.name} | {peer.figure} {row.unit}: ours is {peer.ratio} times as fast{equal} | |"
                )
        return "\n".join(lines)
