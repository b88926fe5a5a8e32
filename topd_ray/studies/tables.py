"""Tables of figures, for a terminal and for docs/results.md. Cells are text, made from the figures by `shown`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from topd_ray.studies.statistics import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Columns and rows of text; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Table":
        return cls(title=document["title"], columns=document["columns"], rows=document["rows"])

    def text(self) -> str:
        """Aligned with spaces."""
        lines = [list(self.columns), *map(list, self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.columns))]
        aligned = [
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, *aligned])

    def markdown(self) -> str:
        """As a Markdown table below its title in bold."""
        bars = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = [self.columns, bars, *self.rows]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(map(_escaped, line))} |" for line in lines)])


def shown(figure: Interval | float | None, unit: str = "", digits: int = 3) -> str:
    """`0.566 [0.551, 0.580]`; the unit `%` multiplies by 100; `-` for None and NaN; no brackets without an interval."""
    if isinstance(figure, Interval):
        value = shown(figure.value, unit, digits)
        if figure.low is None or figure.high is None:
            return value
        return f"{value} [{_number(figure.low, unit, digits)}, {_number(figure.high, unit, digits)}]"
    if figure is None or math.isnan(figure):
        return "-"
    return f"{_number(figure, unit, digits)} {unit}".rstrip()


def _number(value: float, unit: str, digits: int) -> str:
    return f"{value * 100:.{max(digits - 2, 0)}f}" if unit == "%" else f"{value:.{digits}f}"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
