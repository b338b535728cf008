"""ComBat at a hospital: its own effect on the number features, and the inputs without it.

Johnson, Li and Rabinovic 2007. The hospital's own mean and spread would couple its rows, so under DP they come from
the noisy moments that it released, and from nothing else of its rows. How much noise those have is known, and is
one more reason to believe in the features' common mean instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
import torch
from numpy.typing import NDArray

from cloister_client.dataset import Rows, normalised, with_inputs
from cloister_shared import combat, tally
from cloister_shared.combat import Constants
from cloister_shared.errors import TicketRefused
from cloister_shared.inputs import columns, numbers
from cloister_shared.plan import StudyPlan
from cloister_shared.schema import NumberFeature
from cloister_shared.tally import Numbers

Array = NDArray[np.float64]

_MOST = 4.0
"""With noise nobody is believed to add more than so many times the common spread, or to have more than so many times
that spread or less than that part of it."""


@dataclass(frozen=True)
class Effects:
    """What one hospital adds to each harmonised feature, and multiplies its spread by, in units of the common scale."""

    gamma: Array
    delta: Array


# --- rows to sums ------------------------------------------------------------------------------------------
def moments(rows: Rows, weights: Array, plan: StudyPlan) -> Array:
    """The sums that ``combat.names`` names: of values scaled to [-1, 1] on their windows, gaps left out."""
    features, at = combat.harmonised(plan), _places(plan)
    x = _covariates(rows, plan)
    y = np.stack([_scaled(rows, at[f.name], f) * ~_gap(rows, plan, f) for f in features], axis=1)
    counts = [weights @ ~_gap(rows, plan, features[i]) for i in combat.gaps(plan)]
    pairs = combinations_with_replacement(range(x.shape[1]), 2)
    products = [weights @ (x[:, i] * x[:, j]) for i, j in pairs]
    of_y = (weights @ y, weights @ y**2, weights @ x)
    return np.concatenate([[weights.sum()], counts, *of_y, products, ((x.T * weights) @ y).ravel()])


def sent(plan: StudyPlan, own: Numbers) -> Numbers:
    """What leaves the hospital of its ``own`` statistics: the moments about its own means, and histograms as they are.

    Added up over hospitals these are all that the common constants need.
    """
    centred = combat.centred(combat.read(plan, own), tally.harmony_noise(plan))
    return {**own, **combat.written(plan, centred)}


# --- sums to effects ---------------------------------------------------------------------------------------
def effects(plan: StudyPlan, own: Numbers, constants: Constants) -> Effects:
    """This hospital's gamma and delta, from its ``own`` moments and the constants that all share.

    Empirical Bayes over the features (Johnson et al. 2007, step 3): each effect is drawn to what the hospital's
    features have in common, the more the less is known of it. One feature alone is taken as it is measured.
    """
    noise, raw = tally.harmony_noise(plan), combat.read(plan, own)
    sums, count = combat.centred(raw, noise), np.maximum(raw.count, 2.0)
    half, scale, intercept, slopes = _on_the_windows(plan, constants)
    scale, intercept, slopes = scale / half, intercept / half, slopes / half
    mean = (raw.y - raw.x @ slopes) / count  # of what the covariates leave over
    left = sums.yy - 2 * (slopes * sums.xy).sum(axis=0) + ((sums.xx @ slopes) * slopes).sum(axis=0)
    gamma, delta = (mean - intercept) / scale, left / (count - 1) / scale**2
    # The variances of both that come of the noise on each sum, to first order; 0 without DP.
    steep, mean = (slopes**2).sum(axis=0), np.clip(mean, -1, 1)
    of_gamma = (noise / count / scale) ** 2 * (1 + steep + mean**2)
    squares = 1 + 4 * steep + steep**2 + 4 * mean**2 * (1 + steep) + mean**4
    of_delta = (noise / (count - 1) / scale**2) ** 2 * squares
    delta = np.clip(delta, _MOST**-2, _MOST**2) if noise else np.maximum(delta, 1e-12)
    if len(gamma) > 1:
        gamma, delta = _shrunk(gamma, delta, count, of_gamma, of_delta)
    if noise:
        gamma, delta = np.clip(gamma, -_MOST, _MOST), np.clip(delta, _MOST**-2, _MOST**2)
    return Effects(gamma, np.sqrt(delta))


def _shrunk(gamma: Array, delta: Array, count: Array, of_gamma: Array, of_delta: Array) -> tuple[Array, Array]:
    """Means and variances under priors that the features have in common: a normal and an inverse gamma.

    Without noise these are Johnson's equations. With it, a mean's sampling variance has the noise's beside it, and a
    variance counts as one of so many fewer rows as would be as uncertain.
    """
    others, usual = len(gamma) - 1, delta.mean()
    between, spread = _beyond(gamma.var(ddof=1), of_gamma, others), _beyond(delta.var(ddof=1), of_delta, others)
    centre = gamma.mean()
    if of_gamma.any():  # nobody's effect is 0 and 1 on average; as much of the means as may be noise is taken for that
        centre *= _beyond(centre**2, of_gamma / len(gamma), 1) / max(centre**2, 1e-300)
        usual = 1 + (usual - 1) * _beyond((usual - 1) ** 2, of_delta / len(gamma), 1) / max((usual - 1) ** 2, 1e-300)
    worth = count / (1 + of_delta * count / (2 * delta**2))
    found, squares = gamma, delta
    for _ in range(1000):
        sampled = squares / count + of_gamma
        means = (between * gamma + sampled * centre) / (between + sampled)
        apart = ((count - 1) * delta + count * np.maximum((gamma - means) ** 2 - of_gamma, 0.0)) / count
        if spread > 1e-12 * usual**2:
            shape, rate = 2 + usual**2 / spread, usual + usual**3 / spread
            after = (worth * apart / 2 + rate) / (worth / 2 + shape - 1)
        else:
            after = np.full_like(delta, usual)
        moved = max(np.abs(means - found).max(), np.abs(after - squares).max())
        found, squares = means, after
        if moved < 1e-12:
            break
    return found, squares


def _beyond(seen: float, noise: Array, free: int) -> float:
    """A variance without the noise's, of which two standard errors more than there should be are believed to be."""
    return max(0.0, seen - float(noise.mean()) * (1 + 2 * (2 / free) ** 0.5))


