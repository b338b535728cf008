"""What is usual: how far a record is from what the model makes of it, and whether that raises the right alarms.

Truth is float [n]: 1 where an alarm was due, 0 where not, NaN where nobody knows. Prediction is float [n, 2]: the
error, and how many times the model's own threshold it is, NaN of a model without one; from 1 on there is an alarm.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cloister_shared.outcomes import binary
from cloister_shared.outcomes.judging import Array, Matrix, Metric, Vector, mean_of, ratio


def seen(output: NDArray[np.float32], y: NDArray[np.float32]) -> tuple[Array, Array]:
    """Of outputs [n, k] or [n, k + 1] and inputs with the alarm behind them [n, k + 1]: alarms due, and errors.

    What is NaN in the inputs was not measured. The last of k + 1 outputs is the logarithm of the threshold.
    """
    inputs = y[:, :-1].astype(np.float64)
    threshold = output[:, -1].astype(np.float64) if output.shape[1] == y.shape[1] else np.full(len(y), np.nan)
    output = output[:, : inputs.shape[1]]
    known = ~np.isnan(inputs)
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.where(known, np.square(output.astype(np.float64) - inputs), 0.0)
        error = squares.sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    error = np.nan_to_num(error, nan=1e6, posinf=1e6)
    return y[:, -1].astype(np.float64), np.stack([error, error / np.exp(threshold.clip(-30, 30))], axis=1)


def enough(y: Array, least: int) -> bool:
    """Whether there are so many rows, and where alarms are known so many of either."""
    known = y[~np.isnan(y)]
    return len(y) >= least and (len(known) == 0 or binary.enough(known, least))


def sensitivity_at(share: float) -> Metric:
    """The share of due alarms that are raised where so many of the others are false."""

    def metric(y: Array, p: Array, weights: Matrix) -> Vector:
        y, p, weights = _known(y, p[:, 0], weights)
        order = np.argsort(-p, kind="stable")
        due, others = weights[:, order] * y[order], weights[:, order] * (1 - y[order])
        total = others.sum(axis=1, keepdims=True)
        raised = np.cumsum(others, axis=1) <= share * total
        every = np.where(total[:, 0] > 0, due.sum(axis=1), 0.0)
        return ratio((due * raised).sum(axis=1), every)

    return metric


def alarm_rate(y: Array, p: Array, weights: Matrix) -> Vector:
    """The share of records that raise an alarm, of those where none was known to be due."""
    weights = weights * (y != 1) * ~np.isnan(p[:, 1])
    return ratio(weights @ (p[:, 1] >= 1).astype(np.float64), weights.sum(axis=1))


def alarm_sensitivity(y: Array, p: Array, weights: Matrix) -> Vector:
    """The share of due alarms that are raised."""
    weights = weights * (y == 1) * ~np.isnan(p[:, 1])
    return ratio(weights @ (p[:, 1] >= 1).astype(np.float64), weights.sum(axis=1))


def _auroc(y: Array, p: Array, weights: Matrix) -> Vector:
    return binary.auroc(*_known(y, p[:, 0], weights))


def _auprc(y: Array, p: Array, weights: Matrix) -> Vector:
    return binary.auprc(*_known(y, p[:, 0], weights))


def _known(y: Array, p: Array, weights: Matrix) -> tuple[Array, Array, Matrix]:
    """Of the records of which it is known whether an alarm was due."""
    known = ~np.isnan(y)
    return y[known], p[known], weights[:, known]


def _error(y: Array, p: Array) -> Vector:
    return p[:, 0]


WITHOUT_ALARMS: dict[str, Metric] = {"error": mean_of(_error), "alarm_rate": alarm_rate}
METRICS: dict[str, Metric] = {
    "auroc": _auroc,
    "auprc": _auprc,
    "sensitivity_at_5_percent_false": sensitivity_at(0.05),
    "alarm_sensitivity": alarm_sensitivity,
    **WITHOUT_ALARMS,
}
