"""The hospital's record of what its patients' privacy has cost, across studies, and across crashes.

Its unit is the patient of a population; it holds mechanism events, from which any epsilon is computed anew. A
plan's whole cost is reserved before its first round, under a ceiling that an officer signed; each release is
committed, out of its plan's reservation, before its first noisy byte exists; what a settled reservation did not
use is free again. So what counts is never less than what has left the hospital.

If the hospital dies after a commitment and is asked the very same thing again, nothing had left it and the same
commitment stands. Asked anything else for that round, or asked again once a later release was committed, it
refuses: a commitment pays for one draw of noise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cloister_client import ceilings
from cloister_client.book import Book, begun
from cloister_client.ceilings import Ceiling
from cloister_shared import budget
from cloister_shared.budget import Event, covers, merged, unspent
from cloister_shared.envelope import Identity
from cloister_shared.errors import BudgetExceeded, LedgerBroken, Refusal, TicketRefused

_QUOTE_AGAIN = "Ask for a new quote (cloister-site budget quote) and approve that."
_PLACE = "WHERE population = ? AND version = ?"


@dataclass(frozen=True)
class Release:
    """One answer that leaves the hospital with noise: what for, what was asked (a digest), and what it costs."""

    plan: str
    run: str
    round: int
    ticket: str
    event: Event


@dataclass(frozen=True)
class Cost:
    """What a whole plan costs one hospital: the events of its ``rounds``, within the plan's own epsilon at delta."""

    plan: str
    study: str
    charges: tuple[Event, ...]
    epsilon: float
    delta: float
    rounds: int = 1

    @property
    def digest(self) -> str:
        """What a hospital that approves a quote binds itself to: the plan's digest and all that will be charged."""
        return hashlib.sha256(json.dumps([self.plan, _plain(self.charges)], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Reservation:
    """What a plan may spend, and what it has spent of it."""

    number: int
    plan: str
    study: str
    charges: tuple[Event, ...]
    """The whole plan's."""
    held: tuple[Event, ...]
    """What was not spent yet when it was reserved; less than ``charges`` where the plan was reserved before."""
    spent: tuple[Event, ...]
    open: bool

    @property
    def counted(self) -> tuple[Event, ...]:
        """What it takes of the ceiling: all that is held while it is open, then what was spent."""
        return self.held if self.open else self.spent


class Ledger:
    """The budget of one population of one hospital. Several processes may hold the same file."""

    def __init__(self, path: Path, population: str = "patients") -> None:
        """``audit.jsonl`` and ``officers.json`` lie beside ``path``.

        Raises:
            LedgerBroken: it is no ledger, was edited, or is not the one that the audit log tells of.
            AuditBroken: the log was changed.
        """
        self.book, self.population = Book(path), population
        with self.book.writing():
            self._check()

    def close(self) -> None:
        """Let go of the file."""
        self.book.close()

    # --- the ceiling ---------------------------------------------------------------------------------------
    def set_ceiling(
        self, epsilon: float, delta: float, *, officer: str, identity: Identity, reason: str = ""
    ) -> Ceiling:
        """Sign a new ceiling and put it in force. Below what is spent it blocks what is still to come.

        Raises:
            BudgetExceeded: epsilon or delta is none.
            EnvelopeRefused: the key is not the one that is pinned for the officer.
        """
        with self.book.writing():
            made = ceilings.put(self.book, self.population, epsilon, delta, officer, identity, reason)
            self._keep_at(budget.order_of(epsilon, delta, self.counted()), made)
        self.book.publish()
        return made

    def ceiling(self) -> Ceiling | None:
        """The one in force; None before the first.

        Raises:
            EnvelopeRefused: it is not what a pinned officer signed for this ledger.
        """
        return ceilings.in_force(self.book, self.population)

    def order(self, ceiling: Ceiling, first: Sequence[Event] = ()) -> float:
        """The Rényi order at which a ceiling is kept. Only before anything counts can ``first`` change it.

        Raises:
            LedgerBroken: the one on file is none.
        """
        if first and not self.counted():
            return budget.order_of(ceiling.epsilon, ceiling.delta, first)
        ((order,),) = self.book.rows(f"SELECT rank FROM ceilings {_PLACE}", self.population, ceiling.version)
        if order not in budget.ORDERS:
            raise LedgerBroken(f"{self.book.path} keeps ceiling {ceiling.version} at no order of the accountant's.")
        return float(order)

    def _keep_at(self, order: float, ceiling: Ceiling) -> None:
        self.book.rows(f"UPDATE ceilings SET rank = ? {_PLACE}", order, self.population, ceiling.version)

    def _required(self) -> Ceiling:
        if found := self.ceiling():
            return found
        raise BudgetExceeded(
            f"No ceiling is set for the {self.population} of this hospital, so nothing private may leave it.",
            mend="An officer sets one: cloister-site budget ceiling --epsilon E --delta D --officer NAME --key FILE.",
        )

    # --- reserve, commit, settle ---------------------------------------------------------------------------
    def reserve(self, cost: Cost, *, approved: str = "") -> None:
        """Set a plan's whole cost aside, or what is left of it; nothing where it is set aside already.

        ``approved`` is the digest that a quote showed, where the hospital approved one.

        Raises:
            TicketRefused: the plan was approved, or reserved before, with other charges.
            BudgetExceeded: no ceiling, or it does not fit; says what was asked, spent, and would fit.
        """
        refused = None
        with self.book.writing():
            try:
                held, still = self.asked(cost)
                if approved not in ("", cost.digest):
                    raise TicketRefused(f"Study {cost.study} is not what was approved.", mend=_QUOTE_AGAIN)
                if held and not still:
                    self._reserve(cost, held, *self.admit(cost, held))
            except Refusal as error:
                refused = error
                self._note_refusal(cost.plan, cost.study, error)
        self.book.publish()
        if refused:
            raise refused

    def asked(self, cost: Cost) -> tuple[list[Event], bool]:
        """What of a plan's charges is not spent yet, and whether it is reserved already.

        Raises:
            TicketRefused: the plan was reserved before with other charges.
        """
        before = [one for one in self.reservations() if one.plan == cost.plan]
        if any(one.charges != cost.charges for one in before):
            raise TicketRefused(
                f"Study {cost.study} was reserved with other charges: its table or mechanism has changed since.",
                mend=f"{_QUOTE_AGAIN} It needs a new version of the plan; what was spent stays counted.",
            )
        spent = [event for one in before for event in one.spent]
        return unspent(cost.charges, spent), any(one.open for one in before)

    def admit(self, cost: Cost, held: list[Event]) -> tuple[Ceiling, float]:
        """The ceiling that admits a plan, and the order at which it does.

        Raises:
            BudgetExceeded: there is no ceiling, or it does not; says what was asked, spent, and would fit.
        """
        if (whole := budget.epsilon(cost.charges, cost.delta)) > cost.epsilon:
            raise BudgetExceeded(
                f"Study {cost.study} would cost epsilon {whole:.4g} here; its plan allows {cost.epsilon:.4g}."
            )
        ceiling = self._required()
        order = self.order(ceiling, held)
        if not budget.fits([*self.counted(), *held], ceiling.epsilon, ceiling.delta, order):
            raise BudgetExceeded(
                self._why_not(cost, held, ceiling, order),
                mend="Amend the plan, or have an officer raise the ceiling (cloister-site budget ceiling).",
            )
        return ceiling, order

    def _reserve(self, cost: Cost, held: list[Event], ceiling: Ceiling, order: float) -> None:
        self._keep_at(order, ceiling)
        for event in held:  # so that whoever asks what is spent need not integrate
            curve = budget.curve(event).tobytes()
            self.book.rows("INSERT OR IGNORE INTO curves VALUES (?, ?, ?, ?)", *_mechanism(event), curve)
        charges = _plain(cost.charges)
        self.book.rows(
            "INSERT INTO reservations (population, plan, study, charges, held, open) VALUES (?, ?, ?, ?, ?, 1)",
            self.population, cost.plan, cost.study, json.dumps(charges), json.dumps(_plain(held)),
        )  # fmt: skip
        number = self.book.rows("SELECT last_insert_rowid()")[0][0]
        told = {"reservation": number, "plan": cost.plan, "study": cost.study, "population": self.population}
        told |= {"charges": charges, "held": _plain(held), "ceiling": ceiling.version, "order": order}
        self.book.note("reserved", {**told, "approval": cost.digest})

    def _note_refusal(self, plan: str, study: str, why: Refusal) -> None:
        self.book.note(
            "refused", {"plan": plan, "study": study, "population": self.population, "why": str(why)}, once=True
        )

    def _why_not(self, cost: Cost, held: list[Event], ceiling: Ceiling, order: float) -> str:
        """Asked, spent, ceiling, and what would fit."""
        counted, delta = self.counted(), ceiling.delta
        asked, spent, whole = (self.price(events, delta) for events in (held, self.spent(), counted))
        quieter = budget.quieter(held, counted, ceiling.epsilon, delta, order)
        each = [event for event in held if event.purpose == "training"]
        once = [event for event in held if event.purpose != "training"]
        room = budget.room(ceiling.epsilon, delta, order) - budget.spending([*counted, *once], order)
        fit = max(0, int(cost.rounds * room / budget.spending(each, order))) if each else 0
        would = [f"{fit} of its {cost.rounds} rounds with this noise"] if fit else []
        if quieter and (less := int(100 * budget.epsilon(quieter, delta))):  # never rounded up
            would.append(f"the whole of it with more noise, at epsilon {less / 100:g}")
        return (
            f"Study {cost.study} asks for epsilon {asked:.3g}; the {self.population} here have spent {spent:.3g}"
            f" ({whole:.3g} with what is reserved), and the ceiling is {ceiling.epsilon:.4g} at delta {delta:g}."
            f" What would fit: {' or '.join(would) or 'nothing'}."
        )

    def commit(self, release: Release, *, epsilon: float, delta: float) -> None:
        """Write a release down for good, or refuse it.

        The plan's epsilon is for all its runs together: whoever names the runs cannot renew it.

        Raises:
            TicketRefused: this round was committed for another ticket, or is over.
            BudgetExceeded: the plan would pass ``epsilon`` at ``delta``, it has not so much reserved, or the
                ceiling was lowered below it.
        """
        event, number, refused = release.event, release.round, None
        with self.book.writing():
            known = self.book.rows(
                "SELECT number, ticket FROM releases"
                " WHERE population = ? AND plan = ? AND run = ? AND round = ? AND purpose = ?",
                self.population, release.plan, release.run, number, event.purpose,
            )  # fmt: skip
            if known:
                last = self.book.rows(
                    "SELECT max(number) FROM releases WHERE population = ? AND plan = ?", self.population, release.plan
                )
                if known[0] == (last[0][0], release.ticket):
                    return
                why = "is over" if known[0][1] == release.ticket else "was already answered for another model"
                raise TicketRefused(f"Round {number} {why}.", mend="Resume the run from its own checkpoint.")
            try:
                reservation = self._payer(release, epsilon, delta)
                self.book.rows(
                    "INSERT INTO releases (population, reservation, plan, run, round, ticket, noise_multiplier,"
                    " sample_rate, records, steps, purpose) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    self.population, reservation, release.plan, release.run, number, release.ticket,
                    *_mechanism(event), event.steps, event.purpose,
                )  # fmt: skip
            except BudgetExceeded as error:
                refused = error
                self._note_refusal(release.plan, "", error)
        if refused:
            self.book.publish()
            raise refused

    def _payer(self, release: Release, epsilon: float, delta: float) -> int:
        """The reservation that pays for a release."""
        event, number = release.event, release.round
        after = budget.epsilon([*self.history(release.plan), event], delta)
        if after > epsilon:
            raise BudgetExceeded(f"Round {number} would take epsilon to {after:.4g}; the plan allows {epsilon:.4g}.")
        paying = [one for one in self.reservations() if one.plan == release.plan and one.open]
        if not paying or not covers(paying[0].held, [*paying[0].spent, event]):
            has = "has too little reserved for it" if paying else "has no open reservation"
            raise BudgetExceeded(
                f"Round {number} cannot be paid for: its plan {has}.",
                mend="The hospital reserves when it enrols; the coordinator has to begin or resume the run.",
            )
        ceiling = self._required()
        if not budget.fits([*self.spent(), event], ceiling.epsilon, ceiling.delta, self.order(ceiling)):
            raise BudgetExceeded(
                f"Round {number} would pass the ceiling of epsilon {ceiling.epsilon:.4g} that {ceiling.officer}"
                f" set on {ceiling.at[:10]}.",
                mend="The study ends here, unless an officer raises the ceiling (cloister-site budget ceiling).",
            )
        return paying[0].number

    def settle(self, plan: str) -> None:
        """End a plan's reservation, if one is open: what it did not spend is free again."""
        with self.book.writing():
            self._settle([one for one in self.reservations() if one.open and one.plan == plan], "closed")
        self.book.publish()

    def recover(self, name: str, reason: str = "") -> Reservation:
        """Settle the reservation of a study that will not go on, by its name or the start of its plan's digest.

        Raises:
            TicketRefused: nothing open is called that, or more than one reservation.
        """
        with self.book.writing():
            opened = [one for one in self.reservations() if one.open]
            found = [one for one in opened if one.study == name or (len(name) >= 6 and one.plan.startswith(name))]
            if len(found) != 1:
                shown = ", ".join(f"{one.study} ({one.plan[:12]})" for one in opened) or "none"
                many = f"{len(found)} open reservations are" if found else "No open reservation is"
                raise TicketRefused(f"{many} called {name}.", mend=f"Open now: {shown}. Give the digest of one.")
            self._settle(found, "recovered", reason)
        self.book.publish()
        return found[0]

    def _settle(self, reservations: Sequence[Reservation], how: str, reason: str = "") -> None:
        for one in reservations:
            self.book.rows("UPDATE reservations SET open = 0 WHERE number = ?", one.number)
            told = {"reservation": one.number, "plan": one.plan, "study": one.study, "population": self.population}
            self.book.note(how, {**told, "spent": _plain(one.spent), "reason": reason})

    # --- what was spent ------------------------------------------------------------------------------------
    def history(self, plan: str) -> list[Event]:
        """Every committed event of a plan, in order."""
        rows = self.book.rows(
            "SELECT noise_multiplier, sample_rate, steps, purpose, records FROM releases"
            " WHERE population = ? AND plan = ? ORDER BY number",
            self.population, plan,
        )  # fmt: skip
        return [Event(*row) for row in rows]

    def reservations(self) -> list[Reservation]:
        """Every one that was made, in order."""
        rows = self.book.rows(
            "SELECT number, plan, study, charges, held, open FROM reservations WHERE population = ? ORDER BY number",
            self.population,
        )
        taken: dict[int, list[Event]] = {row[0]: [] for row in rows}
        for number, *event in self.book.rows(
            "SELECT reservation, noise_multiplier, sample_rate, sum(steps), purpose, records FROM releases"
            " WHERE population = ? GROUP BY reservation, noise_multiplier, sample_rate, purpose, records",
            self.population,
        ):
            taken.setdefault(number, []).append(Event(*event))
        spent = {number: merged(events) for number, events in taken.items()}
        return [
            Reservation(
                number, plan, study, self._events(charges), self._events(held), tuple(spent[number]), bool(still)
            )
            for number, plan, study, charges, held, still in rows
        ]

    def _events(self, text: str) -> tuple[Event, ...]:
        try:
            return tuple(Event(**event) for event in self.book.value(text))
        except TypeError:
            raise LedgerBroken(f"{self.book.path} holds a reservation that cannot be read.") from None

    def spent(self) -> list[Event]:
        """All that was committed, over all studies."""
        return merged(event for one in self.reservations() for event in one.spent)

    def counted(self) -> list[Event]:
        """What counts against the ceiling: all that was committed, and open reservations in full."""
        return merged(event for one in self.reservations() for event in one.counted)

    def price(self, events: Iterable[Event], delta: float) -> float:
        """Epsilon at ``delta`` of events together; quick, since the curves of what was reserved are kept."""
        total = np.zeros(len(budget.ORDERS))
        for event in merged(events):
            kept = self.book.rows(
                "SELECT curve FROM curves WHERE noise_multiplier = ? AND sample_rate = ? AND records = ?",
                *_mechanism(event),
            )
            total += event.steps * (np.frombuffer(kept[0][0]) if kept else budget.curve(event))
        return budget.epsilon_of(total, delta)

    # --- held against the log --------------------------------------------------------------------------------
    def _check(self) -> None:
        """Hold the tables against the log's entries: what was edited in one of them is found here.

        Raises:
            LedgerBroken: names the first reservation or ceiling that differs.
        """
        told = [(what, said) for what, said in self.book.noted() if said.get("population") == self.population]
        made = {said["reservation"]: said for what, said in told if what == "budget.reserved"}
        ended = {said["reservation"]: said for what, said in told if what in ("budget.closed", "budget.recovered")}
        found = self.reservations()
        for one in found:
            said = made.pop(one.number, {})
            same = (said.get("plan"), said.get("charges"), said.get("held")) == (
                one.plan, _plain(one.charges), _plain(one.held)
            )  # fmt: skip
            if one.open:
                same = same and one.number not in ended and covers(one.held, one.spent)
            else:
                same = same and ended.get(one.number, {}).get("spent") == _plain(one.spent)
            if not same:
                raise LedgerBroken(
                    f"Reservation {one.number} in {self.book.path}, of {one.study}, is not as it was logged."
                )
        envelopes = [said["envelope"] for what, said in told if what == "budget.ceiling"]
        kept = self.book.rows("SELECT envelope FROM ceilings WHERE population = ? ORDER BY version", self.population)
        if made or envelopes != [envelope for (envelope,) in kept]:
            raise LedgerBroken(f"{self.book.path} lacks a reservation or a ceiling that was logged.")


def settle(path: Path, population: str, plans: Iterable[str]) -> None:
    """End the reservations of plans that are over, where there is a ledger at all.

    Raises:
        LedgerBroken, AuditBroken: as ``Ledger``.
    """
    if begun(path):
        ledger = Ledger(path, population)
        try:
            for plan in plans:
                ledger.settle(plan)
        finally:
            ledger.close()


# --- events as JSON ----------------------------------------------------------------------------------------
def _plain(events: Iterable[Event]) -> list[dict[str, Any]]:
    return [asdict(event) for event in events]


def _mechanism(event: Event) -> tuple[float, float, int]:
    return event.noise_multiplier, event.sample_rate, event.records