# --- rows without them -------------------------------------------------------------------------------------
def inputs(rows: Rows, plan: StudyPlan, constants: Constants, own: Effects | None) -> Rows:
    """The rows as the model takes them: centred and scaled, and without the hospital's own effects if it knows them.

    Each row's inputs follow from that row, the constants and the effects, so that they couple no rows.
    """
    centred = normalised(rows, columns(plan.table), constants)
    if own is None:
        return centred
    made = centred.x
    at, x = _places(plan), _covariates(rows, plan)
    _, scale, intercept, slopes = _on_the_windows(plan, constants)
    middles = np.array([sum(combat.window(feature)) / 2 for feature in combat.harmonised(plan)])
    centres = np.array([row[0] for row in _harmonised(plan, constants)]) - middles
    explained = intercept + x @ slopes
    for number, feature in enumerate(combat.harmonised(plan)):
        place, expected = at[feature.name], explained[:, number]
        left = (rows.x[:, place].double().numpy() - middles[number] - expected) / scale[number]
        value = (left - own.gamma[number]) / own.delta[number] + (expected - centres[number]) / scale[number]
        gap = torch.from_numpy(_gap(rows, plan, feature))
        made[:, place] = torch.where(gap, made[:, place], torch.from_numpy(value).float())
    return with_inputs(rows, made)


def checked(plan: StudyPlan, constants: Constants) -> Constants:
    """The constants of a ticket, if they can be used.

    Raises:
        TicketRefused: there are too many or too few, or one is not finite, or a scale is not above 0.
    """
    long = 3 + len(combat.covariates(plan)) if plan.harmonises and plan.keep else 2
    if len(constants) != len(numbers(plan.table)) or any(
        len(row) != long or not np.isfinite(row).all() or row[1] <= 0 for row in constants
    ):
        raise TicketRefused("The ticket's constants do not fit the plan's features.", mend="Correct the coordinator.")
    return constants


# --- small things ------------------------------------------------------------------------------------------
def _places(plan: StudyPlan) -> dict[str, int]:
    """Where among the inputs each number stands."""
    return {c.feature: i for i, c in enumerate(columns(plan.table)) if c.kind == "number" and not c.absent}


def _scaled(rows: Rows, place: int, feature: NumberFeature) -> Array:
    low, high = combat.window(feature)
    return np.clip((rows.x[:, place].double().numpy() - (low + high) / 2) / ((high - low) / 2), -1, 1)


def _covariates(rows: Rows, plan: StudyPlan) -> Array:
    """[rows, covariates]: numbers scaled to [-1, 1], yes/no and categories as 0 and 1."""
    everything, named = columns(plan.table), {feature.name: feature for feature in numbers(plan.table)}
    found = [
        _scaled(rows, everything.index(column), named[column.feature])
        if column.kind == "number"
        else rows.x[:, everything.index(column)].double().numpy()
        for column in combat.covariates(plan)
    ]
    return np.stack(found, axis=1) if found else np.zeros((len(rows), 0))


def _gap(rows: Rows, plan: StudyPlan, feature: NumberFeature) -> NDArray[np.bool_]:
    """In which rows the feature was not measured."""
    if feature.missing != "indicator":
        return np.zeros(len(rows), dtype=bool)
    at = next(i for i, c in enumerate(columns(plan.table)) if c.feature == feature.name and c.absent)
    return rows.x[:, at].numpy() > 0.5


def _harmonised(plan: StudyPlan, constants: Constants) -> Sequence[tuple[float, ...]]:
    kept = plan.keep
    return [row for row, feature in zip(constants, numbers(plan.table), strict=True) if feature.name not in kept]


def _on_the_windows(plan: StudyPlan, constants: Constants) -> tuple[Array, Array, Array, Array]:
    """Of each harmonised feature: half its window, scale, intercept from the middle, slopes [covariates, features]."""
    ranges = np.array([combat.window(feature) for feature in combat.harmonised(plan)])
    rows = np.array(_harmonised(plan, constants))
    intercept = rows[:, 2] if rows.shape[1] > 2 else rows[:, 0]
    return (ranges[:, 1] - ranges[:, 0]) / 2, rows[:, 1], intercept - ranges.mean(axis=1), rows[:, 3:].T
