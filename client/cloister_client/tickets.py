"""What a coordinator may ask in which round, and with what: a ticket is held against the plan before all else."""

from __future__ import annotations

import numpy as np

from cloister_shared.errors import TicketRefused
from cloister_shared.plan import Scaffold, StudyPlan
from cloister_shared.wire import Ticket


def require(ticket: Ticket, kind: str, plan: StudyPlan, digest: str, site: str, size: int) -> None:
    """That it is of the approved plan, with this ``digest``, for this hospital, and holds what ``kind`` of work needs.

    ``size``: parameters of the model.

    Raises:
        TicketRefused: it is not; says in what.
    """
    header = ticket.header
    if header.plan != digest:
        raise TicketRefused(
            f"The ticket is for plan {header.plan[:12]}; {site} approved {digest[:12]}.",
            mend="Send the plan to the hospital for approval first.",
        )
    if header.site != site:
        raise TicketRefused(f"The ticket is addressed to {header.site}.", mend=f"This is {site}.")
    first = dict.fromkeys(("advertise", "readiness", "statistics"), range(1))
    rounds = {**first, "train": range(1, plan.rounds + 1)}
    if header.round not in rounds.get(kind, range(plan.rounds + 1, plan.rounds + 2)):
        raise TicketRefused(
            f"Round {header.round} of {plan.rounds} has no work called {kind}.", mend="Correct the coordinator."
        )
    wanted = {"train": {"model", "control"}, "evaluate": {"model"}}.get(kind, set[str]())
    if not isinstance(plan.strategy, Scaffold):
        wanted -= {"control"}
    if set(ticket.vectors) != wanted:
        raise TicketRefused(
            f"The ticket holds {', '.join(sorted(ticket.vectors)) or 'no vectors'}, not"
            f" {', '.join(sorted(wanted)) or 'none'}.",
            mend="Correct the coordinator.",
        )
    for name, vector in ticket.vectors.items():
        if vector.size != size or not np.isfinite(vector).all():
            raise TicketRefused(f"The ticket's {name} is not {size} finite numbers.", mend="Correct the coordinator.")
