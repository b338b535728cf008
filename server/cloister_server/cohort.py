"""Who takes part: each hospital names itself, once a run, before the first round."""

from __future__ import annotations

from collections.abc import Mapping

from cloister_shared.errors import CohortTooSmall, PlanRefused
from cloister_shared.plan import StudyPlan
from cloister_shared.wire import ReplyHeader


def enrol(
    plan: StudyPlan, layout: str, introduced: Mapping[int, ReplyHeader], absent: Mapping[int, str]
) -> dict[str, int]:
    """Hospital to Flower node, sorted by name, of those that speak the plan's layout.

    Raises:
        CohortTooSmall: fewer than ``cohort.min_sites``; says who is missing and why.
        PlanRefused: more than ``cohort.max_sites``.
    """
    enrolled = {header.site: node for node, header in introduced.items() if header.layout == layout}
    if len(enrolled) < plan.cohort.min_sites:
        why = [f"{header.site} has another model" for header in introduced.values() if header.layout != layout]
        reasons = "; ".join(dict.fromkeys([*absent.values(), *why])) or "no one else answered"
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
