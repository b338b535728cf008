"""What stands behind an arm's epsilon, in numbers: who must collude, and what counting by record would have hidden."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from cloister_shared import budget
from cloister_shared.budget import Event
from cloister_shared.charges import certificate, charges, promise, statistics_event
from cloister_shared.plan import StudyPlan
from cloister_shared.shared_noise import Standing
from cloister_simulations.federation import Arm, Comparison, plan_for
from cloister_simulations.findings import by_arm, seeds_of

_CAP, _HOPELESS, _POINTS = 64, 100.0, 400


@dataclass(frozen=True)
class ByRecords:
    """Epsilon of one patient, by how many records, if each record is drawn and clipped on its own."""

    arm: Arm
    promised: float
    """The plan's epsilon, for its own unit."""
    whole: bool
    """Whether the plan's unit is the patient, so that its epsilon does not depend on the records."""
    most: int
    """The most records that a patient of these hospitals has, at most 64. Only the hospitals know it."""
    found: dict[int, float | None]
    """Records to epsilon by privacy loss distributions, rounded up; None where it is over 100."""


def private_arms(comparison: Comparison) -> dict[Arm, StudyPlan]:
    """The arms with differential privacy that were run, and the plan of each with the first seed."""
    plan, seed = comparison.scenario.plan, seeds_of(comparison)[0]
    return {arm: plan_for(plan, arm, seed) for arm in by_arm(comparison) if arm.epsilon}


def by_records(comparison: Comparison) -> ByRecords | None:
    """For the arm with the least epsilon, at the hospital that draws the most often; None for site-level DP or none."""
    plans = private_arms(comparison)
    unit = comparison.scenario.plan.privacy.unit
    if not plans or unit not in ("patient", "record"):
        return None
    arm = min(plans, key=lambda arm: arm.epsilon or 0.0)
    key = "training patients" if unit == "patient" else "train"
    epsilon, delta = promise(plans[arm])
    events = charges(plans[arm], min(counts[key] for counts in comparison.rows.values()))
    most = min(_CAP, max(counts["most records"] for counts in comparison.rows.values()))
    told = sorted({1, 2, 4, 8, most})
    found = dict(_priced(events, delta, told))
    return ByRecords(arm, epsilon, unit == "patient", most, {records: found.get(records) for records in told})


def _priced(events: tuple[Event, ...], delta: float, told: list[int]) -> Iterator[tuple[int, float]]:
    """From few records to many, until there is nothing left to promise: past that the figures are slow to find."""
    for records in sorted({*told, *(n for n in (16, 32) if n < told[-1])}):
        found = _of_patient(events, delta, records)
        if found > _HOPELESS:
            return
        yield records, found


@cache
def _of_patient(events: tuple[Event, ...], delta: float, records: int) -> float:
    """As ``pld_epsilon``, as coarse as leaves some hundred points of what a step can tell: a few per cent too high."""
    per_record = [replace(event, records=records) for event in events]
    longest = max(records / event.noise_multiplier for event in events)
    return budget.pld_epsilon(per_record, delta, max(1e-3, (longest**2 / 2 + 10 * longest) / _POINTS))


def certificates(comparison: Comparison) -> dict[Arm, tuple[Standing, ...]]:
    """Of each private arm that shares its noise: what is promised against whom."""
    return {arm: rows for arm, plan in private_arms(comparison).items() if (rows := certificate(plan))}


def statistics_cost(plan: StudyPlan) -> float | None:
    """Epsilon of the sums and counts before round 1 by themselves, as a ledger counts them."""
    event = statistics_event(plan)
    return budget.epsilon([event], promise(plan)[1]) if event else None
