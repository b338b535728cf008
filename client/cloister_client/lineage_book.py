"""The file that remembers whose rows each study used: pseudonyms in SQLite, flushed at every transaction.

``lineage.sqlite`` and its key ``lineage.key`` lie beside ``site.yaml`` and outlive the agent's folder. The audit log
has a line for each new set of patients: how many, and the SHA-256 of their sorted pseudonyms. A file that lacks what
the log tells of it is an old copy or another one, and is refused.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cloister_shared import audit, durable
from cloister_shared.errors import KeyBroken, LineageBroken
from cloister_shared.pseudonyms import SIZE, Names, from_octets, key_name, new_key, read_key

FILE, KEY = "lineage.sqlite", "lineage.key"

_TABLES = """
CREATE TABLE lineage (id TEXT NOT NULL, key TEXT NOT NULL);
CREATE TABLE studies (plan TEXT PRIMARY KEY, facts TEXT NOT NULL);
CREATE TABLE sets (sha256 TEXT PRIMARY KEY, members BLOB NOT NULL);
CREATE TABLE uses (number INTEGER PRIMARY KEY, plan TEXT NOT NULL, train TEXT NOT NULL, held_out TEXT NOT NULL,
    began INTEGER NOT NULL, at TEXT NOT NULL, first INTEGER, last INTEGER, statistics INTEGER, judged INTEGER);
