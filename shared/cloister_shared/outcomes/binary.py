"""An outcome that comes or does not: how good predicted probabilities of it are.

Metrics take arrays that `evaluate` has already checked: y float [n], 0 or 1; p float [n], the predicted probability
of outcome 1, in [0, 1]; weights float [b, n].
"""

from __future__ import annotations

from functools import partial
from typing import TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cloister_shared.outcomes.judging import Array, Estimate, Matrix, Metric, Vector, judge

Float = TypeVar("Float", np.float32, np.float64)

CLIP = 1e-7  # probabilities nearer than this to 0 or 1 count as this near, so that their logit is finite
NEWTON_STEPS = 100  # ordinary data need 4 to 8
NEWTON_TOLERANCE = 1e-6  # stop when no patient's logit moves further; the error left is about its square


def evaluate(
    y: ArrayLike,
    p: ArrayLike,
    *,
    threshold: float = 0.5,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int | np.random.Generator = 0,
) -> dict[str, Estimate]:
    """Every metric of METRICS with its percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13).

    y, p: [n] as above. threshold: a patient with p >= threshold is called positive. level: coverage of the
    interval. The answer depends on the seed, and not on the order of the patients. Resamples that cannot say
    are left out of the interval. Raises ValueError for arguments outside these terms; no message repeats a
    patient's value.
    """
    y, p = _checked(y, p)
    if not 0 <= threshold <= 1:
        raise ValueError("Expected a threshold from 0 to 1.")
    return judge(at_threshold(threshold), y, p, level=level, resamples=resamples, seed=seed)


def of_counts(ill: Vector, well: Vector, *, threshold: float = 0.5) -> dict[str, float | None]:
    """Every metric of METRICS from counts of patients with and without the outcome by predicted probability.

    ill, well: [bins], not negative, over equal parts of [0, 1]. Each patient counts as in the middle of the bin.
    None where the counts cannot say.
    """
    middle = (np.arange(len(ill)) + 0.5) / len(ill)
    y, p = np.repeat([1.0, 0.0], len(ill)), np.concatenate([middle, middle])
    weights = np.concatenate([ill, well])[None]
    if not weights.any():
        return dict.fromkeys(METRICS)
    found = {name: float(metric(y, p, weights)[0]) for name, metric in at_threshold(threshold).items()}
    return {name: value if np.isfinite(value) else None for name, value in found.items()}


def at_threshold(threshold: float) -> dict[str, Metric]:
    """METRICS of which a patient with p >= threshold is called positive."""
    return METRICS | {
        "accuracy": partial(accuracy, threshold=threshold),
        "sensitivity": partial(sensitivity, threshold=threshold),
        "specificity": partial(specificity, threshold=threshold),
    }


@overload
def auroc(y: Vector, p: Vector, weights: None = None) -> float: ...
@overload
def auroc(y: Vector, p: Vector, weights: Matrix) -> Vector: ...
def auroc(y: Vector, p: Vector, weights: Matrix | None = None) -> float | Vector:
    """The chance that a positive patient is ranked above a negative one, ties counting half (Mann-Whitney).

    Without weights: checks y and p as `evaluate` does and answers one float, NaN when either class is
    missing. This is the fast path, for each hospital in each round.
    """
    if weights is None:
        y, p = _checked(y, p)
        sick = y == 1
        positive, negative = p[sick], np.sort(p[~sick])
        pairs = len(positive) * len(negative)
        if pairs == 0:
            return float("nan")
        beaten = negative.searchsorted(positive, side="left") + negative.searchsorted(positive, side="right")
        return float(beaten.sum()) / (2 * pairs)
    hits, called = _threshold_curve(y, p, weights)
    false_alarms = called - hits
    area = np.einsum("bg,bg->b", np.diff(false_alarms), (hits[:, 1:] + hits[:, :-1]) / 2)
    return _ratio(area, hits[:, -1] * false_alarms[:, -1], where=_both_classes(y, weights))


def auprc(y: Vector, p: Vector, weights: Matrix) -> Vector:
    """Average precision: the sum over thresholds of the precision times the recall gained there."""
    hits, called = _threshold_curve(y, p, weights)
    precision = np.divide(hits, called, out=np.zeros_like(hits), where=called > 0)
    gained = np.einsum("bg,bg->b", precision[:, 1:], np.diff(hits))
    return _ratio(gained, hits[:, -1], where=_both_classes(y, weights))


