"""The constants that all hospitals share in ComBat, from the sums that they sent. Post-processing: no epsilon."""

from __future__ import annotations

import numpy as np

from cloister_shared import combat, tally
from cloister_shared.combat import Array, Constants, Moments
from cloister_shared.inputs import numbers
from cloister_shared.plan import StudyPlan


def pooled(plan: StudyPlan, sums: Moments) -> Constants:
    """Mean, scale within hospitals, and with covariates the regression on them, of each number feature.

    ``sums`` are the hospitals' centred ones. Least squares on those is least squares with a constant for each hospital
    (Johnson, Li and Rabinovic 2007, step 1), and the scale is what it leaves over all rows. A feature that the plan
    keeps has mean and standard deviation alone.
    """
    # Noise may push a variance below zero; a twentieth of the window is the least spread that is believed.
    least = 0.05 if plan.private else 1e-6
    count, whole = np.maximum(sums.count, 1.0), max(sums.whole, 1.0)
    slopes = _slopes(plan, sums)
    left = sums.yy - 2 * (slopes * sums.xy).sum(axis=0) + ((sums.xx @ slopes) * slopes).sum(axis=0)
    scale = np.sqrt(np.maximum(left / count, least**2))
    centre, means = np.clip(sums.y / count, -1, 1), np.clip(sums.x / whole, -1, 1)
    rows = {
        feature.name: (centre[at], scale[at], centre[at] - means @ slopes[:, at], *slopes[:, at])
        for at, feature in enumerate(combat.harmonised(plan))
    }
    for at, column in enumerate(combat.covariates(plan)):
        own = float(np.sqrt(max(sums.xx[at, at] / whole, least**2)))
        rows[column.feature] = (means[at], own, means[at], *np.zeros(len(means)))
    found: list[tuple[float, ...]] = []
    for feature in numbers(plan.table):
        (low, high), row = combat.window(feature), rows[feature.name]
        middle, half = (low + high) / 2, (high - low) / 2
        values = (middle + half * row[0], half * row[1], middle + half * row[2], *(half * slope for slope in row[3:]))
        found.append(tuple(map(float, values if len(means) else values[:2])))
    return tuple(found)


def _slopes(plan: StudyPlan, sums: Moments) -> Array:
    """Of each feature on each covariate; less steep, the more of the covariates' spread is noise (ridge)."""
    ridge = tally.harmony_noise(plan) * plan.cohort.min_sites**0.5
    sizes, directions = np.linalg.eigh(sums.xx)
    sizes = np.maximum(sizes, 0.0) + ridge
    # A covariate that is the same in every row, or follows from others, explains nothing.
    known = sizes > 1e-9 * max(sums.whole, 1.0)
    return directions[:, known] @ ((directions[:, known].T @ sums.xy) / sizes[known, None])
