"""Time to an event that not everyone was awaited for, learned as the event's chance in each of some periods.

Truth is float [n, 3]: the period in which the event came, or how many were outlived; whether it came; the time itself.
Prediction is float [n, periods]: the chance to outlive each period.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cloister_shared.outcomes.binary import sigmoid
from cloister_shared.outcomes.judging import Array, Matrix, Metric, Vector, mean_of, ratio

ROWS = 512
"""Patients who are compared with all others at a time: memory, and no result."""

RAREST = 0.05
"""A chance to be awaited below this counts as this: beyond it one patient would weigh more than twenty."""


def seen(periods: int) -> Callable[[NDArray[np.float32], NDArray[np.float32]], tuple[Array, Array]]:
    """Survival curves from the first ``periods`` outputs, logits of hazards; what is no number counts as a coin."""

    def curves(output: NDArray[np.float32], y: NDArray[np.float32]) -> tuple[Array, Array]:
        hazards = sigmoid(output[:, :periods].astype(np.float64))
        outlived: Array = np.cumprod(1 - np.where(np.isnan(hazards), 0.5, hazards), axis=1, dtype=np.float64)
        return y.astype(np.float64), outlived

    return curves


def enough(y: Array, least: int) -> bool:
    """Whether the event came for so many and did not for so many."""
    came = int(np.count_nonzero(y[:, 1]))
    return min(came, len(y) - came) >= least


def c_index(y: Array, p: Array, weights: Matrix) -> Vector:
    """Of two patients of whom the event came first for one: how often that one was said to be at more risk.

    Harrell et al. 1982, with the expected number of periods outlived as the prediction; ties count half.
    """
    time, came, outlived = y[:, 2], y[:, 1] > 0, p.sum(axis=1)
    right, comparable = np.zeros((2, len(weights)))
    for own in np.array_split(np.arange(len(y)), len(y) // ROWS + 1):
        first = time[own, None] < time
        pairs = (came[own, None] & (first | ((time[own, None] == time) & ~came))).astype(np.float64)
        better = (outlived[own, None] < outlived) + 0.5 * (outlived[own, None] == outlived)
        comparable += np.einsum("bj,bj->b", weights[:, own] @ pairs, weights)
        right += np.einsum("bj,bj->b", weights[:, own] @ (pairs * better), weights)
    return ratio(right, comparable)


def metrics(cuts: tuple[float, ...]) -> dict[str, Metric]:
    """C-index; Brier score integrated over the periods' ends, and at the last of them.

    An end to which next to nobody was awaited (``RAREST``) is not judged: those who are known there are the dead.
    """
    ends = np.asarray(cuts, dtype=np.float32).astype(np.float64)  # as the times of losses came here

    def at_end(y: Array, p: Array) -> Vector:
        return np.where(awaited(y, ends)[-1] > RAREST, brier(y, p, ends)[:, -1], np.nan)

    def integrated(y: Array, p: Array) -> Vector:
        judged = awaited(y, ends) > RAREST
        if np.count_nonzero(judged) < 2:
            return np.full(len(y), np.nan)
        area = np.trapezoid(brier(y, p, ends)[:, judged], ends[judged], axis=1)
        return area / (ends[judged][-1] - ends[judged][0])

    return {"c_index": c_index, "integrated_brier": mean_of(integrated), "brier_at_end": mean_of(at_end)}


def brier(y: Array, p: Array, ends: Vector) -> Matrix:
    """Squared error of each patient's chance to outlive each period, [n, periods].

    Whoever was not awaited to the end of a period counts as much more through those who were: each is weighed by one
    over the chance to have been awaited until the event, or until the period's end (Graf et al. 1999).
    """
    period, at = y[:, :1], np.arange(len(ends))
    dead, alive = (y[:, 1:2] > 0) & (period <= at), period > at
    until_event, until_end = awaited(y, y[:, 2])[:, None], awaited(y, ends)
    return np.where(dead, p**2 / until_event, 0.0) + np.where(alive, (1 - p) ** 2 / until_end, 0.0)


def awaited(y: Array, at: Vector) -> Vector:
    """The chance not to be lost before each of the times ``at``: Kaplan and Meier 1958 of losses, events first."""
    time, came = y[:, 2], y[:, 1] > 0
    losses, lost = np.unique(time[~came], return_counts=True)
    there = len(time) - np.searchsorted(np.sort(time), losses, side="left")
    events = np.sort(time[came])
    there = there - (np.searchsorted(events, losses, side="right") - np.searchsorted(events, losses, side="left"))
    kept = np.concatenate([[1.0], np.cumprod(1 - lost / there)])
    return np.maximum(kept[np.searchsorted(losses, at, side="left")], RAREST)
