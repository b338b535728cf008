"""The ledger in words, for the people who answer for it."""

from __future__ import annotations

from dataclasses import asdict
from textwrap import fill
from typing import Any

from cloister_client.ledger import Ledger, Reservation
from cloister_shared import audit, budget

DELTA = 1e-5
"""Where no ceiling says at which delta to count."""


def standing(ledger: Ledger) -> str:
    """Ceiling, spent, reserved, left; then a line a study. At most 100 columns."""
    ceiling = ledger.ceiling()
    delta = ceiling.delta if ceiling else DELTA
    spent, counted = ledger.spent(), ledger.counted()
    lines = {"Population": ledger.population, "Ceiling": "none: nothing private may be released"}
    if ceiling:
        lines["Ceiling"] = f"epsilon {ceiling.epsilon:g} at delta {delta:g}"
        lines["Signed"] = f"by {ceiling.officer} on {ceiling.at[:10]}, version {ceiling.version}"
        if ceiling.reason:
            lines["Reason"] = ceiling.reason if len(ceiling.reason) < 85 else ceiling.reason[:82] + "..."
    lines["Spent"] = f"epsilon {ledger.price(spent, delta):.3f} (by PLD {budget.pld_epsilon(spent, delta):.3f})"
    both = f"epsilon {ledger.price(counted, delta):.3f} (by PLD {budget.pld_epsilon(counted, delta):.3f})"
    lines["With reserved"] = both
    if ceiling:
        left = budget.left(counted, ceiling.epsilon, delta, ledger.order(ceiling))
        lines["Left"] = f"a study of epsilon {left:.3f}" if left else "nothing"
    page = [f"{key:<14}{value}" for key, value in lines.items()]
    page += ["", "PLD is information. What decides is a Rényi filter, which holds for studies chosen after others."]
    if studies := ledger.reservations():
        page += ["", f"{'Study':<40}  {'Plan':<12}  {'State':<8}  {'Reserved':>9}  {'Spent':>9}  {'Steps':>11}"]
        page += [_line(ledger, one, delta) for one in studies]
        page += [f"Reserved and spent are epsilons at delta {delta:g}, each study by itself; they do not add up."]
    return "\n".join(page)


def _line(ledger: Ledger, one: Reservation, delta: float) -> str:
    name = one.study if len(one.study) <= 40 else one.study[:37] + "..."
    done, all_ = (sum(event.steps for event in events) for events in (one.spent, one.held))
    state = "open" if one.open else "closed"
    held = f"{ledger.price(one.held, delta):.3f}" if one.open else "-"
    spent = f"{ledger.price(one.spent, delta):.3f}"
    return f"{name:<40}  {one.plan[:12]:<12}  {state:<8}  {held:>9}  {spent:>9}  {f'{done}/{all_}':>11}"


def happened(entry: audit.Entry) -> str:
    """One entry of the log in a line or more of at most 100 columns."""
    said = entry.said
    what = entry.what.removeprefix("budget.")
    match what:
        case "ledger":
            told = f"ledger {said['ledger'][:12]} begun"
        case "officer":
            told = f"officer {said['officer']} named, key {said['key']}"
        case "ceiling":
            told = (
                f"ceiling {said['version']} of the {said['population']}: epsilon {said['epsilon']:g} at delta"
                f" {said['delta']:g}, by {said['officer']}"
            )
        case "refused":
            told = f"refused {said['study'] or said['plan'][:12]}: {said['why']}"
        case "reserved":
            told = f"reserved for {said['study']} ({said['plan'][:12]}): {_steps(said['held'])}"
        case _:
            told = f"{what} {said['study']} ({said['plan'][:12]}): {_steps(said['spent'])} spent"
    because = f"; {said['reason']}" if said.get("reason") else ""
    start = f"{entry.number:>4}  {entry.at[:19].replace('T', ' ')}  "
    return fill(told + because, 100, initial_indent=start, subsequent_indent=" " * len(start))


def _steps(events: list[dict[str, Any]]) -> str:
    steps = sum(event["steps"] for event in events)
    return f"{steps} noisy step{'' if steps == 1 else 's'}"


def exported(ledger: Ledger) -> dict[str, Any]:
    """Everything, for an auditor: events and not epsilons, so that any accountant can price them."""
    ceiling = ledger.ceiling()
    return {
        "ledger": ledger.book.id,
        "population": ledger.population,
        "ceiling": ceiling.model_dump() if ceiling else None,
        "reservations": [asdict(one) for one in ledger.reservations()],
        "audit": audit.export(ledger.book.log),
    }
