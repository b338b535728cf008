"""What the coordinator learned, in numbers, beside what only the simulation knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cloister_server.readiness import Table, page
from cloister_server.statistics import Seen
from cloister_shared.budget import epsilon
from cloister_shared.charges import promise, readiness_event
from cloister_shared.outcomes.binary import METRICS
from cloister_shared.outcomes.outcome import outcome_of, title
from cloister_simulations import figures
from cloister_simulations.federation import Arm, Comparison, Result, plan_for
from cloister_simulations.guarantees import private_arms, statistics_cost


@dataclass(frozen=True)
class Judged:
    """A metric of the final model over all hospitals together, of one run of each private arm."""

    metric: str
    told: dict[Arm, float | None]
    """By noisy counts: all that the coordinator learned."""
    true: dict[Arm, float | None]
    """On the same held-out rows, without noise: known to the simulation alone."""


@dataclass(frozen=True)
class Cohort:
    """What histograms told of the cohort in one run."""

    arm: Arm
    features: dict[str, Seen]
    epsilon: float | None
    """What all statistics before round 1 cost together; None where they were exact."""


@dataclass(frozen=True)
class Readiness:
    """The table of one run, as ``cloister-coordinator study readiness`` shows it, and what it cost by itself."""

    arm: Arm
    page: str
    epsilon: float | None


def glimpse(comparison: Comparison) -> dict[str, Any] | None:
    """What the coordinator saw under the secure sum, of the last run without noise if there is one."""
    seen = [result for result in comparison.results if result.glimpse]
    shown = next((result for result in seen if result.arm.kind == "federated"), seen[0] if seen else None)
    if shown is None:
        return None
    learned = {name.removeprefix("final "): value for name, value in shown.learned.items() if "final" in name}
    plan = comparison.scenario.plan
    return {
        "arm": shown.arm,
        "site": shown.glimpse["site"],
        "drawn": figures.received_and_learned(shown.glimpse, plan.aggregation.bits),
        "noisy": bool(shown.arm.epsilon and plan.evaluation.epsilon_share),
        "told": learned.get(outcome_of(plan.table).headline),
        "rows": shown.learned.get("rows"),
        "clipped": max(result.clipped for result in seen),
    }


def judged(comparison: Comparison) -> list[Judged]:
    """Told and true, a row for each metric, of the first seed; nothing where metrics were exact."""
    if comparison.scenario.plan.evaluation.epsilon_share is None:
        return []
    first = _first(comparison)
    return [
        Judged(
            title(metric),
            {arm: result.learned.get(f"final {metric}") for arm, result in first.items()},
            {arm: result.overall[metric].value if metric in result.overall else None for arm, result in first.items()},
        )
        for metric in (METRICS if any(result.learned for result in first.values()) else ())
    ]


def cohort(comparison: Comparison) -> Cohort | None:
    """The cohort view of the private arm with the least epsilon, or of another if none was private."""
    known = [result for result in comparison.results if result.cohort]
    if not known:
        return None
    shown = min(known, key=lambda result: result.arm.epsilon or float("inf"))
    plan = private_arms(comparison).get(shown.arm)
    return Cohort(shown.arm, shown.cohort, statistics_cost(plan) if plan else None)


def readiness(comparison: Comparison) -> Readiness | None:
    """What the hospitals told of themselves, of the arm that ``cohort`` would show."""
    known = [result for result in comparison.results if result.readiness]
    if not known:
        return None
    shown = min(known, key=lambda result: result.arm.epsilon or float("inf"))
    plan = plan_for(comparison.scenario.plan, shown.arm, shown.seed)
    cost = epsilon([event], promise(plan)[1]) if (event := readiness_event(plan)) else None
    return Readiness(shown.arm, page(plan, Table(**shown.readiness)), cost)


def _first(comparison: Comparison) -> dict[Arm, Result]:
    """One run of each private arm."""
    found: dict[Arm, Result] = {}
    for result in comparison.results:
        if result.arm.epsilon:
            found.setdefault(result.arm, result)
    return found
