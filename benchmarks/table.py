"""Markdown tables, and figures with their spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Table:
    """A Markdown table. The first `labels` columns are text, the others figures."""

    header: Sequence[str]
    labels: int
    rows: list[Sequence[str]] = field(default_factory=list)

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        lines = [self._line(row, widths) for row in (self.header, *self.rows)]
        lines.insert(1, self._rule(widths))
        return "\n".join(lines)

    def _line(self, row: Sequence[str], widths: Sequence[int]) -> str:
        cells = [
            cell.ljust(width) if index < self.labels else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    def _rule(self, widths: Sequence[int]) -> str:
        cells = [
            "-" * width if index < self.labels else "-" * (width - 1) + ":"
            for index, width in enumerate(widths)
        ]
        return f"| {' | '.join(cells)} |"


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that this share of the values, in percent, does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share / 100 * len(ordered)) - 1)]


def spread(values: Sequence[float], digits: int) -> str:
    """Median (lowest to highest)."""
    middle, low, high = (
        f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values))
    )
    return middle if len(values) == 1 else f"{middle} ({low}–{high})"
