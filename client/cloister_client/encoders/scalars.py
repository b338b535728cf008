"""Features that are one value: parsed, held against the plan, one input or several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cloister_client.quality import ColumnReport, note
from cloister_shared.inputs import Column
from cloister_shared.schema import BooleanFeature, CategoryFeature, NumberFeature

if TYPE_CHECKING:
    import pandas as pd

YES, NO = ("1", "1.0", "true", "yes", "y", "t"), ("0", "0.0", "false", "no", "n", "f")

Scalar = NumberFeature | CategoryFeature | BooleanFeature


def parse(
    feature: Scalar,
    raw: pd.Series[Any],
    gaps: NDArray[np.bool_],
    factor: tuple[float, float] | None,
    report: ColumnReport,
) -> NDArray[Any]:
    """Values as numbers, or categories as the plan writes them; gaps are NaN or None, and so is what is not known."""
    match feature:
        case NumberFeature(range=bounds):
            return quantity(raw, gaps, bounds, factor, report)
        case CategoryFeature(categories=categories):
            spelt = {word(category): category for category in categories}
            cells = words(raw)
            note(report, "unknown category", ~gaps & ~np.isin(cells, list(spelt)))
            return np.array([spelt.get(cell) for cell in cells], dtype=object)
        case BooleanFeature():
            return boolean(raw, gaps, report)


def quantity(
    raw: pd.Series[Any],
    gaps: NDArray[np.bool_],
    bounds: tuple[float, float],
    factor: tuple[float, float] | None,
    report: ColumnReport,
) -> NDArray[np.float64]:
    """Numbers in the plan's unit, NaN where there is none."""
    import pandas as pd

    numbers = pd.to_numeric(raw, errors="coerce").to_numpy(dtype=float, na_value=np.nan, copy=True)
    note(report, "not a number", ~gaps & ~np.isfinite(numbers))
    if factor:
        numbers = numbers * factor[0] + factor[1]
    low, high = bounds
    with np.errstate(invalid="ignore"):
        note(report, "outside the plan's range", np.isfinite(numbers) & ~((low <= numbers) & (numbers <= high)))
    return numbers


def boolean(raw: pd.Series[Any], gaps: NDArray[np.bool_], report: ColumnReport) -> NDArray[np.float64]:
    """1 for yes, 0 for no, NaN for a gap."""
    cells = np.char.lower(words(raw))
    yes = np.isin(cells, YES)
    note(report, "neither yes nor no", ~gaps & ~yes & ~np.isin(cells, NO))
    return np.where(gaps, np.nan, yes.astype(float))


def words(raw: pd.Series[Any]) -> NDArray[np.str_]:
    """Cells as text, gaps as empty text."""
    return np.array(["" if gap else word(cell) for cell, gap in zip(raw, raw.isna(), strict=True)], dtype=str)


def word(cell: object) -> str:
    """A cell or one of the plan's categories as text, trimmed; 1.0 reads as 1, as spreadsheets write whole numbers."""
    word = str(cell).strip()
    return word[:-2] if word.endswith(".0") and word[:-2].lstrip("-").isdigit() else word


def encode(column: Column, values: dict[str, NDArray[Any]]) -> NDArray[np.float64]:
    """One input of all records; ``values`` has each feature's, and where it was missing."""
    if column.absent:
        return values[f"{column.feature} is missing"]
    if column.category is not None:
        return (values[column.feature] == column.category).astype(float)
    return values[column.feature].astype(float)
