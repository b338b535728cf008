"""What a plan would cost this hospital, before anybody approves it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import torch

from cloister_client.connectors.connector import open_records
from cloister_client.dataset import Dataset, load_dataset, normalised
from cloister_client.ledger import Cost, Ledger
from cloister_client.network import Network
from cloister_client.privacy import Units, dp_sgd, plain, plan_cost
from cloister_client.site import own_constants
from cloister_shared import budget
from cloister_shared.charges import certificate, training_event
from cloister_shared.errors import Refusal
from cloister_shared.layout import layout_of, untrained
from cloister_shared.noise import keystream
from cloister_shared.objective import objective_of
from cloister_shared.plan import Scaffold, StudyPlan
from cloister_shared.plan_text import privacy

_SECONDS = 0.5
"""How long steps are timed for."""


@dataclass(frozen=True)
class Quote:
    """What a plan would cost: terms and what they say, why it would be refused now, and what approval binds."""

    lines: dict[str, str]
    refusal: str = ""
    """"" where the hospital could take part as things stand."""
    digest: str = ""
    """Of plan and charges; "" where the plan is not private, and nothing is charged."""

    @property
    def page(self) -> str:
        """At most 100 columns."""
        page = "\n".join(f"{key:<12}{value}" for key, value in self.lines.items())
        return f"{page}\n\n{fill(f'It would be refused now. {self.refusal}', 100)}" if self.refusal else page


def quoted(plan: StudyPlan, site: Path, ledger: Ledger | None) -> Quote:
    """The quote. ``ledger`` may be None where the plan is not private.

    Raises:
        CloisterError: the table does not meet the plan, or no noise meets the plan's epsilon.
    """
    dataset = load_dataset(open_records(site), plan)
    (up, down), took = traffic(plan), hours(plan, dataset)
    lines = {
        "Study": f"{plan.study}, version {plan.version}: {plan.title}"[:86],
        "Plan": plan.digest,
        "Privacy": privacy(plan).replace(", neighbours", f";\n{'':<12}neighbours"),
        "Rounds": f"{plan.rounds} of {plan.training.local_steps} local steps, on {len(dataset.train)} training rows",
        "Hours": f"{took:.2g} ({3600 * took:.2g} s) of this machine's work over the whole study; an estimate",
        "GB": f"{up:.3g} sent, {down:.3g} received, over the whole study",
    }
    if rows := certificate(plan):
        lines["Against"] = f"\n{'':<12}".join(f"{row.who}: epsilon {row.epsilon:.3g}" for row in rows)
    if ledger is None:
        return Quote(lines)
    cost = plan_cost(plan, dataset)
    more, refusal = _budget(ledger, cost)
    binds = f"{cost.digest}\n{'':<12}this plan with these charges, and no others"
    return Quote({**lines, **more, "Approves": binds}, refusal, cost.digest)


def _budget(ledger: Ledger, cost: Cost) -> tuple[dict[str, str], str]:
    """The ledger before and after, and why it would refuse; "" where it would not."""
    ceiling = ledger.ceiling()
    delta = ceiling.delta if ceiling else cost.delta
    refusal, held, still = "", list(cost.charges), False
    try:
        held, still = ledger.asked(cost)
        if held and not still:
            ledger.admit(cost, held)
    except Refusal as error:
        refusal = str(error)
    before = ledger.counted()
    after = before if still else [*before, *held]
    shown = [f"{ledger.price(e, delta):.3f} (by PLD {budget.pld_epsilon(e, delta):.3f})" for e in (before, after)]
    steps = "\n".join(
        f"{'' if at == 0 else ' ' * 12}{e.steps} step{'s' if e.steps > 1 else ''} of {e.purpose}, each draws with"
        f" chance {e.sample_rate:.3g} and adds noise of {e.noise_multiplier:.4g} bounds"
        + (f"; {e.records} records of a patient at most" if e.records > 1 else "")
        for at, e in enumerate(cost.charges)
    )
    return {
        "Epsilon": f"{budget.epsilon(cost.charges, cost.delta):.3f} at delta {cost.delta:g}, by itself",
        "Charges": steps,
        "Ledger now": f"epsilon {shown[0]} at delta {delta:g}, with what others reserved",
        "Ledger then": f"epsilon {shown[1]}" + (": it is reserved already" if still else ""),
        "Ceiling": f"epsilon {ceiling.epsilon:g}, signed by {ceiling.officer}" if ceiling else "none is set",
    }, refusal


def traffic(plan: StudyPlan) -> tuple[float, float]:
    """GB that a hospital sends and receives over the whole plan: vectors alone, headers and retries are extra."""
    size = layout_of(plan, untrained(plan)).size
    vectors = 2 if isinstance(plan.strategy, Scaffold) else 1
    octets = plan.aggregation.bits / 8 if plan.aggregation.secure_sum else 4
    return size * octets * vectors * plan.rounds / 1e9, size * 4 * (vectors * plan.rounds + 1) / 1e9


def hours(plan: StudyPlan, dataset: Dataset) -> float:
    """Hours of local steps, from a few timed here on the hospital's rows; nothing of them is kept or sent."""
    at = [i for i, column in enumerate(dataset.columns) if column.kind == "number" and not column.absent]
    rows = normalised(dataset.train, dataset.columns, own_constants(dataset.train, at))
    objective = objective_of(plan)
    network = Network(untrained(plan), objective)
    if plan.private and plan.privacy.unit != "site":
        event = training_event(plan, len(Units.of(rows, plan.privacy.unit or "record")))
        gradient = dp_sgd(network.model, objective, rows, plan, event, keystream()).gradient
    else:
        gradient = plain(network, rows, plan.training.batch_size, torch.Generator()).gradient
    gradient()  # the first one pays for what is made once
    began, steps = time.perf_counter(), 0
    while steps < 3 or time.perf_counter() - began < _SECONDS:
        gradient()
        steps += 1
    return (time.perf_counter() - began) / steps * plan.rounds * plan.training.local_steps / 3600
