"""The hospital's record of what its patients' privacy has cost, across studies, and across crashes.

One SQLite file a hospital. Its unit is the patient of a population; it holds mechanism events, from which any
epsilon is computed anew. A plan's whole cost is reserved before its first round, under a ceiling that an officer
signed; each release is committed, out of its plan's reservation, before its first noisy byte exists; what a
settled reservation did not use is free again. So what counts is never less than what has left the hospital.

If the hospital dies after a commitment and is asked the very same thing again, nothing had left it and the same
commitment stands. Asked anything else for that round, or asked again once a later release was committed, it
refuses: a commitment pays for one draw of noise.

The database is the authority and the audit log beside it its public diary: an entry is written in the same
transaction as what it tells of, and copied to the log after it; what a crash kept from the log is copied when the
ledger is next opened. A database that lacks what the log tells is an old copy, and is refused.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import uuid
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from cloister_client import ceilings
from cloister_client.ceilings import SIGN_AGAIN, Ceiling
from cloister_shared import audit, budget
from cloister_shared.budget import Event, merged
from cloister_shared.envelope import Identity
from cloister_shared.errors import BudgetExceeded, EnvelopeRefused, LedgerBroken, TicketRefused

SCHEMA = 1
_TABLES = """
CREATE TABLE ledger (id TEXT NOT NULL);
CREATE TABLE entries (number INTEGER PRIMARY KEY, what TEXT NOT NULL, said TEXT NOT NULL);
CREATE TABLE ceilings (population TEXT, version INTEGER, envelope TEXT NOT NULL, rank REAL,
    PRIMARY KEY (population, version));
CREATE TABLE reservations (number INTEGER PRIMARY KEY, population TEXT NOT NULL, plan TEXT NOT NULL,
    study TEXT NOT NULL, charges TEXT NOT NULL, held TEXT NOT NULL, open INTEGER NOT NULL);
CREATE UNIQUE INDEX one_open ON reservations (population, plan) WHERE open;
CREATE TABLE releases (number INTEGER PRIMARY KEY, population TEXT NOT NULL, reservation INTEGER NOT NULL,
    plan TEXT NOT NULL, run TEXT NOT NULL, round INTEGER NOT NULL, ticket TEXT NOT NULL,
    noise_multiplier REAL NOT NULL, sample_rate REAL NOT NULL, steps INTEGER NOT NULL, purpose TEXT NOT NULL,
    records INTEGER NOT NULL, UNIQUE (population, plan, run, round, purpose));
CREATE TABLE curves (noise_multiplier REAL, sample_rate REAL, records INTEGER, curve BLOB NOT NULL,
    PRIMARY KEY (noise_multiplier, sample_rate, records));