def brier(y: Vector, p: Vector, weights: Matrix) -> Vector:
    """Mean squared difference of probability and outcome (Brier 1950): 0 is best."""
    return weights @ np.square(p - y) / weights.sum(axis=1)


def accuracy(y: Vector, p: Vector, weights: Matrix, threshold: float = 0.5) -> Vector:
    """The share of patients called right."""
    right = ((p >= threshold) == (y == 1)).astype(np.float64)
    return weights @ right / weights.sum(axis=1)


def sensitivity(y: Vector, p: Vector, weights: Matrix, threshold: float = 0.5) -> Vector:
    """The share of positive patients called positive. NaN where either class is missing."""
    return _ratio(weights @ (y * (p >= threshold)), weights @ y, where=_both_classes(y, weights))


def specificity(y: Vector, p: Vector, weights: Matrix, threshold: float = 0.5) -> Vector:
    """The share of negative patients called negative. NaN where either class is missing."""
    well = 1 - y
    return _ratio(weights @ (well * (p < threshold)), weights @ well, where=_both_classes(y, weights))


def calibration_slope(y: Vector, p: Vector, weights: Matrix) -> Vector:
    """Slope of the logistic regression of y on logit(p), with an intercept and no penalty (Cox 1958).

    1 is calibrated, below 1 is too extreme: overfitted (Steyerberg 2019, chapter 15). NaN where no finite
    slope exists, or NEWTON_STEPS do not reach it, as where the classes all but separate.

    Newton's method on all rows at once. A step that moves some patient's logit by r > 1 is shortened to
    log(1 + r) / r of itself, which lowers the loss from any start, because the logistic loss is
    self-concordant in the sense of Bach 2010 (Sun and Tran-Dinh 2019, damped step for nu = 2).
    """
    clipped = np.clip(p, CLIP, 1 - CLIP)
    x = np.log(clipped) - np.log1p(-clipped)
    slopes = np.full(len(weights), np.nan)
    rows = np.flatnonzero(_classes_overlap(y, x, weights))
    if len(rows) == 0:
        return slopes
    centre, scale = x.mean(), x.std()
    x = (x - centre) / scale  # keeps the 2 by 2 system well conditioned; undone in the last line
    powers = np.stack([np.ones_like(x), x, x * x], axis=1)
    weights = weights[rows]
    intercept, slope = np.full(1, centre), np.full(1, scale)  # perfect calibration: one start for every row
    for _ in range(NEWTON_STEPS):
        with np.errstate(all="ignore"):  # a logit below -709, a flat row, a step of 0: all harmless
            chance = 1 / (1 + np.exp(-intercept[:, None] - slope[:, None] * x))
            g0, g1 = ((weights * (y - chance)) @ powers[:, :2]).T
            h0, h1, h2 = ((weights * (chance * (1 - chance))) @ powers).T
            determinant = h0 * h2 - h1 * h1
            up, turn = (h2 * g0 - h1 * g1) / determinant, (h0 * g1 - h1 * g0) / determinant
            reach = np.maximum(np.abs(up + turn * x.min()), np.abs(up + turn * x.max()))
            length = np.where(reach > 1, np.log1p(reach) / reach, 1.0)
            intercept, slope = intercept + length * up, slope + length * turn
        done, going = reach < NEWTON_TOLERANCE, (reach >= NEWTON_TOLERANCE) & np.isfinite(reach)
        slopes[rows[done]] = slope[done]
        if not going.any():
            break
        if not going.all():
            rows, weights, intercept, slope = rows[going], weights[going], intercept[going], slope[going]
    return slopes / scale


METRICS: dict[str, Metric] = {
    "auroc": auroc,
    "auprc": auprc,
    "brier": brier,
    "calibration_slope": calibration_slope,
    "accuracy": accuracy,
    "sensitivity": sensitivity,
    "specificity": specificity,
}


def probabilities(output: NDArray[np.float32]) -> Vector:
    """Predicted probabilities of logits [n, 1]. What is no number counts as a coin.

    A failure would say which rows a hostile model had been made for.
    """
    risk = sigmoid(output[:, 0].astype(np.float64))
    return np.where(np.isnan(risk), 0.5, risk)


def seen(output: NDArray[np.float32], y: NDArray[np.float32]) -> tuple[Array, Array]:
    """Outcomes and probabilities, [n] each."""
    return y.astype(np.float64), probabilities(output)


def enough(y: Array, least: int) -> bool:
    """Whether there are ``least`` rows of either outcome, so that a metric tells of no single patient."""
    positives = int(np.count_nonzero(y))
    return min(positives, len(y) - positives) >= least


