"""How good a model's answers are, and how sure we are of it, whatever the kind of outcome.

A metric is a pure function of three arrays:

    y        float [n, ...]  what each patient's outcome was
    p        float [n, ...]  what the model said
    weights  float [b, n]    how often each patient counts, one row for each resample; no row is all zero

and answers float [b], one value a row, NaN where that row cannot say. The point estimate is the case of one
row of ones. The bootstrap draws its rows once and gives the same rows to every metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
Array = NDArray[np.float64]
Metric = Callable[[Array, Array, Matrix], Vector]

CELLS = 200_000  # resample counts drawn at a time: 1.6 MB an array, 10 MB at the peak


@dataclass(frozen=True)
class Estimate:
    """One metric on `n` patients with its bootstrap interval. None where the data cannot say."""

    value: float | None
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        if self.value is None:
            return "not estimable"
        if self.low is None or self.high is None:
            return f"{self.value:.3f} (interval not estimable)"
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def judge(
    metrics: Mapping[str, Metric],
    y: Array,
    p: Array,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int | np.random.Generator = 0,
) -> dict[str, Estimate]:
    """Every metric with its percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13).

    level: coverage of the interval. The answer depends on the seed, and not on the order of the patients. Resamples
    that cannot say are left out of the interval. Raises ValueError for arguments outside these terms.
    """
    if not 0 < level < 1:
        raise ValueError("Expected a level between 0 and 1.")
    if resamples < 1:
        raise ValueError("Expected at least one resample.")
    n = len(y)
    if n == 0:
        return {name: Estimate(None, None, None, 0) for name in metrics}
    order = _order(y, p)
    y, p = y[order], p[order]
    points = {name: metric(y, p, np.ones((1, n))) for name, metric in metrics.items()}
    draws: dict[str, list[Vector]] = {name: [] for name in metrics}
    for weights in resample_counts(n, resamples, np.random.default_rng(seed)):
        for name, metric in metrics.items():
            draws[name].append(metric(y, p, weights))
    return {name: _estimate(points[name][0], np.concatenate(draws[name]), level, n) for name in metrics}


def mean_of(score: Callable[[Array, Array], Vector]) -> Metric:
    """The mean over patients of a score that each has alone; patients whose score is NaN do not count."""

    def metric(y: Array, p: Array, weights: Matrix) -> Vector:
        each = score(y, p)
        known = ~np.isnan(each)
        return ratio(weights @ np.where(known, each, 0.0), weights @ known.astype(np.float64))

    return metric


def ratio(top: Vector, bottom: Vector) -> Vector:
    """top / bottom, NaN where bottom is 0."""
    return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)


def resample_counts(n: int, resamples: int, generator: np.random.Generator) -> Iterator[Matrix]:
    """Bootstrap counts [b, n] in blocks of bounded memory: n draws with replacement from n patients a row."""
    even = np.full(n, 1 / n)
    block = max(1, CELLS // n)
    for start in range(0, resamples, block):
        yield generator.multinomial(n, even, size=min(block, resamples - start)).astype(np.float64)


def _order(y: Array, p: Array) -> NDArray[np.int64]:
    """Patients in an order that depends on what is known of them alone: first by what was said, from the highest."""
    keys = np.concatenate([y.reshape(len(y), -1)[:, ::-1], -p.reshape(len(p), -1)[:, ::-1]], axis=1)
    return np.lexsort(tuple(keys.T))


def _estimate(point: float, draws: Vector, level: float, n: int) -> Estimate:
    draws = draws[~np.isnan(draws)]
    if np.isnan(point):
        return Estimate(None, None, None, n)
    if len(draws) == 0:
        return Estimate(float(point), None, None, n)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(point), float(low), float(high), n)