CREATE TABLE models (plan TEXT PRIMARY KEY, sha256 TEXT NOT NULL, at TEXT NOT NULL);
"""
_BEGUN, _SET = "lineage.begun", "lineage.set"


@dataclass(frozen=True)
class Facts:
    """What has to be known of a study when its plan is gone."""

    plan: str
    study: str
    version: int
    rounds: int
    promise: str
    """Of its privacy, in a sentence."""
    unit: str
    """Of differential privacy; "" without."""
    epsilon: float | None
    delta: float | None
    shared: bool
    """Whether the hospitals share the noise."""
    exact: bool
    """Whether metrics of held-out rows leave without noise, in every round."""
    readiness: bool = False
    """Whether what is told before round 1 is of held-out rows too."""


@dataclass(frozen=True)
class Use:
    """That a study used one set of training patients and one of held-out ones: digests, "" where nobody is known."""

    number: int
    plan: str
    train: str
    held_out: str
    began: int
    """The round in which it was first used: 0 for the statistics before round 1, one past the last for the end."""
    at: str
    first: int | None
    """First round that it trained in, if any."""
    last: int | None
    statistics: bool
    judged: bool
    """Whether the final model was judged with it."""


class Patients:
    """The sorted pseudonyms of a set; ``None`` where the plan does not say whose a row is."""

    def __init__(self, names: Names | None) -> None:
        self.octets = b"" if names is None else names.tobytes()
        self.sha256 = "" if names is None else hashlib.sha256(self.octets).hexdigest()
        """What the set is known by; "" where nobody is known."""


class LineageBook:
    """One hospital's. Several processes may hold the same file; they write one after the other."""

    def __init__(self, folder: Path) -> None:
        """Begun in the hospital's ``folder``, where there is none; ``audit.jsonl`` lies beside it.

        Raises:
            LineageBroken: it cannot be read, its key is lost, or it is not the one that the audit log tells of.
            AuditBroken: the log was changed.
        """
        self.path, self.log = folder / FILE, folder / "audit.jsonl"
        self._lock = threading.RLock()
        with durable.locked(self.path):  # two that begin it at once would find it locked, whatever the timeout
            self.key = key_in(folder)
            self.path.touch(mode=0o600)
            self._database = self._opened()
        found = self._rows("SELECT id, key FROM lineage")
        if len(found) != 1:
            raise self._broken("has lost its name")
        self.id, key = str(found[0][0]), found[0][1]
        if key != key_name(self.key):
            raise self._broken(f"was made with another key than the one in {KEY}")
        self.publish()

    def _opened(self) -> sqlite3.Connection:
        with self._readable():
            made = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            made.execute("PRAGMA journal_mode = WAL")
            made.execute("PRAGMA synchronous = FULL")
            with made:
                made.execute("BEGIN IMMEDIATE")
                if not made.execute("SELECT 1 FROM sqlite_master").fetchall():
                    for statement in _TABLES.split(";\n"):
                        made.execute(statement)
                    made.execute("INSERT INTO lineage VALUES (?, ?)", (uuid.uuid4().hex, key_name(self.key)))
            return made

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    # --- write ---------------------------------------------------------------------------------------------
    def used(self, facts: Facts, number: int, train: Patients, held_out: Patients) -> None:
        """Round ``number`` of a study is about to use these patients; on disk and in the log when it returns.

        Round 0 are the statistics, the one past the last the end.
        """
        digests = train.sha256, held_out.sha256
        with self._writing():
            newest = next(iter(reversed(self.uses(facts.plan))), None)
            fresh = newest is None or (newest.train, newest.held_out) != digests or number < newest.began
            if fresh:
                self._rows("INSERT OR REPLACE INTO studies VALUES (?, ?)", facts.plan, json.dumps(asdict(facts)))
                for patients in (train, held_out):
                    if patients.sha256:
                        self._rows("INSERT OR IGNORE INTO sets VALUES (?, ?)", patients.sha256, patients.octets)
                self._rows(
                    "INSERT INTO uses (plan, train, held_out, began, at) VALUES (?, ?, ?, ?, ?)",
                    facts.plan, *digests, number, _now(),
                )  # fmt: skip
            what = "first = min(ifnull(first, ?1), ?1), last = max(ifnull(last, ?1), ?1)"
            if not 0 < number <= facts.rounds:
                what = "statistics = (?1 = 0)" if number == 0 else "judged = (?1 > 0)"
            self._rows(f"UPDATE uses SET {what} WHERE number = (SELECT max(number) FROM uses WHERE plan = ?2)",
                       number, facts.plan)  # fmt: skip
        if fresh:
            self.publish()

    def received(self, plan: str, sha256: str) -> None:
        """The final model of a study came: the SHA-256 of the file that is released of it."""
        with self._writing():
            if self.model(plan) != sha256:
                self._rows("INSERT OR REPLACE INTO models VALUES (?, ?, ?)", plan, sha256, _now())

    def publish(self) -> None:
        """Bring the audit log up to the file.

        Raises:
            LineageBroken: the log tells of what the file does not hold.
            AuditBroken: the log was changed.
        """

        def missing(logged: list[audit.Entry]) -> list[tuple[str, Mapping[str, Any]]]:
            told = [(e.what, e.said) for e in logged if e.what in (_BEGUN, _SET) and e.said.get("lineage") == self.id]
            held = self._entries()
            if held[: len(told)] != told:
                raise self._broken(f"is not the one that {self.log.name} tells of, or an old copy")
            return list(held[len(told) :])

        audit.append_where(self.log, missing)

    def _entries(self) -> list[tuple[str, Mapping[str, Any]]]:
        """What the log says of this file, or is to. One query, or another process's new set would be seen in half."""
        said: list[tuple[str, Mapping[str, Any]]] = [(_BEGUN, {"lineage": self.id, "key": key_name(self.key)})]
        for plan, facts, began, train, trained, held_out, held in self._rows(
            f"SELECT u.plan, s.facts, u.began, u.train, length(t.members) / {SIZE}, u.held_out,"
            f" length(h.members) / {SIZE} FROM uses u LEFT JOIN studies s ON s.plan = u.plan"
            " LEFT JOIN sets t ON t.sha256 = u.train LEFT JOIN sets h ON h.sha256 = u.held_out ORDER BY u.number"
        ):
            sets = {
                "train": {"count": trained, "sha256": train} if train else None,
                "held_out": {"count": held, "sha256": held_out} if held_out else None,
            }
            told = {"lineage": self.id, "plan": plan, "study": self._read(facts).study, "round": began}
            said.append((_SET, {**told, **sets}))
        return said

    # --- read ----------------------------------------------------------------------------------------------
    def uses(self, plan: str = "") -> list[Use]:
        """Of one study, or of all; in order."""
        where, values = ("WHERE plan = ?", [plan]) if plan else ("", [])
        found = self._rows(f"SELECT * FROM uses {where} ORDER BY number", *values)
        return [
            Use(number, of, train, held_out, began, at, first, last, bool(statistics), bool(judged))
            for number, of, train, held_out, began, at, first, last, statistics, judged in found
        ]

    def facts(self, plan: str) -> Facts:
        """What is known of a study.

        Raises:
            LineageBroken: nothing that can be read.
        """
        found = self._rows("SELECT facts FROM studies WHERE plan = ?", plan)
        return self._read(found[0][0] if found else None)

    def members(self, digest: str) -> Names:
        """The pseudonyms of a set, sorted.

        Raises:
            LineageBroken: they are not those that were written.
        """
        found = self._rows("SELECT members FROM sets WHERE sha256 = ?", digest)
        if len(found) != 1 or not isinstance(found[0][0], bytes) or hashlib.sha256(found[0][0]).hexdigest() != digest:
            raise self._broken("holds a set of patients that is not the one that was written")
        return from_octets(found[0][0])

    def model(self, plan: str) -> str:
        """The SHA-256 of the file that is released of the study's final model; "" if it never came here."""
        return next((str(row[0]) for row in self._rows("SELECT sha256 FROM models WHERE plan = ?", plan)), "")

    def lost(self) -> list[audit.Entry]:
        """What the audit log tells of sets that another file held, which is not here any more."""
        return [e for e in audit.verify(self.log) if e.what == _SET and e.said.get("lineage") != self.id]

    # --- small things --------------------------------------------------------------------------------------
    def _read(self, facts: Any) -> Facts:
        try:
            return Facts(**json.loads(facts))
        except (ValueError, TypeError):
            raise self._broken("holds a study that was not written by Cloister") from None

    @contextmanager
    def _writing(self) -> Generator[None, None, None]:
        with self._lock, self._readable(), self._database:
            self._database.execute("BEGIN IMMEDIATE")
            yield

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock, self._readable():
            return self._database.execute(query, values).fetchall()

    @contextmanager
    def _readable(self) -> Generator[None, None, None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._broken(f"cannot be used ({error})") from None

    def _broken(self, how: str) -> LineageBroken:
        return LineageBroken(f"{self.path} {how}.", mend=_MEND)


_MEND = (
    f"Restore {FILE}, {KEY} and the audit log from one backup. If there is none, move {FILE} away: a new one is begun,"
    " and cloister-site lineage names the studies that nobody can be traced in any more."
)


def key_in(folder: Path) -> bytes:
    """The key of this hospital's pseudonyms, made where there is nothing yet that needs an older one.

    Raises:
        LineageBroken: it is lost or damaged.
    """
    try:
        return read_key(folder / KEY) if (folder / FILE).exists() else new_key(folder / KEY)
    except KeyBroken as error:
        raise LineageBroken(f"{error.said} Nobody can be found in {FILE} without it.", mend=_MEND) from None


def begun(folder: Path) -> bool:
    """Whether this hospital has such a file, or its audit log tells of one.

    Raises:
        LineageBroken: it is gone.
        AuditBroken: the log was changed.
    """
    if (folder / FILE).exists():
        return True
    log = folder / "audit.jsonl"
    if log.exists() and any(entry.what == _BEGUN for entry in audit.verify(log)):
        raise LineageBroken(f"{folder / FILE} is missing, and {log.name} tells of it.", mend=_GONE)
    return False


_GONE = f"Restore {FILE}, {KEY} and the audit log from one backup; the next study that trains begins a new one."


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
