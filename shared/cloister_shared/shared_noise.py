"""Noise that hospitals share: each adds a part, and only the sum, which the secure sum alone shows, carries it all.

The mechanism is DP-FedSGD (McMahan et al. 2018) with distributed noise (Kairouz, Liu and Steinke 2021; DeCaPH, Fang et
al. 2024): every round releases ONE noisy sum of clipped gradients, a step of the model for all. It is not a proof for
several local steps with little noise each. What a patient is promised rests on hospitals that do not collude: a
``certificate`` says what is left if they do.

Noise multipliers are the noise's standard deviation over clip_norm, as everywhere. Pure functions, no I/O.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

from cloister_shared.budget import Event, epsilon
from cloister_shared.errors import BudgetExceeded

Events = tuple[Event, ...]

_MOST = 1000.0


@dataclass(frozen=True)
class Standing:
    """What a hospital's patients are promised against the coordinator and so many other hospitals."""

    who: str
    colluding: int
    noise: float
    """Of the accounted noise, the part that the colluders do not know: they can take their own away."""
    epsilon: float


@cache
def part(
    events: Events,
    delta: float,
    sites: int,
    colluding: int = 0,
    epsilon_alone: float | None = None,
    whole: Events = (),
) -> float:
    """What each hospital adds of the noise that ``events`` account for: 1 / √(sites - colluding), or more.

    ``events`` are everything that a plan releases, but ``whole``, whose noise each hospital adds alone. ``sites`` is
    the quorum: the fewest hospitals in a sum that is ever opened, since those that drop out take their noise with them.
    Any sites - colluding of them keep the promise of ``events`` against all others and the coordinator.
    ``epsilon_alone``, if given, is kept even against all other hospitals, by a hospital's own noise.

    Raises:
        BudgetExceeded: no noise keeps ``epsilon_alone``.
    """
    from scipy.optimize import brentq

    # A hair more than rounding can take from the sum of the parts.
    least = (1 + 1e-12) / math.sqrt(sites - colluding)
    if epsilon_alone is None or _scaled(events, delta, least, whole) <= epsilon_alone:
        return least
    if (drowned := _scaled(events, delta, _MOST, whole)) > epsilon_alone:
        raise BudgetExceeded(f"Epsilon {epsilon_alone:g} against all others cannot be kept: at best {drowned:.3g}.")
    found = float(brentq(lambda each: _scaled(events, delta, each, whole) - epsilon_alone, least, _MOST, rtol=1e-4))
    while _scaled(events, delta, found, whole) > epsilon_alone:
        found *= 1.0001
    return found


def certificate(
    events: Events, delta: float, each: float, sites: int, colluding: int = 0, whole: Events = ()
) -> tuple[Standing, ...]:
    """What is promised where each of ``sites`` hospitals adds ``each`` of the noise, a row for each company.

    Against the coordinator alone, with the ``colluding`` that the plan allows for, with a third of the hospitals (of
    the quorum, rounded up), and with all but one.
    """
    companies = {
        "the coordinator alone": 0,
        f"with {colluding} of the other hospitals, as the plan allows for": colluding,
        "with a third of the hospitals": min(-(-sites // 3), sites - 1),
        "with all other hospitals": sites - 1,
    }
    if not colluding:
        del companies[f"with {colluding} of the other hospitals, as the plan allows for"]
    found: list[Standing] = []
    for who, count in sorted(companies.items(), key=lambda company: company[1]):
        left = each * math.sqrt(sites - count)
        found.append(Standing(who, count, left, _scaled(events, delta, left, whole)))
    return tuple(found)


def _scaled(events: Events, delta: float, noise: float, whole: Events) -> float:
    """Epsilon where only so much of the noise is there, but of ``whole`` all of it."""
    shared = [replace(event, noise_multiplier=noise * event.noise_multiplier) for event in events]
    return epsilon([*shared, *whole], delta)


def rounding_inflation(clip_norm: float, scale: float, dimension: int) -> float:
    """By how much to multiply the noise because what it hides is rounded to integers first.

    A clipped sum of ``dimension`` values, times ``scale`` and rounded, changes by one patient by clip_norm * scale
    and at most half an integer more per value, before and after: scale * clip_norm + √dimension in ℓ². Over
    scale * clip_norm that is the factor, 1.00006 at 1 million values, clip_norm 1 and 24 bits.
    """
    return 1.0 + math.sqrt(dimension) / (scale * clip_norm)
