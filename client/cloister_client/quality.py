"""What the quality gate saw of a hospital's records: counts and row numbers, never a value."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

MOST = 100
"""Columns that a page tells of; of more than that, only those with a finding."""


@dataclass
class ColumnReport:
    """What was found in one column; counts only."""

    name: str
    missing: int = 0
    problems: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    """Kind of problem to the numbers of its rows."""


@dataclass
class QualityReport:
    """What the quality gate saw. It stays at the hospital, and holds counts and row numbers, never a value."""

    site: str
    rows: int
    columns: list[ColumnReport]
    patients: int = 0
    outcomes: tuple[int, ...] = ()
    """How many records have which outcome, in the plan's order, where outcomes are counted."""
    dropped_missing: int = 0
    notes: list[str] = field(default_factory=list[str])
    """What of dated records could not be used, and how often."""
    opted_out: int = 0
    """Rows of patients who do not want their records used; they are not among ``rows``."""

    @property
    def bad_rows(self) -> list[int]:
        """Numbers of the rows with any problem."""
        return sorted({row for column in self.columns for rows in column.problems.values() for row in rows})

    @property
    def positives(self) -> int:
        """Records with the outcome; of several classes, with any but the first."""
        return sum(self.outcomes[1:])

    def lines(self) -> list[str]:
        """One line for each kind of problem, for people."""
        return [
            f"{column.name}: {problem} in {rows_text(rows)}"
            for column in self.columns
            for problem, rows in column.problems.items()
        ]

    def page(self) -> str:
        """The report as the hospital's own people read it."""
        shown = self.columns
        if len(shown) > MOST:
            shown = [column for column in shown if column.missing or column.problems][:MOST]
        width = max((len(column.name) for column in shown), default=0)
        found = f", {self.positives} with the outcome" if self.outcomes else ""
        head = (
            f"Data quality at {self.site}: {self.rows} rows, {self.patients} patients{found};"
            f" {len(self.bad_rows)} bad rows left out, {self.dropped_missing} for a missing value."
        )
        body = [
            f"  {column.name:<{width}}  {column.missing / max(self.rows, 1):>6.1%} missing"
            + "".join(f"; {problem} in {rows_text(rows)}" for problem, rows in column.problems.items())
            for column in shown
        ]
        if self.opted_out:
            head += f" {self.opted_out} more rows are of patients who opted out."
        more = len(self.columns) - len(shown)
        left = [f"  and {more} more columns" + _silent(self, shown)] if more else []
        return "\n".join([head, *body, *left, *(f"  Not used: {note}." for note in self.notes)])


def _silent(report: QualityReport, shown: list[ColumnReport]) -> str:
    found = sum(bool(column.missing or column.problems) for column in report.columns)
    return "" if found > len(shown) else " without a finding"


def note(report: ColumnReport, problem: str, where: NDArray[np.bool_]) -> None:
    """These rows have that problem."""
    if where.any():
        report.problems[problem] = [int(row) + 1 for row in np.flatnonzero(where)]


def rows_text(numbers: list[int], most: int = 8) -> str:
    """As people read it: rows 3, 8 and 2 more."""
    shown = ", ".join(map(str, numbers[:most]))
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"row{'s' if len(numbers) > 1 else ''} {shown}{more}"
