"""All hospitals' rows in one place, and one hospital's by itself, as the arms without a federation train on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from cloister_client.combat import effects, inputs, sent
from cloister_client.dataset import Dataset, Rows, normalised
from cloister_client.site import own_constants
from cloister_client.statistics import noisy_statistics
from cloister_server.statistics import constants
from cloister_shared import tally
from cloister_shared.inputs import columns, numbers, plan_constants
from cloister_shared.noise import keystream
from cloister_shared.plan import StudyPlan


def pooled(plan: StudyPlan, datasets: Mapping[str, Dataset]) -> tuple[Rows, dict[str, Rows]]:
    """Everybody's training rows as one table, and each hospital's held-out rows, as a model takes them.

    Without privacy statistics are simply taken, here of all rows; the plan's constants stay the plan's.
    """
    if plan.harmonises:
        own = {site: noisy_statistics(dataset.train, plan, keystream()) for site, dataset in datasets.items()}
        said = [sent(plan, numbers) for numbers in own.values()]
        shared = constants(plan, {name: sum(each[name] or 0.0 for each in said) for name in tally.statistics(plan)})
        assert shared, "the plan harmonises"
        known = {site: effects(plan, numbers, shared) for site, numbers in own.items()}
        train = [inputs(dataset.train, plan, shared, known[site]) for site, dataset in datasets.items()]
        tests = {site: inputs(dataset.test, plan, shared, known[site]) for site, dataset in datasets.items()}
        return concatenated(train), tests
    everyone, everything = concatenated([dataset.train for dataset in datasets.values()]), columns(plan.table)
    found = _constants(plan, everyone)
    return normalised(everyone, everything, found), {
        site: normalised(dataset.test, everything, found) for site, dataset in datasets.items()
    }


def alone(plan: StudyPlan, dataset: Dataset) -> tuple[Rows, Rows]:
    """One hospital's training and held-out rows, by its own statistics or the plan's: it differs from nobody."""
    found = _constants(plan, dataset.train)
    train, test = (normalised(rows, dataset.columns, found) for rows in (dataset.train, dataset.test))
    return train, test


def concatenated(parts: Sequence[Rows]) -> Rows:
    """The rows of several hospitals, no two of which share a patient."""
    offset, patients = 0, list[NDArray[np.int64]]()
    for part in parts:
        patients.append(part.patients + offset)
        offset += int(part.patients.max(initial=-1)) + 1
    return Rows(torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts]), np.concatenate(patients))


def _constants(plan: StudyPlan, rows: Rows) -> tuple[tuple[float, float], ...]:
    if plan.normalisation.method == "plan":
        return tuple(plan_constants(feature) for feature in numbers(plan.table))
    at = [i for i, column in enumerate(columns(plan.table)) if column.kind == "number" and not column.absent]
    return own_constants(rows, at)
