"""What a hospital says of its rows as sums and counts: for normalisation, of the cohort, and of a model's risks.

Each is one release with noise on a grid that the secure sum adds up exactly; readiness alone is in no sum. With unit
patient a patient counts as one, shared among their rows, however many these are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cloister_client.combat import moments
from cloister_client.coverage import Coverage
from cloister_client.dataset import Rows
from cloister_shared import combat, noise, readiness, tally
from cloister_shared.budget import Event
from cloister_shared.charges import part_of, readiness_event, statistics_event
from cloister_shared.inputs import columns, numbers
from cloister_shared.noise import Entropy
from cloister_shared.outcomes.outcome import cells
from cloister_shared.plan import StudyPlan
from cloister_shared.tally import Numbers

Vector = NDArray[np.float64]

_GRID = 2.0**-20
"""What noisy sums are whole multiples of; the secure sum holds 2^-24."""


def noisy_statistics(rows: Rows, plan: StudyPlan, entropy: Entropy) -> Numbers:
    """Everything of ``tally.statistics``, by name: sums for normalisation, and the cohort's histograms.

    ``rows`` are not centred or scaled yet. For ``combat`` these are the hospital's own moments, under all of the noise
    even where hospitals share theirs, since the hospital uses them too; what it sends is made of them.
    """
    weights = weights_of(rows.patients, plan)
    parts = list[tuple[Vector, float]]()
    if plan.harmonises:
        parts.append((moments(rows, weights, plan), combat.sensitivity(plan) ** 2))
    elif plan.normalises:
        parts.append((_sums(rows, weights, plan), 3 * len(numbers(plan.table))))
    if plan.statistics.histograms:
        parts.append((_histograms(rows, weights, plan), len(tally.histograms(plan))))
    exact, most = np.concatenate([sums for sums, _ in parts]), sum(squared for _, squared in parts)
    if event := statistics_event(plan):
        multiplier = event.noise_multiplier if plan.harmonises else part_of(plan, event)
        exact = with_noise(exact, most**0.5, multiplier, entropy)
    return dict(zip(tally.statistics(plan), exact.tolist(), strict=True))


def noisy_readiness(seen: Coverage, plan: StudyPlan, entropy: Entropy) -> Numbers:
    """The numbers of ``readiness.names``: with DP under this hospital's own noise alone, else small ones withheld."""
    weights, event = weights_of(seen.patients, plan), readiness_event(plan)
    units, yes = weights.sum(), weights @ seen.answers
    if event is None:
        return readiness.told(plan, dict(zip(readiness.names(plan), [float(units), *yes.tolist()], strict=True)))
    exact = np.concatenate([[units], yes - units / 2])
    # Not part_of: where training shares its noise, nobody else's is on this.
    noisy = with_noise(exact, readiness.sensitivity(plan), event.noise_multiplier, entropy)
    return dict(zip(readiness.names(plan), [float(noisy[0]), *(noisy[1:] + noisy[0] / 2).tolist()], strict=True))


def noisy_risks(rows: Rows, risks: Vector, plan: StudyPlan, event: Event, entropy: Entropy) -> Numbers:
    """How many held-out patients of either outcome have which risk: all that ``tally.risks`` names."""
    weights, outcome = weights_of(rows.patients, plan), rows.y.numpy()
    edges = np.linspace(0, 1, tally.RISK_BINS + 1)
    exact = np.concatenate([np.histogram(risks[outcome == y], edges, weights=weights[outcome == y])[0] for y in (1, 0)])
    return dict(zip(tally.risks(), with_noise(exact, 1.0, part_of(plan, event), entropy).tolist(), strict=True))


def _sums(rows: Rows, weights: Vector, plan: StudyPlan) -> Vector:
    """Per number feature: counts, then sums, then sums of squares of values scaled to [-1, 1] by the plan's range.

    One unit changes each of the 3 * features by 1 at most.
    """
    at = [i for i, column in enumerate(columns(plan.table)) if column.kind == "number" and not column.absent]
    low, high = np.array([feature.range for feature in numbers(plan.table)]).T
    values = np.clip((rows.x[:, at].double().numpy() - (low + high) / 2) / ((high - low) / 2), -1, 1)
    return np.concatenate([np.full(len(at), weights.sum()), weights @ values, weights @ values**2])


def _histograms(rows: Rows, weights: Vector, plan: StudyPlan) -> Vector:
    """The cells of ``tally.histograms``, in order. Of each feature a unit fills cells that sum to 1."""
    everything, ranges = columns(plan.table), {feature.name: feature.range for feature in numbers(plan.table)}
    x = rows.x[:, : len(everything)].double().numpy()
    bins, found = plan.statistics.histograms or 0, list[Vector]()
    for values, column in zip(x.T, everything, strict=True):
        if column.kind == "number" and not column.absent:
            low, high = ranges[column.feature]
            found.append(np.histogram(np.clip(values, low, high), bins, (low, high), weights=weights)[0])
        elif column.kind == "category" and not column.absent:
            found.append(np.array([weights @ values]))
        else:
            found.append(np.array([weights @ (1 - values), weights @ values]))
    for number in range(len(cells(plan.table.target))):
        found.append(np.array([weights @ (rows.y.numpy() == number)]))
    return np.concatenate(found)


def with_noise(exact: Vector, sensitivity: float, noise_multiplier: float, entropy: Entropy) -> Vector:
    """``exact`` on the grid, with discrete Gaussian noise for an ℓ² ``sensitivity``."""
    # Rounding to the grid moves each number by half a step at either of two neighbours.
    spread = noise_multiplier * (sensitivity / _GRID + exact.size**0.5)
    steps = np.rint(exact / _GRID) + noise.discrete_gaussian(entropy, spread, exact.size)
    return np.asarray(steps * _GRID, dtype=np.float64)


def weights_of(patients: NDArray[np.int64], plan: StudyPlan) -> Vector:
    """Of rows with these patients: 1 a row, or 1 a patient, shared among the patient's rows."""
    weights = np.ones(len(patients))
    if plan.privacy.unit == "patient":
        _, whose, counts = np.unique(patients, return_inverse=True, return_counts=True)
        weights /= counts[whose]
    return weights
