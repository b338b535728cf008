"""Rows to tensors by the plan's schema, through a quality gate. Nothing of a row is ever put into a message."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cloister_client.connectors.table import TableConnector
from cloister_client.consent import Policy
from cloister_shared.errors import CohortTooSmall, DataRefused
from cloister_shared.plan import BooleanFeature, CategoryFeature, Feature, NumberFeature, StudyPlan
from cloister_shared.schema import Column, columns

if TYPE_CHECKING:
    import pandas as pd

_YES, _NO = ("1", "1.0", "true", "yes", "y", "t"), ("0", "0.0", "false", "no", "n", "f")


@dataclass(frozen=True)
class Rows:
    """Encoded rows: inputs [n, width] and outcomes [n], both float32, and the patient of each row."""

    x: Tensor
    y: Tensor
    patients: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.y)

    @cached_property
    def arrays(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Inputs and outcomes as numpy sees the same memory."""
        return self.x.numpy(), self.y.numpy()


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
    positives: int = 0
    dropped_missing: int = 0

    @property
    def bad_rows(self) -> list[int]:
        """Numbers of the rows with any problem."""
        return sorted({row for column in self.columns for rows in column.problems.values() for row in rows})

    def lines(self) -> list[str]:
        """One line for each kind of problem, for people."""
        return [
            f"{column.name}: {problem} in {_rows(rows)}"
            for column in self.columns
            for problem, rows in column.problems.items()
        ]

    def page(self) -> str:
        """The report as the hospital's own people read it."""
        width = max(len(column.name) for column in self.columns)
        head = (
            f"Data quality at {self.site}: {self.rows} rows, {self.patients} patients, {self.positives} with the"
            f" outcome; {len(self.bad_rows)} bad rows left out, {self.dropped_missing} for a missing value."
        )
        body = [
            f"  {column.name:<{width}}  {column.missing / max(self.rows, 1):>6.1%} missing"
            + "".join(f"; {problem} in {_rows(rows)}" for problem, rows in column.problems.items())
            for column in self.columns
        ]
        return "\n".join([head, *body])


@dataclass(frozen=True)
class Dataset:
    """One hospital's rows for one study, before centring and scaling, and what it says of its own accord."""

    columns: tuple[Column, ...]
    train: Rows
    test: Rows
    quality: QualityReport
    policy: Policy = field(default_factory=Policy)


def load_dataset(connector: TableConnector, plan: StudyPlan) -> Dataset:
    """Read, check, encode and split a hospital's table.

    Raises:
        DataRefused: the table fails the schema; the message counts the faults and numbers the rows.
        CohortTooSmall: fewer training patients than ``cohort.min_patients``.
    """
    site = connector.site.site
    split = plan.evaluation.split_column
    frame = connector.rows(plan.table, (split,) if split else ())
    report = QualityReport(site, len(frame), [])
    values, keep = _check(frame, plan, connector.factors(plan.table), report)
    bad = report.bad_rows
    if len(bad) > plan.table.max_bad_rows * len(frame):
        raise DataRefused(
            f"The table of {site} fails the plan's schema in {len(bad)} of {len(frame)} rows: "
            f"{'; '.join(report.lines()[:6])}.",
            mend="Correct these rows, or raise table.max_bad_rows in the plan to leave them out.",
        )
    keep &= ~np.isin(np.arange(1, len(frame) + 1), bad)
    everything = columns(plan.table)
    x = np.stack([_encode(column, values, plan.table.features) for column in everything], axis=1)[keep]
    y = values[plan.table.target.name][keep]
    patients, keys = _patients(frame, plan, keep)
    testing = _testing(frame, plan, keep, patients, keys)
    report.patients, report.positives = len(keys), int(y.sum())
    train, test = (
        Rows(torch.from_numpy(x[part].astype(np.float32)), torch.from_numpy(y[part].astype(np.float32)), patients[part])
        for part in (~testing, testing)
    )
    have = len(np.unique(train.patients))
    if have < plan.cohort.min_patients:
        raise CohortTooSmall(
            f"{site} has {have} training patients for {plan.study}, fewer than the plan's minimum of"
            f" {plan.cohort.min_patients}.",
            mend="Leave this study to larger hospitals, or have cohort.min_patients lowered in the plan.",
        )
    return Dataset(everything, train, test, report, connector.policy)


def normalised(rows: Rows, everything: Sequence[Column], constants: Sequence[tuple[float, float]]) -> Rows:
    """Centre and scale the number columns; ``constants`` has one (centre, scale) for each, in order."""
    x = rows.x.clone()
    at = [i for i, column in enumerate(everything) if column.kind == "number" and not column.absent]
    if at:
        centre, scale = torch.tensor(list(constants), dtype=torch.float32).T
        x[:, at] = (x[:, at] - centre) / scale
    return Rows(x, rows.y, rows.patients)


# --- the quality gate --------------------------------------------------------------------------------------
def _check(
    frame: pd.DataFrame, plan: StudyPlan, factors: dict[str, tuple[float, float]], report: QualityReport
) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_]]:
    """Parsed values of every column, with gaps as NaN or None, and which rows are kept."""
    values: dict[str, NDArray[Any]] = {}
    keep = np.ones(len(frame), dtype=bool)
    for feature in plan.table.features:
        column = ColumnReport(feature.name)
        report.columns.append(column)
        raw = frame[feature.name]
        gaps = raw.isna().to_numpy()
        column.missing = int(gaps.sum())
        values[feature.name] = parsed = _parse(feature, raw, gaps, factors.get(feature.name), column)
        if feature.missing == "refuse":
            _note(column, "missing value", gaps)
        elif feature.missing == "drop":
            keep &= ~gaps
            report.dropped_missing += int(gaps.sum())
        else:
            values[f"{feature.name} is missing"] = gaps.astype(float)
            parsed[gaps] = feature.fill
    _check_target(frame, plan, values, report)
    _check_whole_rows(frame, plan, report, keep)
    return values, keep