def cost(output: NDArray[np.float32], target: NDArray[np.float32]) -> float:
    """Mean binary cross-entropy of logits [n, 1]: ``losses.binary`` without torch."""
    logits = output[:, 0]
    return float(np.sum(np.logaddexp(0, logits) - target * logits)) / len(target)


def slope(output: NDArray[np.float32], target: NDArray[np.float32]) -> NDArray[np.float32]:
    """How that changes with each logit; shape [n, 1]."""
    return (sigmoid(output) - target[:, None]) / np.float32(len(target))


def sigmoid(logits: NDArray[Float]) -> NDArray[Float]:
    """1 / (1 + exp(-x)), whatever x is."""
    return np.exp(-np.logaddexp(0, -logits))


def reliability(y: ArrayLike, p: ArrayLike, bins: int = 10) -> list[tuple[float, float, int]]:
    """The calibration plot: ascending (mean predicted, observed fraction, patients) of each quantile bin.

    Patients with equal p share a bin, so ties can give fewer bins than asked. Raises ValueError as `evaluate`
    does.
    """
    y, p = _checked(y, p)
    if bins < 1:
        raise ValueError("Expected at least one bin.")
    last_ranks = np.arange(1, bins) * len(p) // bins - 1  # of each bin but the highest; -1 if empty
    bin_of = np.searchsorted(np.sort(p)[last_ranks[last_ranks >= 0]], p)
    members = [bin_of == number for number in np.unique(bin_of)]
    return [(float(p[m].mean()), float(y[m].mean()), int(m.sum())) for m in members]


def _checked(y: ArrayLike, p: ArrayLike) -> tuple[Vector, Vector]:
    """y and p as float64 [n], or a ValueError that repeats none of their values."""
    y, p = _numbers(y), _numbers(p)
    if y.ndim != 1 or y.shape != p.shape:
        raise ValueError("Expected outcomes and probabilities as two lists of the same length.")
    if np.count_nonzero(y == 0) + np.count_nonzero(y == 1) < len(y):
        raise ValueError("Expected every outcome to be 0 or 1.")
    if np.count_nonzero((p >= 0) & (p <= 1)) < len(p):  # NaN is neither
        raise ValueError("Expected every probability to be a finite number from 0 to 1.")
    return y, p


def _numbers(values: ArrayLike) -> Vector:
    try:
        array = np.asarray(values)
    except ValueError:
        raise ValueError("Expected a plain list of numbers.") from None
    if array.dtype.kind not in "biuf":
        raise ValueError("Expected a plain list of numbers.")
    return array.astype(np.float64)


def _threshold_curve(y: Vector, p: Vector, weights: Matrix) -> tuple[Matrix, Matrix]:
    """(positives, patients) called positive: two of [b, 1 + distinct p], from no one to everyone."""
    order = np.argsort(-p, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(p[order])), len(p) - 1)  # the last patient of each run of equal p
    weights = np.take(weights, order, axis=1)
    return _sums_up_to(ends, weights * y[order]), _sums_up_to(ends, weights)


def _sums_up_to(ends: NDArray[np.int64], counts: Matrix) -> Matrix:
    sums = np.zeros((counts.shape[0], counts.shape[1] + 1))
    np.cumsum(counts, axis=1, out=sums[:, 1:])
    return np.take(sums, np.concatenate([[0], ends + 1]), axis=1)


def _classes_overlap(y: Vector, x: Vector, weights: Matrix) -> NDArray[np.bool_]:
    """Whether each row's classes overlap in x: just then a finite slope exists (Albert and Anderson 1984)."""

    def span(members: NDArray[np.bool_]) -> tuple[Vector, Vector]:
        drawn = weights[:, members] > 0
        low = np.where(drawn, x[members], np.inf).min(axis=1, initial=np.inf)
        high = np.where(drawn, x[members], -np.inf).max(axis=1, initial=-np.inf)
        return low, high

    low_positive, high_positive = span(y == 1)
    low_negative, high_negative = span(y == 0)
    return (high_negative > low_positive) & (high_positive > low_negative)


def _both_classes(y: Vector, weights: Matrix) -> NDArray[np.bool_]:
    return (weights @ y > 0) & (weights @ (1 - y) > 0)


def _ratio(top: Vector, bottom: Vector, where: NDArray[np.bool_]) -> Vector:
    """top / bottom, NaN where not asked for."""
    return np.divide(top, bottom, out=np.full_like(top, np.nan), where=where)
