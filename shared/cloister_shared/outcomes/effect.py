"""What a treatment changes, for whom: value of a policy, uplift, the mean effect, and whether it can be told at all.

Truth is float [n, 2]: the outcome, and 1 for the treated. Prediction is float [n, 4]: the outcome untreated and
treated, the chance of having been treated, and what treatment changes. Outcomes are in the plan's range.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cloister_shared.outcomes.binary import sigmoid
from cloister_shared.outcomes.judging import Array, Matrix, Metric, Vector, mean_of

OVERLAP = (0.05, 0.95)
"""Outside these chances of treatment there is next to nobody to compare a patient with."""

LEAST_OVERLAP = 0.8
"""Where fewer of the patients than this lie between, nothing is said of an effect (after Crump et al. 2009)."""


def seen(centre: float, scale: float) -> Callable[[NDArray[np.float32], NDArray[np.float32]], tuple[Array, Array]]:
    """How outputs [n, 3] or [n, 4] are read, the third a logit; what is no number counts as 0.

    Without a fourth output the effect is the difference of the first two.
    """

    def read(output: NDArray[np.float32], y: NDArray[np.float32]) -> tuple[Array, Array]:
        said = np.nan_to_num(output.astype(np.float64), posinf=0.0, neginf=0.0)
        gain = said[:, 3:] if said.shape[1] > 3 else said[:, 1:2] - said[:, :1]
        truth = np.stack([y[:, 0] * scale + centre, y[:, 1]], axis=1, dtype=np.float64)
        return truth, np.concatenate([said[:, :2] * scale + centre, sigmoid(said[:, 2:3]), gain * scale], axis=1)

    return read


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
    """All of them, in the outcome's unit; ``larger_is_better`` says whom a policy would treat.

    Those of an effect are NaN where too few patients can be compared (``LEAST_OVERLAP``).
    """
    sign = 1.0 if larger_is_better else -1.0

    def policy(y: Array, p: Array) -> Vector:
        without, given = robust(y, p)
        return np.where(sign * p[:, 3] > 0, given, without)

    def uplift(y: Array, p: Array, weights: Matrix) -> Vector:
        """Area between the gain of treating the likeliest first and of treating in any order (Radcliffe 2007)."""
        order, gain = ranked(y, p, larger_is_better)
        part = weights[:, order] / weights.sum(axis=1, keepdims=True)
        gained = np.cumsum(part * gain, axis=1)
        share = np.cumsum(part, axis=1)
        return np.einsum("bi,bi->b", gained - share * gained[:, -1:], part)

    return {
        "policy_value": comparable(mean_of(policy)),
        "uplift": comparable(uplift),
        "mean_effect": comparable(mean_of(_effect)),
        "overlap": overlap,
    }


def comparable(metric: Metric) -> Metric:
    """The metric where enough patients could have been in either arm, and NaN where not."""

    def held(y: Array, p: Array, weights: Matrix) -> Vector:
        return np.where(overlap(y, p, weights) >= LEAST_OVERLAP, metric(y, p, weights), np.nan)

    return held


def ranked(y: Array, p: Array, larger_is_better: bool) -> tuple[NDArray[np.int64], Vector]:
    """Patients by what treatment is said to do for them, the most first; and what it did, doubly robust, in that order.

    More is better in both, whichever way the outcome goes.
    """
    sign = 1.0 if larger_is_better else -1.0
    order = np.argsort(-sign * p[:, 3], kind="stable")
    without, given = robust(y, p)
    return order, (sign * (given - without))[order]


def uplift_curve(y: Array, p: Array, larger_is_better: bool, points: int = 20) -> list[tuple[float, float]]:
    """(share treated, gain a patient of all) for treating the likeliest first: from (0, 0) to the mean effect."""
    _, gain = ranked(y, p, larger_is_better)
    gained, ends = np.concatenate([[0.0], np.cumsum(gain)]) / len(gain), np.linspace(0, len(gain), points + 1)
    return [(float(end) / len(gain), float(gained[int(end)])) for end in ends]


def _effect(y: Array, p: Array) -> Vector:
    without, given = robust(y, p)
    return given - without


def _overlap(y: Array, p: Array) -> Vector:
    return ((p[:, 2] > OVERLAP[0]) & (p[:, 2] < OVERLAP[1])).astype(np.float64)


overlap = mean_of(_overlap)
"""The share of patients who could have been in either arm."""
