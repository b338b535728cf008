"""What a plan releases of a hospital and what each release costs: from the plan's promise to events of the accountant.

Both sides find the same events in the plan, so that what is charged, what is added and what is shown agree.
"""

from __future__ import annotations

from dataclasses import replace

from cloister_shared import shared_noise
from cloister_shared.budget import Event, calibrate
from cloister_shared.errors import PlanRefused
from cloister_shared.plan import StudyPlan
from cloister_shared.shared_noise import Standing


def promise(plan: StudyPlan) -> tuple[float, float]:
    """Epsilon and delta of a plan that has them.

    Raises:
        PlanRefused: it has none.
    """
    terms = plan.privacy
    if terms.epsilon is None or terms.delta is None:
        raise PlanRefused("Differential privacy needs epsilon and delta.", mend="Add them under privacy.")
    return terms.epsilon, terms.delta


def training_event(plan: StudyPlan, units: int) -> Event:
    """What one round costs a hospital with so many units to train on, beside what else it releases.

    Raises:
        BudgetExceeded: no noise keeps the whole run within the plan's epsilon.
    """
    epsilon, delta = promise(plan)
    asked = (readiness_event(plan), statistics_event(plan), evaluation_event(plan))
    before = tuple(event for event in asked if event)
    if plan.privacy.unit == "site":  # one release a round, of the whole update
        return Event(calibrate(1.0, plan.rounds, epsilon, delta, before), 1.0, 1)
    rate = plan.training.sample_rate or min(1.0, plan.training.batch_size / units)
    steps = plan.training.local_steps
    return Event(calibrate(rate, plan.rounds * steps, epsilon, delta, before), rate, steps)


def statistics_event(plan: StudyPlan) -> Event | None:
    """What the sums and counts before round 1 cost, or None if there are none, or no DP.

    They may use ``statistics.epsilon_share`` of epsilon on their own.
    """
    if not plan.private or not plan.asks_statistics:
        return None
    return _alone(plan, plan.statistics.epsilon_share or 0.1, "statistics")


def readiness_event(plan: StudyPlan) -> Event | None:
    """What a hospital's own counts before training cost, or None if there are none, or no DP."""
    return _alone(plan, plan.readiness.share, "readiness") if plan.private and plan.readiness else None


def evaluation_event(plan: StudyPlan) -> Event | None:
    """What the counts of held-out risks at the end cost, or None if metrics are exact and outside epsilon."""
    return _alone(plan, share, "evaluation") if (share := plan.evaluation.epsilon_share) else None


def _alone(plan: StudyPlan, share: float, purpose: str) -> Event:
    epsilon, delta = promise(plan)
    return Event(calibrate(1.0, 1, epsilon * share, delta), 1.0, 1, purpose=purpose)


def charges(plan: StudyPlan, units: int = 0) -> tuple[Event, ...]:
    """Everything that the plan releases of a hospital with so many units, from first to last.

    With a sample_rate, as shared noise has it, the number of units plays no part.
    """
    event = training_event(plan, units)
    whole = replace(event, steps=plan.rounds * event.steps)
    return tuple(e for e in (readiness_event(plan), statistics_event(plan), whole, evaluation_event(plan)) if e)


def in_patients(event: Event, plan: StudyPlan, records: int) -> Event:
    """What an event costs a patient, where the plan's unit is another; ``records`` is the most that a patient has.

    Record-level DP draws and clips each record on its own; the sums and counts add up all of a patient's. Without
    one patient a hospital's clipped update is another one, at most twice the clip away.
    """
    if plan.privacy.unit == "site":
        return replace(event, noise_multiplier=event.noise_multiplier / 2)
    return replace(event, records=records) if plan.privacy.unit == "record" else event


def part_of(plan: StudyPlan, event: Event) -> float:
    """The noise multiplier of what one hospital adds to a release that costs ``event``."""
    return event.noise_multiplier * _each(plan) if plan.shared_noise else event.noise_multiplier


def certificate(plan: StudyPlan) -> tuple[Standing, ...]:
    """Where noise is shared: what is promised against the coordinator, with some hospitals, and with all others."""
    if not plan.shared_noise:
        return ()
    (_, delta), sites, (shared, whole) = promise(plan), plan.cohort.min_sites, _apart(plan)
    return shared_noise.certificate(shared, delta, _each(plan), sites, plan.privacy.colluding, whole)


def _each(plan: StudyPlan) -> float:
    """What each hospital adds of the noise that all share."""
    (_, delta), terms, (shared, whole) = promise(plan), plan.privacy, _apart(plan)
    return shared_noise.part(shared, delta, plan.cohort.min_sites, terms.colluding, terms.epsilon_alone, whole)


def _apart(plan: StudyPlan) -> tuple[tuple[Event, ...], tuple[Event, ...]]:
    """Where noise is shared: what has it, and what each hospital releases by itself with noise of its own."""
    alone = readiness_event(plan), statistics_event(plan) if plan.harmonises else None
    own = tuple(event for event in alone if event)
    return tuple(event for event in charges(plan) if event not in own), own
