"""What is usual: how far a record is from what the model makes of it, and whether that raises the right alarms.

Truth is float [n]: 1 where an alarm was due, 0 where not, NaN where nobody knows. Prediction is float [n]: the error.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cloister_shared.outcomes import binary
from cloister_shared.outcomes.judging import Array, Matrix, Metric, Vector, mean_of

FALSE_ALARMS = 0.05


def seen(output: NDArray[np.float32], y: NDArray[np.float32]) -> tuple[Array, Array]:
    """Of outputs [n, k] and inputs with the alarm behind them [n, k + 1]: alarms due, and mean squared errors.

    What a model says beyond k numbers is for its own loss.
    """
    inputs, output = y[:, :-1].astype(np.float64), output[:, : y.shape[1] - 1]
    known = ~np.isnan(inputs)
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.where(known, np.square(output.astype(np.float64) - inputs), 0.0)
        error = squares.sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    return y[:, -1].astype(np.float64), np.nan_to_num(error, nan=1e6, posinf=1e6)


def enough(y: Array, least: int) -> bool:
    """Whether there are so many rows, and where alarms are known so many of either."""
    known = y[~np.isnan(y)]
    return len(y) >= least and (len(known) == 0 or binary.enough(known, least))


def sensitivity(y: Array, p: Array, weights: Matrix) -> Vector:
    """The share of due alarms that are raised where one in twenty of the others is false."""
    known = ~np.isnan(y)
    y, p, weights = y[known], p[known], weights[:, known]
    order = np.argsort(-p, kind="stable")
    due, others = weights[:, order] * y[order], weights[:, order] * (1 - y[order])
    total = others.sum(axis=1, keepdims=True)
    raised = np.cumsum(others, axis=1) <= FALSE_ALARMS * total
    every = due.sum(axis=1)
    found = (due * raised).sum(axis=1)
    return np.divide(found, every, out=np.full_like(every, np.nan), where=(every > 0) & (total[:, 0] > 0))


def _auroc(y: Array, p: Array, weights: Matrix) -> Vector:
    known = ~np.isnan(y)
    return binary.auroc(y[known], p[known], weights[:, known])


def _auprc(y: Array, p: Array, weights: Matrix) -> Vector:
    known = ~np.isnan(y)
    return binary.auprc(y[known], p[known], weights[:, known])


def _error(y: Array, p: Array) -> Vector:
    return p


WITHOUT_ALARMS: dict[str, Metric] = {"error": mean_of(_error)}
METRICS: dict[str, Metric] = {
    "auroc": _auroc,
    "auprc": _auprc,
    "sensitivity_at_5_percent_false": sensitivity,
    **WITHOUT_ALARMS,
}
