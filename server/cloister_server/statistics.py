"""What the coordinator makes of the hospitals' noisy sums and counts. Post-processing: it costs no epsilon."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from cloister_server.combat import pooled
from cloister_shared import combat, tally
from cloister_shared.combat import Constants
from cloister_shared.inputs import numbers, vectors
from cloister_shared.outcomes.binary import of_counts
from cloister_shared.plan import StudyPlan


class Seen(TypedDict):
    """One feature of the whole cohort: how many patients in each cell, and of a number its quartiles."""

    cells: dict[str, float]
    quartiles: list[float]


def constants(plan: StudyPlan, said: Mapping[str, float | None]) -> Constants | None:
    """Centre and scale of each number feature, if the plan takes them from sums over the hospitals."""
    if not plan.normalises:
        return None
    if plan.harmonises:
        return pooled(plan, combat.read(plan, said))
    features = numbers(plan.table)
    total = np.array([said[name] or 0.0 for name in tally.statistics(plan)[: 3 * len(features)]])
    count, sums, squares = total.reshape(3, len(features))
    for span in vectors(plan.table):
        sums[span], squares[span] = (_shrunk(values[span], count[span].var()) for values in (sums, squares))
        count[span] = count[span].mean()
    ranges = np.array([feature.range for feature in features])
    middle, half = ranges.mean(axis=1), (ranges[:, 1] - ranges[:, 0]) / 2
    count = np.maximum(count, 1.0)
    mean = np.clip(sums / count, -1, 1)
    # Noise may push the variance below zero; a twentieth of the range is the least spread that is believed.
    sd = np.sqrt(np.clip(squares / count - mean**2, 0.05**2, 1.0))
    return tuple((float(m), float(s)) for m, s in zip(middle + half * mean, half * sd, strict=True))


def _shrunk(values: NDArray[np.float64], noise: float) -> NDArray[np.float64]:
    """Drawn to their mean by as much of their variance as is noise's (James and Stein 1961).

    A vector has no gaps, so its counts are all one number, and what they differ by is the noise, which sums and
    squares have too: of a thousand genes and a hundred patients, noise is most of each gene's sum, and little of
    their mean. Without noise nothing is changed.
    """
    spread = float(values.var())
    return values.mean() + max(0.0, 1 - noise / spread) * (values - values.mean()) if spread else values


def cohort_view(plan: StudyPlan, said: Mapping[str, float | None]) -> dict[str, Seen]:
    """The histograms, by feature."""
    ranges = {feature.name: feature.range for feature in numbers(plan.table)}
    found: dict[str, Seen] = {}
    for what, cells in tally.histograms(plan).items():
        counts = _without_negatives(np.array([said.get(tally.cell(what, cell)) or 0.0 for cell in cells]))
        names, quartiles = cells, list[float]()
        if what in ranges:
            edges = np.linspace(*ranges[what], len(cells) + 1)
            names = tuple(f"{low:g} to {high:g}" for low, high in pairwise(edges))
            quartiles = _quantiles(counts, edges, (0.25, 0.5, 0.75))
        found[what] = {"cells": dict(zip(names, counts.round(1).tolist(), strict=True)), "quartiles": quartiles}
    return found


def _without_negatives(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest counts that are not negative and have the same sum (Duchi et al. 2008): noise knows no zero.

    Cutting negative counts off instead would add patients where there are next to none.
    """
    total = max(float(counts.sum()), 0.0)
    ranked = np.sort(counts)[::-1]
    excess = (np.cumsum(ranked) - total) / np.arange(1, len(counts) + 1)
    return np.maximum(counts - excess[np.flatnonzero(ranked > excess)[-1]], 0.0) if total else np.zeros_like(counts)


def _quantiles(counts: NDArray[np.float64], edges: NDArray[np.float64], at: tuple[float, ...]) -> list[float]:
    """Where a histogram reaches a share of its whole, straight within a bin; nothing of an empty one."""
    whole = np.concatenate([[0.0], np.cumsum(counts)])
    return [float(np.interp(share * whole[-1], whole, edges)) for share in at] if whole[-1] > 0 else []


def judged(plan: StudyPlan, said: Mapping[str, float | None]) -> dict[str, float | None]:
    """Metrics of the final model from counts of held-out risks over all hospitals together."""
    counts = _without_negatives(np.array([said.get(name) or 0.0 for name in tally.risks()]))
    found = of_counts(*counts.reshape(2, -1), threshold=plan.evaluation.threshold)
    return {f"final {name}": value for name, value in found.items()}
