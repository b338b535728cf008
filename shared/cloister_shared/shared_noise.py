"""Noise that hospitals share: each adds a part, and only the sum, which the secure sum alone shows, carries it all.

The mechanism is DP-FedSGD (McMahan et al. 2018) with distributed noise (Kairouz, Liu and Steinke 2021; DeCaPH, Fang et
al. 2024): every round releases ONE noisy sum of clipped gradients, a step of the model for all. It is not a proof for
several local steps with little noise each. What a patient is promised rests on hospitals that do not collude: a
``certificate`` says what is left if they do.

Noise multipliers are the noise's standard deviation over clip_norm, as everywhere. Pure functions, no I/O.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cloister_shared.budget import Event, calibrate, epsilon
from cloister_shared.errors import PlanRefused


@dataclass(frozen=True)
class Standing:
    """What a hospital's patients are promised against the coordinator and so many other hospitals."""

    who: str
    colluding: int
    noise_multiplier: float
    """Of the noise that the colluders do not know: they can take their own away."""
    epsilon: float


def share(
    target: float,
    delta: float,
    sample_rate: float,
    rounds: int,
    sites: int,
    colluding: int = 0,
    epsilon_alone: float | None = None,
    before: tuple[Event, ...] = (),
) -> float:
    """The noise multiplier that each hospital adds: the central one over √(sites - colluding), or more.

    ``sites`` is the quorum: the fewest hospitals in a sum that is ever opened, since those that drop out take their
    noise with them. Any sites - colluding of them keep epsilon at ``target`` against all others and the coordinator.
    ``epsilon_alone``, if given, is kept even against all other hospitals, by a hospital's own noise.
    ``before`` is what each hospital released earlier with noise of its own; it counts towards both.

    Raises:
        PlanRefused: nobody would be left who does not collude.
        BudgetExceeded: no noise keeps an epsilon.
    """
    _require_some_left(sites, colluding)
    central = calibrate(sample_rate, rounds, target, delta, before)
    alone = 0.0 if epsilon_alone is None else calibrate(sample_rate, rounds, epsilon_alone, delta, before)
    # A hair more than what rounding can take from the product in ``remaining``.
    return max(central / math.sqrt(sites - colluding) * (1 + 1e-12), alone)


def remaining(each: float, sites: int, colluding: int) -> float:
    """The noise multiplier of the sum, where each of ``sites`` adds ``each`` and the colluding know theirs."""
    return each * math.sqrt(sites - colluding)


def certificate(
    each: float,
    delta: float,
    sample_rate: float,
    rounds: int,
    sites: int,
    colluding: int = 0,
    before: tuple[Event, ...] = (),
) -> tuple[Standing, ...]:
    """What the patients of a hospital are promised where each hospital adds noise of ``each``; see ``share``.

    Rows by the number that colludes: the coordinator alone, with the ``colluding`` that the plan allows for, with a
    third of the hospitals (of the quorum, rounded up), with all other hospitals.

    Raises:
        PlanRefused: nobody would be left who does not collude.
    """
    _require_some_left(sites, colluding)
    companies = [(0, "the coordinator alone")]
    if colluding:
        companies.append((colluding, "with as many hospitals as the plan allows for"))
    if sites > 2:
        companies.append((-(-sites // 3), "with a third of the hospitals"))
    if sites > 1:
        companies.append((sites - 1, "with all other hospitals"))
    rows: list[Standing] = []
    for count, who in sorted(companies):
        left = remaining(each, sites, count)
        rows.append(Standing(who, count, left, epsilon([*before, Event(left, sample_rate, rounds)], delta)))
    return tuple(rows)


def _require_some_left(sites: int, colluding: int) -> None:
    if not 0 <= colluding < sites:
        raise PlanRefused(
            f"If {colluding} of {sites} hospitals collude, no other is there to add noise.",
            mend="Let fewer collude, or raise cohort.min_sites.",
        )


def rounding_inflation(clip_norm: float, scale: float, dimension: int) -> float:
    """By how much to multiply the noise because what it hides is rounded to integers first.

    A clipped sum of ``dimension`` values, times ``scale`` and rounded, changes by one patient by clip_norm * scale
    and at most half an integer more per value, before and after: scale * clip_norm + √dimension in ℓ². Over
    scale * clip_norm that is the factor, 1.00006 at 1 million values, clip_norm 1 and 24 bits.
    """
    return 1.0 + math.sqrt(dimension) / (scale * clip_norm)
