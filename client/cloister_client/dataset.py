"""Records to tensors by the plan's schema, through a quality gate. Nothing of a row is ever put into a message."""

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

from cloister_client.connectors.connector import Connector
from cloister_client.consent import Policy
from cloister_client.coverage import Coverage, coverage
from cloister_client.encoders import image, molecule, series, text
from cloister_client.encoders.outcomes import counted, itself, outcomes
from cloister_client.encoders.scalars import encode, parse, words
from cloister_client.opt_outs import without_opt_outs
from cloister_client.quality import ColumnReport, QualityReport, note
from cloister_shared.errors import CohortTooSmall, DataRefused
from cloister_shared.inputs import Column, blocks, columns, scalars
from cloister_shared.plan import StudyPlan
from cloister_shared.schema import ImageFeature, Itself, MoleculeFeature, Schema, SeriesFeature, Shaped, TextFeature

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Rows:
    """Encoded rows: inputs [n, width] and outcomes [n, ...], both float32, and the patient of each row."""

    x: Tensor
    y: Tensor
    patients: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.y)

    @cached_property
    def arrays(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Inputs and outcomes as numpy sees the same memory."""
        return self.x.numpy(), self.y.numpy()


@dataclass(frozen=True)
class Dataset:
    """One hospital's rows for one study, before centring and scaling, and what it says of its own accord."""

    columns: tuple[Column, ...]
    train: Rows
    test: Rows
    quality: QualityReport
    policy: Policy = field(default_factory=Policy)
    coverage: Coverage | None = None
    """Where the plan asks what the records hold."""
    ids: Sequence[str] | None = field(default=None, repr=False)
    """The id behind each number in ``Rows.patients``, to be made a pseudonym of; None where the plan names no ids."""


def load_dataset(connector: Connector, plan: StudyPlan) -> Dataset:
    """Read, check, encode and split a hospital's records.

    Raises:
        DataRefused: the records fail the schema; the message counts the faults and numbers the rows.
        CohortTooSmall: fewer training patients than ``cohort.min_patients``.
    """
    site, schema = connector.site.site, plan.table
    split = plan.evaluation.split_column
    frame = connector.rows(schema, (split,) if split else ())
    notes, everyone = frame.attrs.get("notes", []), len(frame)
    frame = without_opt_outs(frame, schema, connector.site, connector.folder)
    report = QualityReport(site, len(frame), [], notes=notes, opted_out=everyone - len(frame))
    x, keep = _inputs(frame, schema, connector, report)
    y = outcomes(frame, schema, connector.folder, report, connector.site.pictures)
    _check_whole_rows(frame, plan, report, keep)
    bad = report.bad_rows
    if len(bad) > schema.max_bad_rows * len(frame):
        raise DataRefused(
            f"The table of {site} fails the plan's schema in {len(bad)} of {len(frame)} rows: "
            f"{'; '.join(report.lines()[:6])}.",
            mend="Correct these rows, or raise table.max_bad_rows in the plan to leave them out.",
        )
    keep &= ~np.isin(np.arange(1, len(frame) + 1), bad)
    asked = coverage(frame, x, y, keep, plan, report) if plan.readiness else None
    x, y = x[keep], y[keep]
    if isinstance(schema.target, Itself):
        y = np.concatenate([itself(x, schema), y[:, None]], axis=1, dtype=np.float64)
    patients, keys = _patients(frame, plan, keep)
    testing = _testing(frame, plan, keep, patients, keys)
    report.patients, report.outcomes = len(keys), counted(y, schema)
    train, test = (
        Rows(torch.from_numpy(x[part]), torch.from_numpy(y[part].astype(np.float32)), patients[part])
        for part in (~testing, testing)
    )
    have = len(np.unique(train.patients))
    if have < plan.cohort.min_patients:
        raise CohortTooSmall(
            f"{site} has {have} training patients for {plan.study}, fewer than the plan's minimum of"
            f" {plan.cohort.min_patients}.",
            mend="Leave this study to larger hospitals, or have cohort.min_patients lowered in the plan.",
        )
    ids = keys if schema.patient_id else None
    return Dataset(columns(schema), train, test, report, connector.site.accepts, asked, ids)


@dataclass(frozen=True)
class NewRows:
    """Records without outcomes, in the order of their file: inputs [n, width] before centring and scaling."""

    x: Tensor
    read: NDArray[np.bool_]
    """Which of them meet the plan's schema; the inputs of others mean nothing."""
    patients: list[str] | None
    quality: QualityReport


def new_rows(connector: Connector, schema: Schema) -> NewRows:
    """Records to be scored, whose outcome nobody knows; of ``schema`` without a patient id none is read.

    Raises:
        DataRefused: the records or a column are missing.
    """
    schema = schema.model_copy(update={"target": Itself(kind="itself")})
    frame = connector.rows(schema)
    report = QualityReport(connector.site.site, len(frame), [])
    x, read = _inputs(frame, schema, connector, report)
    read &= ~np.isin(np.arange(1, len(frame) + 1), report.bad_rows)
    patients = words(frame[schema.patient_id]).tolist() if schema.patient_id else None
    return NewRows(torch.from_numpy(x), read, patients, report)


def normalised(rows: Rows, everything: Sequence[Column], constants: Sequence[Sequence[float]]) -> Rows:
    """Centre and scale the number columns; ``constants`` begins with (centre, scale) for each, in order."""
    x = rows.x.clone()
    at = [i for i, column in enumerate(everything) if column.kind == "number" and not column.absent]
    if at:
        centre, scale = torch.tensor([list(each[:2]) for each in constants], dtype=torch.float32).T
        x[:, at] = (x[:, at] - centre) / scale
    return with_inputs(rows, x)


def with_inputs(rows: Rows, x: Tensor) -> Rows:
    """The rows with other inputs of the same width."""
    y = rows.y
    if y.shape[1:] == (x.shape[1] + 1,) and torch.equal(y[:, :-1], rows.x):  # what is usual: the inputs themselves
        y = torch.cat([x, y[:, -1:]], dim=1)
    return Rows(x, y, rows.patients)


# --- features ----------------------------------------------------------------------------------------------
def _inputs(
    frame: pd.DataFrame, schema: Schema, connector: Connector, report: QualityReport
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """All inputs of all records, and which of these have none missing that the plan drops."""
    values, keep = _scalars(frame, schema, connector.factors(schema), report)
    shaped = [_shaped(block.feature, frame, connector, report) for block in blocks(schema)]
    single = [encode(column, values).astype(np.float32)[:, None] for column in columns(schema)]
    return np.concatenate([*single, *shaped], axis=1), keep


def _scalars(
    frame: pd.DataFrame, schema: Schema, factors: dict[str, tuple[float, float]], report: QualityReport
) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_]]:
    """Parsed values of every feature that is one, with gaps as NaN or None, and which rows are kept."""
    values: dict[str, NDArray[Any]] = {}
    keep = np.ones(len(frame), dtype=bool)
    for feature in scalars(schema):
        column = ColumnReport(feature.name)
        report.columns.append(column)
        raw = frame[feature.name]
        gaps = raw.isna().to_numpy()
        column.missing = int(gaps.sum())
        values[feature.name] = parsed = parse(feature, raw, gaps, factors.get(feature.name), column)
        if feature.missing == "refuse":
            note(column, "missing value", gaps)
        elif feature.missing == "drop":
            keep &= ~gaps
            report.dropped_missing += int(gaps.sum())
        else:
            values[f"{feature.name} is missing"] = gaps.astype(float)
            parsed[gaps] = feature.fill
    return values, keep