def _parse(
    feature: Feature,
    raw: pd.Series[Any],
    gaps: NDArray[np.bool_],
    factor: tuple[float, float] | None,
    report: ColumnReport,
) -> NDArray[Any]:
    import pandas as pd

    match feature:
        case NumberFeature(range=(low, high)):
            numbers = pd.to_numeric(raw, errors="coerce").to_numpy(dtype=float, na_value=np.nan, copy=True)
            _note(report, "not a number", ~gaps & ~np.isfinite(numbers))
            if factor:
                numbers = numbers * factor[0] + factor[1]
            with np.errstate(invalid="ignore"):
                _note(
                    report, "outside the plan's range", np.isfinite(numbers) & ~((low <= numbers) & (numbers <= high))
                )
            return numbers
        case CategoryFeature(categories=categories):
            spelt = {_word(category): category for category in categories}
            words = _words(raw)
            _note(report, "unknown category", ~gaps & ~np.isin(words, list(spelt)))
            return np.array([spelt.get(word) for word in words], dtype=object)
        case BooleanFeature():
            words = np.char.lower(_words(raw))
            yes = np.isin(words, _YES)
            _note(report, "neither yes nor no", ~gaps & ~yes & ~np.isin(words, _NO))
            return np.where(gaps, np.nan, yes.astype(float))


def _check_target(frame: pd.DataFrame, plan: StudyPlan, values: dict[str, NDArray[Any]], report: QualityReport) -> None:
    target = plan.table.target
    column = ColumnReport(target.name)
    report.columns.append(column)
    gaps = frame[target.name].isna().to_numpy()
    words = _words(frame[target.name])
    positive, negative = words == _word(target.positive), words == _word(target.negative)
    column.missing = int(gaps.sum())
    _note(column, "missing target", gaps)
    _note(column, "neither outcome", ~gaps & ~positive & ~negative)
    values[target.name] = positive.astype(float)


def _check_whole_rows(frame: pd.DataFrame, plan: StudyPlan, report: QualityReport, keep: NDArray[np.bool_]) -> None:
    if plan.table.duplicates != "allow":
        again = frame.duplicated().to_numpy()
        if plan.table.duplicates == "drop":
            keep &= ~again
        else:
            column = ColumnReport("whole row")
            report.columns.append(column)
            _note(column, "duplicate of an earlier row", again)
    if name := plan.table.patient_id:
        column = ColumnReport(name)
        report.columns.append(column)
        _note(column, "missing patient id", frame[name].isna().to_numpy())
    if split := plan.evaluation.split_column:
        column = ColumnReport(split)
        report.columns.append(column)
        part = _words(frame[split])
        _note(column, "neither train nor test", ~np.isin(part, ("train", "test")))
        if plan.table.patient_id:
            patient = _words(frame[plan.table.patient_id])
            both = np.intersect1d(patient[part == "train"], patient[part == "test"])
            _note(column, "patient in both train and test", (patient != "") & np.isin(patient, both))


def _note(report: ColumnReport, problem: str, where: NDArray[np.bool_]) -> None:
    if where.any():
        report.problems[problem] = [int(row) + 1 for row in np.flatnonzero(where)]


def _words(raw: pd.Series[Any]) -> NDArray[np.str_]:
    """Cells as text, gaps as empty text."""
    return np.array(["" if gap else _word(cell) for cell, gap in zip(raw, raw.isna(), strict=True)], dtype=str)


def _word(cell: object) -> str:
    """A cell or one of the plan's categories as text, trimmed; 1.0 reads as 1, as spreadsheets write whole numbers."""
    word = str(cell).strip()
    return word[:-2] if word.endswith(".0") and word[:-2].lstrip("-").isdigit() else word


def _rows(numbers: list[int], most: int = 8) -> str:
    shown = ", ".join(map(str, numbers[:most]))
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"row{'s' if len(numbers) > 1 else ''} {shown}{more}"


# --- encoding and splitting ----------------------------------------------------------------------------------
def _encode(column: Column, values: dict[str, NDArray[Any]], features: Sequence[Feature]) -> NDArray[np.float64]:
    if column.absent:
        return values[f"{column.feature} is missing"]
    if column.category is not None:
        return (values[column.feature] == column.category).astype(float)
    return values[column.feature].astype(float)


def _patients(frame: pd.DataFrame, plan: StudyPlan, keep: NDArray[np.bool_]) -> tuple[NDArray[np.int64], list[str]]:
    """A number for each kept row's patient, and each number's id; without ids every row is a patient."""
    if plan.table.patient_id is None:
        numbers = np.flatnonzero(keep) + 1
        return np.arange(len(numbers)), [f"row {number}" for number in numbers]
    keys, numbers = np.unique(_words(frame[plan.table.patient_id])[keep], return_inverse=True)
    return numbers.astype(np.int64), [str(key) for key in keys]


def _testing(
    frame: pd.DataFrame, plan: StudyPlan, keep: NDArray[np.bool_], patients: NDArray[np.int64], keys: list[str]
) -> NDArray[np.bool_]:
    """Which rows are held out: all rows of a patient or none, and the same ones whatever the order of the file.

    Without patient ids a row is known by its number, so that the order of the file matters.
    """
    if plan.evaluation.split_column:
        return _words(frame[plan.evaluation.split_column])[keep] == "test"
    holdout = plan.evaluation.holdout or 0.25
    drawn = np.array([_uniform(f"{plan.seed}|{key}") < holdout for key in keys])
    return drawn[patients] if len(keys) else np.zeros(0, dtype=bool)


def _uniform(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
