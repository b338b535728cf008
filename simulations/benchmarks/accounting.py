"""Epsilon by our budget and by dp-accounting's public interface, over a table of histories."""

from __future__ import annotations

import itertools

import dp_accounting
from dp_accounting import rdp
from figures import Figure, at_most, progress

from cloister_shared.budget import Event, epsilon

NOISE, RATES, STEPS, DELTAS = (0.6, 1.0, 1.7, 4.0, 20.0), (0.001, 0.02, 0.2, 1.0), (1, 40, 1000), (1e-5, 1e-3)
STATISTICS = Event(noise_multiplier=8.0, sample_rate=1.0, steps=1, purpose="statistics")


def figures() -> list[Figure]:
    table = list(itertools.product(NOISE, RATES, STEPS, DELTAS))
    progress(f"epsilon: {2 * len(table)} histories, ours and dp-accounting")
    worst = 0.0
    for noise, rate, steps, delta in table:
        training = Event(noise, rate, steps)
        for history in ([training], [STATISTICS, training]):
            worst = max(worst, abs(epsilon(history, delta) - theirs(history, delta)))
    return [at_most("epsilon.from-dp-accounting", worst, 1e-3, f"{{:.1e}} apart in {2 * len(table)}")]


def theirs(history: list[Event], delta: float) -> float:
    """A fresh accountant that composes the whole history and answers itself."""
    accountant = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event in history:
        step = dp_accounting.PoissonSampledDpEvent(
            event.sample_rate, dp_accounting.GaussianDpEvent(event.noise_multiplier)
        )
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, event.steps))
    return accountant.get_epsilon(delta)
