"""The few numbers of a reply that are not parameters. In a secure sum they travel inside it, never beside it.

Each side finds the names, and so the order, in the plan; a reply cannot choose what to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cloister_shared import combat
from cloister_shared.charges import statistics_event
from cloister_shared.inputs import columns, numbers
from cloister_shared.outcomes.outcome import cells, outcome_of
from cloister_shared.plan import StudyPlan

Kind = Literal["statistics", "train", "evaluate"]
Numbers = dict[str, float | None]


def glance(plan: StudyPlan) -> tuple[str, str]:
    """What is measured of the incoming model in every round."""
    return "loss", outcome_of(plan.table).headline


def kind_of(plan: StudyPlan, number: int) -> Kind:
    """What round ``number`` is for: 0 for statistics, one more than the plan's last to judge the final model."""
    return "statistics" if number == 0 else "evaluate" if number > plan.rounds else "train"


def names(plan: StudyPlan, number: int) -> tuple[str, ...]:
    """The numbers that each hospital adds in this round. ``sites`` is 1 for each, so their sum is known before."""
    rows = ("rows",) if plan.aggregation.weights == "rows" else ()
    match kind_of(plan, number):
        case "statistics":
            own = statistics(plan)
        case "train":
            # Where noise is shared, what is clipped is a step without noise: how much of it would tell of a row.
            own = () if plan.shared_noise else ("clipped",)
            own += () if plan.evaluation.epsilon_share else _known(glance(plan))
        case "evaluate" if plan.evaluation.epsilon_share:
            own = risks()
        case "evaluate":
            own = _known(
                f"{model} {metric}" for model in judged_models(plan) for metric in outcome_of(plan.table).metrics
            )
    return ("sites", *rows, *own)


def judged_models(plan: StudyPlan) -> tuple[str, ...]:
    """The models that a hospital judges at the end: the common one, and those that it keeps."""
    kept = {"fine-tuned": plan.personalisation.fine_tune_steps, "ditto": plan.personalisation.ditto}
    return ("final", *(name for name, terms in kept.items() if terms))


def statistics(plan: StudyPlan) -> tuple[str, ...]:
    """Counts, sums and sums of squares of the number features, then histograms, where the plan asks for them."""
    if plan.harmonises:
        sums = combat.names(plan)
    else:
        sums = [f"{kind} {feature.name}" for kind in ("count", "sum", "square") for feature in numbers(plan.table)]
    counts = [cell(what, which) for what, found in histograms(plan).items() for which in found]
    return (*(sums if plan.normalises else ()), *counts)


def harmony_noise(plan: StudyPlan) -> float:
    """Standard deviation of the noise on each of a hospital's sums for ``combat``; 0 without DP."""
    event = statistics_event(plan)
    return event.noise_multiplier * (combat.sensitivity(plan) ** 2 + len(histograms(plan))) ** 0.5 if event else 0.0


def cell(what: str, which: str) -> str:
    """The name of one cell of a histogram."""
    return f"in {what}: {which}"


def histograms(plan: StudyPlan) -> dict[str, tuple[str, ...]]:
    """The cells of each histogram: of a number by bin, else by category; whether a value was missing; the outcome."""
    bins = plan.statistics.histograms
    found: dict[str, tuple[str, ...]] = {}
    for column in columns(plan.table) if bins else ():
        if column.kind == "number" and not column.absent:
            found[column.name] = tuple(str(at) for at in range(bins or 0))
        elif column.kind == "category" and not column.absent:
            found[column.feature] = (*found.get(column.feature, ()), str(column.category))
        else:
            found[column.name] = ("no", "yes")
    of_target = cells(plan.table.target)
    return found | ({plan.table.target.name: of_target} if bins and of_target else {})


RISK_BINS = 40


def risks() -> tuple[str, ...]:
    """Held-out patients with and without the outcome, by risk from 0 to 1."""
    return tuple(f"{outcome} at risk {at}" for outcome in ("ill", "well") for at in range(RISK_BINS))


def to_vector(plan: StudyPlan, number: int, said: Mapping[str, float | None]) -> NDArray[np.float64]:
    """One hospital's numbers in the order of ``names``; a metric that it cannot give counts as none."""
    values = {**said, "sites": 1.0} | {f"{name}?": float(value is not None) for name, value in said.items()}
    return np.array([values.get(name) or 0.0 for name in names(plan, number)])


def from_sums(plan: StudyPlan, number: int, sums: NDArray[np.float64]) -> Numbers:
    """Sums by name; of a metric, the mean over the hospitals that could give it."""
    said = dict(zip(names(plan, number), sums.tolist(), strict=True))
    found: Numbers = {}
    for name, value in said.items():
        known = said.get(f"{name}?")
        if known is not None:
            found[name] = value / known if known else None
        elif not name.endswith("?"):
            found[name] = value
    return found


def _known(metrics: Iterable[str]) -> tuple[str, ...]:
    """Each metric, and whether there is one: a name with a mark that no feature's name can hold."""
    return tuple(name for metric in metrics for name in (metric, f"{metric}?"))