"""
_EVENT = "noise_multiplier, sample_rate, sum(steps), purpose, records"
_SAME = "GROUP BY noise_multiplier, sample_rate, purpose, records ORDER BY min(number)"


@dataclass(frozen=True)
class Release:
    """One answer that leaves the hospital with noise: what for, what was asked (a digest), and what it costs."""

    plan: str
    run: str
    round: int
    ticket: str
    event: Event


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
    """One population of one hospital. Several processes may hold the same file."""

    def __init__(self, path: Path, population: str = "patients") -> None:
        """``audit.jsonl`` and ``officers.json`` lie beside ``path``.

        Raises:
            LedgerBroken: it is no ledger, or not the one that the audit log speaks of.
            AuditBroken: the log was changed.
        """
        self.path, self.population = path, population
        self._folder, self._log = path.parent, path.with_name("audit.jsonl")
        self._lock = threading.RLock()
        new = not path.exists()
        if new and self._log.exists() and any(map(_ours, audit.verify(self._log))):
            raise LedgerBroken(f"{path} is missing, and {self._log.name} tells of it.")
        with _readable(path):
            self._database = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
        with self._writing():
            if not self._all("SELECT 1 FROM sqlite_master WHERE name = 'entries'"):
                if self._all("SELECT 1 FROM sqlite_master"):
                    raise LedgerBroken(
                        f"{path} is a ledger of an earlier version, or none at all.", mend="Move it away to begin anew."
                    )
                for statement in _TABLES.split(";\n"):
                    self._database.execute(statement)
                self._database.execute(f"PRAGMA user_version = {SCHEMA}")
                own = uuid.uuid4().hex
                self._database.execute("INSERT INTO ledger VALUES (?)", (own,))
                self._note("ledger", {"ledger": own})
        self._publish()
        self._check()

    # --- the ceiling ---------------------------------------------------------------------------------------
    @property
    def id(self) -> str:
        """A name that no other ledger has."""
        return str(self._all("SELECT id FROM ledger")[0][0])

    def set_ceiling(
        self, epsilon: float, delta: float, *, officer: str, identity: Identity, reason: str = ""
    ) -> Ceiling:
        """Sign a new ceiling and put it in force. Below what is spent it blocks what is still to come.

        Raises:
            EnvelopeRefused: the key is not the one that is pinned for the officer.
        """
        with self._writing():
            version = 1 + (
                self._all("SELECT max(version) FROM ceilings WHERE population = ?", self.population)[0][0] or 0
            )
            at = datetime.now(UTC).isoformat(timespec="seconds")
            made = Ceiling(
                ledger=self.id, population=self.population, version=version, epsilon=epsilon, delta=delta,
                officer=officer, at=at, reason=reason,
            )  # fmt: skip
            envelope = ceilings.sign(made, identity)
            ceilings.read(envelope, ceilings.officers_of(self._folder))
            self._database.execute("INSERT INTO ceilings VALUES (?, ?, ?, NULL)", (self.population, version, envelope))
            self._note("ceiling", {"envelope": envelope, **made.model_dump(exclude={"ledger"})})
        self._publish()
        return made

    def ceiling(self) -> Ceiling | None:
        """The one in force, its signature verified; None before the first.

        Raises:
            EnvelopeRefused: it is not what a pinned officer signed for this ledger.
        """
        rows = self._all(
            "SELECT version, envelope FROM ceilings WHERE population = ? ORDER BY version DESC LIMIT 1", self.population
        )
        if not rows:
            return None
        version, envelope = rows[0]
        found = ceilings.read(envelope, ceilings.officers_of(self._folder))
        if (found.ledger, found.population, found.version) != (self.id, self.population, version):
            raise EnvelopeRefused("The ceiling was signed for another ledger, population or place.", mend=SIGN_AGAIN)
        return found

    def order(self, ceiling: Ceiling, first: Sequence[Event] = ()) -> float:
        """The Rényi order at which a ceiling is kept. Only before anything was released can ``first`` change it."""
        chosen = self._all(
            "SELECT rank FROM ceilings WHERE population = ? AND version = ?", self.population, ceiling.version
        )[0][0]
        if first and not self.counted():
            return budget.order_of(ceiling.epsilon, ceiling.delta, first)
        return chosen or budget.order_of(ceiling.epsilon, ceiling.delta)

    def _in_force(self) -> Ceiling:
        if found := self.ceiling():
            return found
        raise BudgetExceeded(
            f"No ceiling is set for the {self.population} of this hospital, so nothing private may leave it.",
            mend="An officer sets one: cloister-site budget ceiling --epsilon E --delta D --officer NAME --key FILE.",
        )

    # --- reserve, commit, settle ---------------------------------------------------------------------------
    def reserve(
        self, plan: str, study: str, charges: Iterable[Event], *, epsilon: float, delta: float, rounds: int = 1
    ) -> None:
        """Set a plan's whole cost aside, or what is left of it; nothing where it is set aside already.

        ``epsilon`` at ``delta`` is the plan's own promise; ``rounds`` are those that ``charges`` are for.

        Raises:
            TicketRefused: the plan was reserved before with other charges.
            BudgetExceeded: no ceiling, or it does not fit; says what was asked, spent, and would fit.
        """
        asked, refused = tuple(merged(charges)), None
        with self._writing():
            before = [one for one in self.reservations() if one.plan == plan]
            if any(one.charges != asked for one in before):
                raise TicketRefused(
                    f"Study {study} was approved with other charges: its table or its mechanism has changed since.",
                    mend="Approve a new version of the plan; what was spent stays counted.",
                )
            held = _less(asked, [event for one in before for event in one.spent])
            if any(one.open for one in before) or not held:
                return
            try:
                self._admit(plan, study, asked, held, epsilon, delta, rounds)
            except BudgetExceeded as error:
                refused = error
                self._note_refusal(plan, study, str(error))
        self._publish()
        if refused:
            raise refused

    def _admit(
        self,
        plan: str,
        study: str,
        asked: Sequence[Event],
        held: list[Event],
        epsilon: float,
        delta: float,
        rounds: int,
    ) -> None:
        if (cost := budget.epsilon(asked, delta)) > epsilon:
            raise BudgetExceeded(f"Study {study} would cost epsilon {cost:.4g}; its plan allows {epsilon:.4g}.")
        ceiling, counted = self._in_force(), self.counted()
        order = self.order(ceiling, held)
        if not budget.fits([*counted, *held], ceiling.epsilon, ceiling.delta, order):
            raise BudgetExceeded(
                self._why_not(study, held, rounds, ceiling, order),
                mend="Amend the plan, or have an officer raise the ceiling (cloister-site budget ceiling).",
            )
        self._database.execute(
            "UPDATE ceilings SET rank = ? WHERE population = ? AND version = ?",
            (order, self.population, ceiling.version),
        )
        for event in held:
            self._database.execute(
                "INSERT OR IGNORE INTO curves VALUES (?, ?, ?, ?)",
                (event.noise_multiplier, event.sample_rate, event.records, budget.curve(event).tobytes()),
            )
        number = self._database.execute(
            "INSERT INTO reservations (population, plan, study, charges, held, open) VALUES (?, ?, ?, ?, ?, 1)",
            (self.population, plan, study, _text(asked), _text(held)),
        ).lastrowid
        told = {"reservation": number, "plan": plan, "study": study, "population": self.population}
        self._note("reserved", {**told, "charges": _plain(asked), "held": _plain(held), "ceiling": ceiling.version})

    def _why_not(self, study: str, held: list[Event], rounds: int, ceiling: Ceiling, order: float) -> str:
        """Asked, spent, ceiling, and what would fit."""
        counted, delta = self.counted(), ceiling.delta
        asked = self.price(held, delta)
        spent, whole = self.price(self.spent(), delta), self.price(counted, delta)
        quieter = budget.quieter(held, counted, ceiling.epsilon, delta, order)
        each = [event for event in held if event.purpose == "training"]
        once = [event for event in held if event.purpose != "training"]
        room = budget.room(ceiling.epsilon, delta, order) - budget.spending([*counted, *once], order)
        fit = max(0, int(rounds * room / budget.spending(each, order))) if each else 0
        would = [f"{fit} of its {rounds} rounds with this noise"] if fit else []
        if quieter:
            would.append(f"the whole of it with more noise, at epsilon {_floor(budget.epsilon(quieter, delta))}")
        return (
            f"Study {study} asks for epsilon {asked:.3g}; the {self.population} here have spent {spent:.3g}"
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
        with self._writing():
            known = self._all(
                "SELECT number, ticket FROM releases"
                " WHERE population = ? AND plan = ? AND run = ? AND round = ? AND purpose = ?",
                self.population, release.plan, release.run, number, event.purpose,
            )  # fmt: skip
            if known:
                last = self._all(
                    "SELECT max(number) FROM releases WHERE population = ? AND plan = ?", self.population, release.plan
                )
                if known[0] == (last[0][0], release.ticket):
                    return
                why = "is over" if known[0][1] == release.ticket else "was already answered for another model"
                raise TicketRefused(f"Round {number} {why}.", mend="Resume the run from its own checkpoint.")
            try:
                reservation = self._payer(release, epsilon, delta)
                self._database.execute(
                    "INSERT INTO releases (population, reservation, plan, run, round, ticket, noise_multiplier,"
                    " sample_rate, steps, purpose, records) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        self.population, reservation, release.plan, release.run, number, release.ticket,
                        event.noise_multiplier, event.sample_rate, event.steps, event.purpose, event.records,
                    ),
                )  # fmt: skip
            except BudgetExceeded as error:
                refused = error
                self._note_refusal(release.plan, "", str(error))
        if refused:
            self._publish()
            raise refused

    def _payer(self, release: Release, epsilon: float, delta: float) -> int:
        """The reservation that pays for a release."""
        event, number = release.event, release.round
        after = budget.epsilon([*self.history(release.plan), event], delta)
        if after > epsilon:
            raise BudgetExceeded(f"Round {number} would take epsilon to {after:.4g}; the plan allows {epsilon:.4g}.")
        paying = [one for one in self.reservations() if one.plan == release.plan and one.open]
        if not paying or not _covers(paying[0].held, [*paying[0].spent, event]):
            has = "has too little reserved for it" if paying else "has no open reservation"
            raise BudgetExceeded(
                f"Round {number} cannot be paid for: its plan {has}.",
                mend="The hospital reserves when it enrols; the coordinator has to begin or resume the run.",
            )
        ceiling = self._in_force()
        if not budget.fits([*self.spent(), event], ceiling.epsilon, ceiling.delta, self.order(ceiling)):
            raise BudgetExceeded(
                f"Round {number} would pass the ceiling of epsilon {ceiling.epsilon:.4g} that {ceiling.officer}"
                f" set on {ceiling.at[:10]}.",
                mend="The study ends here, unless an officer raises the ceiling (cloister-site budget ceiling).",
            )
        return paying[0].number

    def settle(self, plan: str) -> None:
        """End a plan's reservation, if one is open: what it did not spend is free again."""
        with self._writing():
            self._settle([one for one in self.reservations() if one.open and one.plan == plan], "closed")
        self._publish()

    def recover(self, name: str, reason: str = "") -> Reservation:
        """Settle the reservation of a study that will not go on, by its name or the start of its plan's digest.

        Raises:
            TicketRefused: nothing open is called that, or more than one reservation.
        """
        with self._writing():
            opened = [one for one in self.reservations() if one.open]
            found = [one for one in opened if one.study == name or (len(name) >= 6 and one.plan.startswith(name))]
            if len(found) != 1:
                shown = ", ".join(f"{one.study} ({one.plan[:12]})" for one in opened) or "none"
                many = f"{len(found)} open reservations are" if found else "No open reservation is"
                raise TicketRefused(f"{many} called {name}.", mend=f"Open now: {shown}. Give the digest of one.")
            self._settle(found, "recovered", reason)
        self._publish()
        return found[0]

    def _settle(self, reservations: Sequence[Reservation], how: str, reason: str = "") -> None:
        for one in reservations:
            self._database.execute("UPDATE reservations SET open = 0 WHERE number = ?", (one.number,))
            told = {"reservation": one.number, "plan": one.plan, "study": one.study, "population": self.population}
            self._note(how, {**told, "spent": _plain(one.spent), "reason": reason})

    # --- what was spent ------------------------------------------------------------------------------------
    def history(self, plan: str) -> list[Event]:
        """Every committed event of a plan, in order."""
        rows = self._all(
            "SELECT noise_multiplier, sample_rate, steps, purpose, records FROM releases"
            " WHERE population = ? AND plan = ? ORDER BY number",
            self.population, plan,
        )  # fmt: skip
        return [Event(*row) for row in rows]

    def reservations(self) -> list[Reservation]:
        """Every one that was made, in order."""
        rows = self._all(
            "SELECT number, plan, study, charges, held, open FROM reservations WHERE population = ? ORDER BY number",
            self.population,
        )
        spent = {
            number: tuple(
                merged(
                    Event(*row)
                    for row in self._all(f"SELECT {_EVENT} FROM releases WHERE reservation = ? {_SAME}", number)
                )
            )
            for number, *_ in rows
        }
        return [
            Reservation(number, plan, study, _events(charges), _events(held), spent[number], bool(is_open))
            for number, plan, study, charges, held, is_open in rows
        ]

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
            kept = self._all(
                "SELECT curve FROM curves WHERE noise_multiplier = ? AND sample_rate = ? AND records = ?",
                event.noise_multiplier, event.sample_rate, event.records,
            )  # fmt: skip
            total += event.steps * (np.frombuffer(kept[0][0]) if kept else budget.curve(event))
        return budget.epsilon_of(total, delta)

    def entries(self) -> list[audit.Entry]:
        """What the audit log tells of this ledger."""
        return [entry for entry in audit.verify(self._log) if _ours(entry)]

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    # --- the database and the log --------------------------------------------------------------------------
    @contextmanager
    def _writing(self) -> Generator[None, None, None]:
        """One transaction, and nobody else's beside it; on disk when it ends."""
        with self._lock, _readable(self.path), self._database:
            self._database.execute("BEGIN IMMEDIATE")
            yield

    def _all(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock, _readable(self.path):
            return self._database.execute(query, values).fetchall()

    def _note(self, what: str, said: Mapping[str, Any]) -> None:
        """What the audit log will say, in the transaction that makes it true."""
        self._database.execute(
            "INSERT INTO entries (what, said) VALUES (?, ?)", (f"budget.{what}", json.dumps(said, sort_keys=True))
        )

    def _note_refusal(self, plan: str, study: str, why: str) -> None:
        """The same refusal again says nothing new: a coordinator that keeps asking cannot fill the disk."""
        said = {"plan": plan, "study": study, "population": self.population, "why": why}
        last = self._all("SELECT what, said FROM entries ORDER BY number DESC LIMIT 1")[0]
        if last != ("budget.refused", json.dumps(said, sort_keys=True)):
            self._note("refused", said)

    def _publish(self) -> None:
        """Bring the audit log up to the database."""

        def missing(logged: list[audit.Entry]) -> list[tuple[str, Mapping[str, Any]]]:
            told = [(entry.what, entry.said) for entry in logged if _ours(entry)]
            rows = self._all("SELECT what, said FROM entries ORDER BY number")
            held = [(what, json.loads(said)) for what, said in rows]
            if held[: len(told)] != told:
                raise LedgerBroken(
                    f"{self.path} is not the ledger that {self._log.name} tells of, or an old copy of it."
                )
            return held[len(told) :]

        audit.append_where(self._log, missing)

    def _check(self) -> None:
        """Hold the tables against the log's entries: what was edited in one of them is found here.

        Raises:
            LedgerBroken: names the first reservation or ceiling that differs.
        """
        rows = self._all("SELECT what, said FROM entries ORDER BY number")
        told = [(what, json.loads(said)) for what, said in rows]
        told = [(what, said) for what, said in told if said.get("population") == self.population]
        made = {said["reservation"]: said for what, said in told if what == "budget.reserved"}
        ended = {said["reservation"]: said for what, said in told if what in ("budget.closed", "budget.recovered")}
        found = self.reservations()
        for one in found:
            said = made.pop(one.number, {})
            same = (said.get("plan"), said.get("charges"), said.get("held")) == (
                one.plan, _plain(one.charges), _plain(one.held)
            )  # fmt: skip
            if one.open:
                same = same and one.number not in ended and _covers(one.held, one.spent)
            else:
                same = same and ended.get(one.number, {}).get("spent") == _plain(one.spent)
            if not same:
                raise LedgerBroken(f"Reservation {one.number} in {self.path}, of {one.study}, is not as it was logged.")
        envelopes = [said["envelope"] for what, said in told if what == "budget.ceiling"]
        kept = self._all("SELECT envelope FROM ceilings WHERE population = ? ORDER BY version", self.population)
        if made or envelopes != [envelope for (envelope,) in kept]:
            raise LedgerBroken(f"{self.path} lacks a reservation or a ceiling that was logged.")


# --- small things ------------------------------------------------------------------------------------------
@contextmanager
def _readable(path: Path) -> Generator[None, None, None]:
    try:
        yield
    except sqlite3.Error as error:
        raise LedgerBroken(f"{path} cannot be used as a ledger: {error}.") from None


def _ours(entry: audit.Entry) -> bool:
    return entry.what.startswith("budget.")


def _plain(events: Iterable[Event]) -> list[dict[str, Any]]:
    return [asdict(event) for event in events]


def _text(events: Iterable[Event]) -> str:
    return json.dumps(_plain(events))


def _events(text: str) -> tuple[Event, ...]:
    return tuple(Event(**event) for event in json.loads(text))


def _less(events: Sequence[Event], spent: Iterable[Event]) -> list[Event]:
    """What of ``events`` was not spent."""
    return [
        Event(e.noise_multiplier, e.sample_rate, rest, e.purpose, e.records)
        for e in events
        if (rest := e.steps - sum(s.steps for s in spent if _mechanism(s) == _mechanism(e))) > 0
    ]


def _covers(held: Sequence[Event], spent: Iterable[Event]) -> bool:
    """Whether all that was spent, mechanism by mechanism, was held."""
    most = {_mechanism(event): event.steps for event in held}
    return all(event.steps <= most.get(_mechanism(event), 0) for event in merged(spent))


def _mechanism(event: Event) -> tuple[str, float, float, int]:
    return event.purpose, event.noise_multiplier, event.sample_rate, event.records


def _floor(value: float) -> str:
    """To two decimals, never rounded up."""
    return f"{int(value * 100) / 100:g}"
