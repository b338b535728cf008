"""What a study's training minimises, and how what comes of it is judged."""

from __future__ import annotations

from dataclasses import dataclass

from cloister_shared.networks.losses import LOSSES, Loss
from cloister_shared.outcomes.outcome import Outcome, outcome_of
from cloister_shared.plan import StudyPlan
from cloister_shared.tasks.zoo import Costing


@dataclass(frozen=True)
class Objective:
    """A loss of outputs [n, ...] and outcomes [n, ...], and what they mean."""

    loss: Loss
    outcome: Outcome


def objective_of(plan: StudyPlan) -> Objective:
    """The task's own loss, or that of the kind of outcome."""
    task, schema = plan.task, plan.table
    loss = task.loss(schema) if isinstance(task, Costing) else LOSSES[schema.target.kind]
    return Objective(loss, outcome_of(schema, plan.evaluation.threshold))
