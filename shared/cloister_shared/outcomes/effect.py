"""What a treatment changes, for whom: value of a policy, uplift, the mean effect, and whether it can be told at all.

Truth is float [n, 2]: the scaled outcome, and 1 for the treated. Prediction is float [n, 3]: the scaled outcome
untreated and treated, and the chance of having been treated.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cloister_shared.outcomes.binary import sigmoid
from cloister_shared.outcomes.judging import Array, Matrix, Metric, Vector, mean_of

OVERLAP = (0.05, 0.95)
"""Outside these chances of treatment there is next to nobody to compare a patient with (Crump et al. 2009)."""


def seen(output: NDArray[np.float32], y: NDArray[np.float32]) -> tuple[Array, Array]:
    """Outputs [n, 3] with the last a logit; what is no number counts as 0."""
    said = np.nan_to_num(output.astype(np.float64), posinf=0.0, neginf=0.0)
    return y.astype(np.float64), np.concatenate([said[:, :2], sigmoid(said[:, 2:])], axis=1)


def enough(y: Array, least: int) -> bool:
    """Whether so many were treated and so many were not."""
    treated = int(np.count_nonzero(y[:, 1]))
    return min(treated, len(y) - treated) >= least


def robust(y: Array, p: Array) -> tuple[Vector, Vector]:
    """Doubly robust outcomes untreated and treated, one each a patient (Robins et al. 1994; Kennedy 2023)."""
    chance = np.clip(p[:, 2], *OVERLAP)
    treated = y[:, 1] > 0.5
    without = p[:, 0] + np.where(treated, 0.0, (y[:, 0] - p[:, 0]) / (1 - chance))
    given = p[:, 1] + np.where(treated, (y[:, 0] - p[:, 1]) / chance, 0.0)
    return without, given


def metrics(larger_is_better: bool) -> dict[str, Metric]:
    """All of them, in scaled units of the outcome; ``larger_is_better`` says whom a policy would treat."""
    sign = 1.0 if larger_is_better else -1.0

    def policy(y: Array, p: Array) -> Vector:
        without, given = robust(y, p)
        return np.where(sign * (p[:, 1] - p[:, 0]) > 0, given, without)

    def uplift(y: Array, p: Array, weights: Matrix) -> Vector:
        """Area between the gain of treating the likeliest first and of treating in any order (Radcliffe 2007)."""
        order = np.argsort(-sign * (p[:, 1] - p[:, 0]), kind="stable")
        without, given = robust(y, p)
        part = weights[:, order] / weights.sum(axis=1, keepdims=True)
        gained = np.cumsum(part * (sign * (given - without))[order], axis=1)
        share = np.cumsum(part, axis=1)
        return np.einsum("bi,bi->b", gained - share * gained[:, -1:], part)

    return {
        "policy_value": mean_of(policy),
        "uplift": uplift,
        "mean_effect": mean_of(_effect),
        "overlap": mean_of(_overlap),
    }


def _effect(y: Array, p: Array) -> Vector:
    without, given = robust(y, p)
    return given - without


def _overlap(y: Array, p: Array) -> Vector:
    return ((p[:, 2] > OVERLAP[0]) & (p[:, 2] < OVERLAP[1])).astype(np.float64)
