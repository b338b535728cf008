"""Gradient-boosted trees over hospitals, for comparison: each sends sums of gradients by bin, and no row.

The trees are those of Chen and Guestrin 2016 by histograms. Sums over all hospitals are sums over all rows, so that
the federated trees are the pooled ones. The sums are exact: there is NO differential privacy here, and a bin that few
patients are in tells of them. What the zoo trains under privacy is therefore another model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Whole = NDArray[np.int64]

FINE = 256
"""Equal parts between a column's least and largest value, whose counts say where the bins should end."""


@dataclass(frozen=True)
class Terms:
    """Of the trees."""

    trees: int = 120
    depth: int = 4
    learning_rate: float = 0.1
    bins: int = 32
    penalty: float = 5.0
    """Added to each leaf's sum of second derivatives."""
    least: float = 20.0
    """That sum in a leaf."""


@dataclass
class Hospital:
    """What stays at one hospital: rows, outcomes, and what the trees say so far."""

    x: NDArray[np.float32]
    y: Vector

    def extent(self) -> tuple[Vector, Vector]:
        """Least and largest value of each column, negative ones first: what the fine parts lie between."""
        return self.x.min(axis=0).astype(np.float64), self.x.max(axis=0).astype(np.float64)

    def counts(self, low: Vector, high: Vector) -> Whole:
        """How many rows lie in each fine part of each column, [columns, FINE]."""
        at = np.clip((self.x - low) / np.maximum(high - low, 1e-12) * FINE, 0, FINE - 1).astype(np.int64)
        return np.stack([np.bincount(column, minlength=FINE) for column in at.T])

    def begin(self, edges: Sequence[Vector], score: float) -> None:
        """Bin the rows; every row has the score that all begin with."""
        self.bins = np.stack([np.searchsorted(own, column) for own, column in zip(edges, self.x.T, strict=True)])
        self.score = np.full(len(self.y), score)

    def grow(self) -> None:
        """A new tree: all rows at its root, and the loss's derivatives by the score."""
        chance = 1 / (1 + np.exp(-self.score))
        self.slope, self.bend, self.leaf = chance - self.y, chance * (1 - chance), np.zeros(len(self.y), np.int64)

    def sums(self, leaves: int, bins: int) -> Vector:
        """Sums of both derivatives, [2, columns, leaves, bins]: all that leaves this hospital while a tree grows."""
        made = [
            [
                np.bincount(self.leaf * bins + column, weights=own, minlength=leaves * bins).reshape(leaves, bins)
                for column in self.bins
            ]
            for own in (self.slope, self.bend)
        ]
        return np.asarray(made, dtype=np.float64)

    def split(self, column: Whole, at: Whole) -> None:
        """Rows of leaf k go to 2k, or to 2k + 1 if their bin of column[k] is above at[k]."""
        own = self.bins[column[self.leaf], np.arange(len(self.y))]
        self.leaf = 2 * self.leaf + (own > at[self.leaf])

    def add(self, values: Vector) -> None:
        """The finished tree's say."""
        self.score = self.score + values[self.leaf]


def boosted(hospitals: Sequence[Hospital], watching: Sequence[Hospital], terms: Terms) -> None:
    """Grow trees over all hospitals; ``watching`` (held-out rows) follow every tree and have no part in one."""
    extents = [hospital.extent() for hospital in hospitals]
    low, high = np.min([least for least, _ in extents], axis=0), np.max([most for _, most in extents], axis=0)
    counts = np.sum([hospital.counts(low, high) for hospital in hospitals], axis=0)
    edges = [_edges(*of, terms.bins) for of in zip(counts, low, high, strict=True)]
    ill = sum(float(hospital.y.sum()) for hospital in hospitals) / sum(len(hospital.y) for hospital in hospitals)
    everyone = [*hospitals, *watching]
    for hospital in everyone:
        hospital.begin(edges, float(np.log(ill / (1 - ill))))
    for _ in range(terms.trees):
        for hospital in everyone:
            hospital.grow()
        for depth in range(terms.depth):
            total = np.sum([hospital.sums(2**depth, terms.bins) for hospital in hospitals], axis=0)
            column, at = _best(total, terms)
            for hospital in everyone:
                hospital.split(column, at)
        leaves = 2**terms.depth
        slope, bend = np.sum([_by_leaf(hospital, leaves) for hospital in hospitals], axis=0)
        for hospital in everyone:
            hospital.add(-terms.learning_rate * slope / (bend + terms.penalty))


def _edges(counts: Whole, low: float, high: float, bins: int) -> Vector:
    """Up to bins - 1 edges with about equally many rows between them, at the ends of fine parts."""
    share = np.cumsum(counts) / counts.sum()
    ends = np.unique(np.searchsorted(share, np.arange(1, bins) / bins) + 1)
    return low + (high - low) * ends[ends < FINE] / FINE


def _best(total: Vector, terms: Terms) -> tuple[Whole, Whole]:
    """For each leaf the column and the bin after which it is split; after the last bin where no split gains."""
    slope, bend = np.cumsum(total, axis=3)
    every = slope[:, :, -1:], bend[:, :, -1:]

    def worth(g: Vector, h: Vector) -> Vector:
        return np.square(g) / (h + terms.penalty)

    gain = worth(slope, bend) + worth(every[0] - slope, every[1] - bend) - worth(*every)
    gain = np.where((bend >= terms.least) & (every[1] - bend >= terms.least), gain, 0.0)
    columns, leaves, bins = gain.shape
    flat = gain.transpose(1, 0, 2).reshape(leaves, columns * bins)
    best = flat.argmax(axis=1)
    found = flat[np.arange(leaves), best] > 1e-9
    return np.where(found, best // bins, 0), np.where(found, best % bins, bins - 1)


def _by_leaf(hospital: Hospital, leaves: int) -> Vector:
    sums = [np.bincount(hospital.leaf, own, leaves) for own in (hospital.slope, hospital.bend)]
    return np.asarray(sums, dtype=np.float64)
