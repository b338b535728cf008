"""Which of a hospital's records have what the plan asks for; also those that it drops, so that it shows why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cloister_client.encoders.scalars import words
from cloister_client.quality import QualityReport
from cloister_shared.inputs import Block, blocks
from cloister_shared.plan import StudyPlan
from cloister_shared.schema import (
    Binary,
    Classes,
    Effect,
    ImageFeature,
    Labels,
    Schema,
    SeriesFeature,
    Survival,
    VectorFeature,
)

if TYPE_CHECKING:
    import pandas as pd

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Coverage:
    """Of each record that was read: whose it is, and its answers [n, questions] as ``readiness.questions`` has them."""

    patients: NDArray[np.int64]
    answers: Flags


def coverage(
    frame: pd.DataFrame,
    x: NDArray[np.float32],
    y: NDArray[np.float64],
    keep: Flags,
    plan: StudyPlan,
    report: QualityReport,
) -> Coverage:
    """Of all records of a table; ``keep`` are those that the study uses. ``x`` and ``y`` are of all of them too.

    A value that the plan does not take, such as one out of range, is not there. Of a record that is not used the
    outcome is not told, and one without a patient's id is nobody's.
    """
    schema = plan.table
    faulty = {
        column.name: sorted({row for rows in column.problems.values() for row in rows}) for column in report.columns
    }
    there = _features(frame, x, schema, faulty)
    answers = np.column_stack([keep, *there, *(keep & came for came in _outcomes(y, schema))])
    if schema.patient_id is None:
        return Coverage(np.arange(len(frame)), answers)
    whose = words(frame[schema.patient_id])
    known = whose != ""
    return Coverage(np.unique(whose[known], return_inverse=True)[1].astype(np.int64), answers[known])


def _features(frame: pd.DataFrame, x: NDArray[np.float32], schema: Schema, faulty: dict[str, list[int]]) -> list[Flags]:
    """In the order of ``readiness.features``."""
    found, shaped = list[Flags](), {block.feature.name: block for block in blocks(schema)}

    def there(name: str) -> Flags:
        present = ~frame[name].isna().to_numpy()
        present[np.array(faulty.get(name, ()), dtype=np.int64) - 1] = False
        return present

    for feature in schema.features:
        match feature:
            case SeriesFeature():
                taken = _block(x, shaped[feature.name]).reshape(len(x), feature.steps, 2, len(feature.channels))[
                    :, :, 1
                ]
                found += list(np.any(taken, axis=1).T)
            case VectorFeature():
                found.append(np.all([there(f"{feature.name}_{at}") for at in range(feature.length)], axis=0))
            case _ if feature.name in shaped and not isinstance(feature, ImageFeature):
                found.append(np.any(_block(x, shaped[feature.name]) != 0, axis=1))
            case _:
                found.append(there(feature.name))
    return found


def _block(x: NDArray[np.float32], block: Block) -> NDArray[np.float32]:
    return x[:, block.start : block.start + block.size]


def _outcomes(y: NDArray[np.float64], schema: Schema) -> list[Flags]:
    """In the order of ``readiness.outcomes``."""
    match schema.target:
        case Binary():
            return [y == 1]
        case Classes(classes=names):
            return [y == number for number in range(len(names))]
        case Labels():
            return list((y == 1).T)
        case Survival() | Effect():
            return [y[:, 1] == 1]
        case _:
            return []
