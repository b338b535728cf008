"""Whether a new record is like those that a hospital trained with: its Mahalanobis distance from them.

Of a feature of many values (a picture, a series) four numbers stand for it: mean, spread, share of zeros, largest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cloister_shared.inputs import blocks, columns
from cloister_shared.schema import Schema

LEAST = 50
"""Training rows without which nothing is said."""
WIDE = 256
"""Columns beyond which four numbers stand for them too."""
QUANTILE = 0.99

Raw = NDArray[np.float32]


@dataclass(frozen=True)
class Usual:
    """Where training rows lie, and how far out the furthest hundredth of them begins."""

    schema: Schema
    centre: NDArray[np.float64]
    precision: NDArray[np.float64]
    limit: float

    def far(self, x: Raw) -> NDArray[np.bool_]:
        """Which rows [n, width], centred and scaled, lie further out than 99 in 100 training rows."""
        return _distances(_signs(x, self.schema), self.centre, self.precision) > self.limit


def usual(x: Raw, schema: Schema) -> Usual | None:
    """Of a hospital's training rows, centred and scaled; None if they are too few."""
    from sklearn.covariance import LedoitWolf

    if len(x) < LEAST:
        return None
    signs = _signs(x, schema)
    found = LedoitWolf().fit(signs)  # shrunk, so that it can be turned over whatever the number of columns
    centre, precision = np.asarray(found.location_), np.asarray(found.precision_)
    return Usual(schema, centre, precision, float(np.quantile(_distances(signs, centre, precision), QUANTILE)))


def _distances(signs: NDArray[np.float64], centre: NDArray[np.float64], precision: NDArray[np.float64]) -> Raw:
    away = signs - centre
    return np.einsum("ni,ij,nj->n", away, precision, away, optimize=True)


def _signs(x: Raw, schema: Schema) -> NDArray[np.float64]:
    single = len(columns(schema))
    parts = [x[:, :single] if single <= WIDE else _summary(x[:, :single])]
    parts += [_summary(x[:, block.start : block.start + block.size]) for block in blocks(schema)]
    return np.concatenate(parts, axis=1).astype(np.float64)


def _summary(part: Raw) -> Raw:
    return np.stack([part.mean(axis=1), part.std(axis=1), (part == 0).mean(axis=1), part.max(axis=1)], axis=1)
