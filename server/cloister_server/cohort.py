"""Who takes part: each hospital introduces itself, once a run, before the first round."""

from __future__ import annotations

from collections.abc import Mapping

from cloister_shared.errors import CohortTooSmall, PlanRefused
from cloister_shared.plan import StudyPlan


def enrol(plan: StudyPlan, introduced: Mapping[int, str], absent: Mapping[int, str]) -> dict[str, int]:
    """Hospital to Flower node, sorted by name.

    Raises:
        CohortTooSmall: fewer than ``cohort.min_sites``; says who is missing and why.
        PlanRefused: more than ``cohort.max_sites``.
    """
    enrolled = {site: node for node, site in introduced.items()}
    if len(enrolled) < plan.cohort.min_sites:
        reasons = "; ".join(dict.fromkeys(absent.values())) or "no one else answered"
        raise CohortTooSmall(
            f"{len(enrolled)} hospitals can take part in {plan.study}, which needs {plan.cohort.min_sites}: {reasons}",
            mend="Mend these hospitals, or lower cohort.min_sites.",
        )
    if len(enrolled) > plan.cohort.max_sites:
        raise PlanRefused(
            f"{len(enrolled)} hospitals answered; {plan.study} takes {plan.cohort.max_sites} at most.",
            mend="Raise cohort.max_sites and have the plan approved again.",
        )
    return dict(sorted(enrolled.items()))
