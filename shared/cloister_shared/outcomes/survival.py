"""Time to an event that not everyone was awaited for, learned as the event's chance in each of some periods.

Truth is float [n, 3]: the period in which the event came, or how many were outlived; whether it came; the time itself.
Prediction is float [n, periods]: the chance to outlive each period.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cloister_shared.outcomes.binary import sigmoid
from cloister_shared.outcomes.judging import Array, Matrix, Metric, Vector, mean_of, ratio


def seen(output: NDArray[np.float32], y: NDArray[np.float32]) -> tuple[Array, Array]:
    """Survival curves from the logits of hazards [n, periods]; what is no number counts as a coin."""
    hazards = sigmoid(output.astype(np.float64))
    outlived: Array = np.cumprod(1 - np.where(np.isnan(hazards), 0.5, hazards), axis=1, dtype=np.float64)
    return y.astype(np.float64), outlived


def enough(y: Array, least: int) -> bool:
    """Whether the event came for so many and did not for so many."""
    came = int(np.count_nonzero(y[:, 1]))
    return min(came, len(y) - came) >= least


def c_index(y: Array, p: Array, weights: Matrix) -> Vector:
    """Of two patients of whom the event came first for one: how often that one was said to be at more risk.

    Harrell et al. 1982, with the expected number of periods outlived as the prediction; ties count half.
    """
    time, came, outlived = y[:, 2], y[:, 1] > 0, p.sum(axis=1)
    comparable = (came[:, None] & ((time[:, None] < time) | ((time[:, None] == time) & ~came))).astype(np.float64)
    right = comparable * ((outlived[:, None] < outlived) + 0.5 * (outlived[:, None] == outlived))
    return ratio(*(np.einsum("bj,bj->b", weights @ pairs, weights) for pairs in (right, comparable)))


def metrics(periods: int) -> dict[str, Metric]:
    """C-index; Brier score averaged over the periods; and the Brier score at the end of the last."""

    def at_end(y: Array, p: Array) -> Vector:
        return _brier(y, p, periods)[:, -1]

    def integrated(y: Array, p: Array) -> Vector:
        return _brier(y, p, periods).mean(axis=1)

    return {"c_index": c_index, "integrated_brier": mean_of(integrated), "brier_at_end": mean_of(at_end)}


def _brier(y: Array, p: Array, periods: int) -> Matrix:
    """Squared error of each survival chance, [n, periods].

    Whoever was not awaited to the end of a period counts as much more through those who were (Graf et al. 1999).
    """
    period, came = y[:, :1], y[:, 1:2] > 0
    ends = np.arange(periods)[None]
    dead, alive = came & (period <= ends), period > ends
    awaited = _awaited(y, periods)
    before = awaited[np.clip(period.astype(np.int64), 0, periods)]
    return np.where(dead, p**2 / before, 0.0) + np.where(alive, (1 - p) ** 2 / awaited[1:][None], 0.0)


def _awaited(y: Array, periods: int) -> Vector:
    """The chance to be awaited up to the start of each period, and to the end of the last: Kaplan and Meier 1958."""
    period, lost = y[:, 0], y[:, 1] == 0
    kept = [1.0]
    for at in range(periods):
        there = np.count_nonzero(period >= at)
        kept.append(kept[-1] * (1 - np.count_nonzero(lost & (period == at)) / there) if there else kept[-1])
    return np.maximum(np.array(kept), 0.05)  # beyond that one patient would weigh more than twenty
