"""The outcome of each record: parsed, held against the plan, and as the loss wants it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cloister_client.encoders import image
from cloister_client.encoders.scalars import boolean, quantity, word, words
from cloister_client.quality import ColumnReport, QualityReport, note
from cloister_client.site_file import PictureTerms
from cloister_shared.inputs import blocks, plan_constants
from cloister_shared.schema import (
    Binary,
    Classes,
    Effect,
    ImageFeature,
    Itself,
    Labels,
    Mask,
    Quantity,
    Schema,
    SeriesFeature,
    Survival,
)

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]


def outcomes(
    frame: pd.DataFrame,
    schema: Schema,
    folder: Path,
    report: QualityReport,
    allowed: PictureTerms = image.NONE_ALLOWED,
) -> Array:
    """[n] or [n, k], NaN where there is none, which is a bad row. Of ``itself`` the alarms alone."""
    target = schema.target
    match target:
        case Binary(positive=positive, negative=negative):
            column, raw, gaps = _column(frame, target.name, report)
            cells = words(raw)
            ill, well = cells == word(positive), cells == word(negative)
            note(column, "neither outcome", ~gaps & ~ill & ~well)
            return ill.astype(float)
        case Classes(classes=names):
            column, raw, gaps = _column(frame, target.name, report)
            numbers = {word(name): number for number, name in enumerate(names)}
            found = np.array([numbers.get(cell, -1) for cell in words(raw)])
            note(column, "none of the classes", ~gaps & (found < 0))
            return found.astype(float)
        case Labels(labels=names, separator=separator):
            column = ColumnReport(target.name)
            report.columns.append(column)
            listed = [{part.strip() for part in cell.split(separator)} - {""} for cell in words(frame[target.name])]
            note(column, "an unknown label", np.array([not parts <= set(names) for parts in listed], dtype=bool))
            return np.array([[name in parts for name in names] for parts in listed], dtype=float).reshape(
                -1, len(names)
            )
        case Quantity(range=bounds):
            column, raw, gaps = _column(frame, target.name, report)
            centre, scale = plan_constants(target)
            return (quantity(raw, gaps, bounds, None, column) - centre) / scale
        case Survival(cuts=cuts, event=event):
            column, raw, gaps = _column(frame, target.name, report)
            time = quantity(raw, gaps, (0.0, np.inf), None, column)
            column, raw, gaps = _column(frame, event, report)
            return in_periods(time, boolean(raw, gaps, column), cuts)
        case Effect(treatment=treatment, range=bounds):
            column, raw, gaps = _column(frame, target.name, report)
            said = quantity(raw, gaps, bounds, None, column)
            column, raw, gaps = _column(frame, treatment, report)
            low, high = bounds
            return np.stack([(said - (low + high) / 2) / ((high - low) / 4), boolean(raw, gaps, column)], axis=1)
        case Mask(of=picture):
            column, raw, gaps = _column(frame, target.name, report)
            drawn = next(f for f in schema.features if isinstance(f, ImageFeature) and f.name == picture)
            return image.masks(drawn, raw.to_numpy(), gaps, folder, column, allowed, frame[picture].to_numpy())
        case Itself(alarm=alarm):
            if alarm is None:
                return np.full(len(frame), np.nan)
            column = ColumnReport(alarm)
            report.columns.append(column)
            return boolean(frame[alarm], frame[alarm].isna().to_numpy(), column)


def itself(x: NDArray[np.float32], schema: Schema) -> NDArray[np.float32]:
    """What a model of what is usual is held against: the inputs, NaN where a series was not measured, and its masks."""
    said = x.copy()
    for block in blocks(schema):
        if isinstance(block.feature, SeriesFeature):
            grid = said[:, block.start : block.start + block.size].reshape(len(x), *block.shape)
            values, taken = np.split(grid, 2, axis=2)
            values[taken == 0] = np.nan
            taken[:] = np.nan
            said[:, block.start : block.start + block.size] = grid.reshape(len(x), -1)
    return said


def in_periods(time: Array, came: Array, cuts: tuple[float, ...]) -> Array:
    """[n, 3]: the period of the event or how many periods were outlived; whether it came; the time, to the last cut."""
    ended = np.searchsorted(np.asarray(cuts), time, side="left")  # a time on a cut is of the period that it ends
    within = (came > 0) & (ended < len(cuts))
    outlived = np.searchsorted(np.asarray(cuts), time, side="right")
    period = np.where(within, ended, outlived)
    return np.stack([period.astype(float), within.astype(float), np.minimum(time, cuts[-1])], axis=1)


def counted(y: Array, schema: Schema) -> tuple[int, ...]:
    """How many records have which outcome, in the plan's order, where outcomes are counted: see ``schema``."""
    match schema.target:
        case Binary():
            return int(len(y) - y.sum()), int(y.sum())
        case Classes(classes=names):
            return tuple(int((y == number).sum()) for number in range(len(names)))
        case Survival():
            return int(len(y) - y[:, 1].sum()), int(y[:, 1].sum())
        case _:
            return ()


def _column(frame: pd.DataFrame, name: str, report: QualityReport) -> tuple[ColumnReport, pd.Series[Any], Any]:
    """A column of outcomes, of which a gap is a fault."""
    column = ColumnReport(name)
    report.columns.append(column)
    gaps = frame[name].isna().to_numpy()
    column.missing = int(gaps.sum())
    note(column, "missing target", gaps)
    return column, frame[name], gaps
