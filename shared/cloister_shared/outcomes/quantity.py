"""A measured quantity: y and p float [n], both in the plan's unit."""

from __future__ import annotations

import numpy as np

from cloister_shared.outcomes.judging import Array, Matrix, Metric, Vector, mean_of, ratio


def rmse(y: Array, p: Array, weights: Matrix) -> Vector:
    """Root of the mean squared error."""
    return np.sqrt(weights @ np.square(p - y) / weights.sum(axis=1))


def r_squared(y: Array, p: Array, weights: Matrix) -> Vector:
    """The share of the variance that is explained: 1 is best, 0 is what the mean alone would do."""
    total = weights.sum(axis=1)
    mean = weights @ y / total
    spread = weights @ np.square(y) - total * np.square(mean)
    return 1 - ratio(weights @ np.square(p - y), np.where(spread > 1e-12, spread, 0.0))


def spearman(y: Array, p: Array, weights: Matrix) -> Vector:
    """Correlation of the ranks, which are those of all patients, ties in the middle."""
    from scipy.stats import rankdata

    a, b = (np.asarray(rankdata(values)) for values in (y, p))
    total = weights.sum(axis=1)
    means = [weights @ values / total for values in (a, b)]
    both = weights @ (a * b) / total - means[0] * means[1]
    spreads = [weights @ values**2 / total - mean**2 for values, mean in zip((a, b), means, strict=True)]
    product = np.maximum(spreads[0], 0) * np.maximum(spreads[1], 0)
    return ratio(both, np.sqrt(product))


def _miss(y: Array, p: Array) -> Vector:
    return np.abs(p - y)


METRICS: dict[str, Metric] = {"rmse": rmse, "mae": mean_of(_miss), "r_squared": r_squared, "spearman": spearman}


def enough(y: Array, least: int) -> bool:
    """Whether a metric is of so many patients that it tells of no single one."""
    return len(y) >= 2 * least