def _shaped(feature: Shaped, frame: pd.DataFrame, connector: Connector, report: QualityReport) -> NDArray[np.float32]:
    """The block of a feature of many values, [n, size]."""
    column = ColumnReport(feature.name)
    report.columns.append(column)
    cells = frame[feature.name].to_numpy()
    match feature:
        case SeriesFeature():
            return series.encode(feature, cells, column)
        case ImageFeature():
            return image.encode(feature, cells, connector.folder, column, connector.site.pictures)
        case TextFeature():
            return text.encode(feature, cells, column)
        case MoleculeFeature():
            return molecule.encode(feature, cells, column)


def _check_whole_rows(frame: pd.DataFrame, plan: StudyPlan, report: QualityReport, keep: NDArray[np.bool_]) -> None:
    if plan.table.duplicates != "allow":
        shaped = {f.name: frame[f.name].map(_hashable) for f in plan.table.features if isinstance(f, Shaped)}
        again = frame.assign(**shaped).duplicated().to_numpy()
        if plan.table.duplicates == "drop":
            keep &= ~again
        else:
            column = ColumnReport("whole row")
            report.columns.append(column)
            note(column, "duplicate of an earlier row", again)
    if name := plan.table.patient_id:
        column = ColumnReport(name)
        report.columns.append(column)
        note(column, "missing patient id", frame[name].isna().to_numpy())
    if split := plan.evaluation.split_column:
        column = ColumnReport(split)
        report.columns.append(column)
        part = words(frame[split])
        note(column, "neither train nor test", ~np.isin(part, ("train", "test")))
        if plan.table.patient_id:
            patient = words(frame[plan.table.patient_id])
            both = np.intersect1d(patient[part == "train"], patient[part == "test"])
            note(column, "patient in both train and test", (patient != "") & np.isin(patient, both))


def _hashable(cell: Any) -> Any:
    return cell.tobytes() if isinstance(cell, np.ndarray) else cell


# --- patients and splits -------------------------------------------------------------------------------------
def _patients(frame: pd.DataFrame, plan: StudyPlan, keep: NDArray[np.bool_]) -> tuple[NDArray[np.int64], list[str]]:
    """A number for each kept row's patient, and each number's id; without ids every row is a patient."""
    if plan.table.patient_id is None:
        numbers = np.flatnonzero(keep) + 1
        return np.arange(len(numbers)), [f"row {number}" for number in numbers]
    keys, numbers = np.unique(words(frame[plan.table.patient_id])[keep], return_inverse=True)
    return numbers.astype(np.int64), [str(key) for key in keys]


def _testing(
    frame: pd.DataFrame, plan: StudyPlan, keep: NDArray[np.bool_], patients: NDArray[np.int64], keys: list[str]
) -> NDArray[np.bool_]:
    """Which rows are held out: all rows of a patient or none, and the same ones whatever the order of the file.

    Without patient ids a row is known by its number, so that the order of the file matters.
    """
    if plan.evaluation.split_column:
        return words(frame[plan.evaluation.split_column])[keep] == "test"
    holdout = plan.evaluation.holdout or 0.25
    drawn = np.array([_uniform(f"{plan.seed}|{key}") < holdout for key in keys])
    return drawn[patients] if len(keys) else np.zeros(0, dtype=bool)


def _uniform(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
