"""The file under the ledger: SQLite, flushed at every transaction, and the audit log that tells what it decided.

The database is the authority and the audit log beside it its public diary. An entry is written in the transaction
that makes it true, and copied to the log after it; what a crash kept from the log is copied when the book is next
opened or written. A database that lacks what the log tells is an old copy or another one, and is refused.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cloister_shared import audit
from cloister_shared.errors import LedgerBroken

_TABLES = """
CREATE TABLE book (id TEXT NOT NULL);
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

Entries = list[tuple[str, dict[str, Any]]]
"""What happened, and what is said of it; in order."""

_PREFIX = "budget."


class Book:
    """One hospital's. Several processes and threads may hold the same file; they write one after the other."""

    def __init__(self, path: Path) -> None:
        """``audit.jsonl`` lies beside ``path``.

        Raises:
            LedgerBroken: it is no ledger, or not the one that the audit log tells of.
            AuditBroken: the log was changed.
        """
        self.path, self.log = path, path.with_name("audit.jsonl")
        self._lock = threading.RLock()
        if not path.exists() and begun(path):
            raise LedgerBroken(f"{path} is missing, and {self.log.name} tells of it.")
        with _readable(path):
            self.database = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
            self.database.execute("PRAGMA journal_mode = WAL")
            self.database.execute("PRAGMA synchronous = FULL")
        with self.writing():
            if not self.rows("SELECT 1 FROM sqlite_master WHERE name = 'entries'"):
                self._begin()
        self.id = self._name()
        """A name that no other book has."""
        self.publish()

    def _begin(self) -> None:
        if self.rows("SELECT 1 FROM sqlite_master"):
            raise LedgerBroken(f"{self.path} is not a ledger of this version.", mend="Move it away to begin anew.")
        for statement in _TABLES.split(";\n"):
            self.database.execute(statement)
        own = uuid.uuid4().hex
        self.database.execute("INSERT INTO book VALUES (?)", (own,))
        self.note("ledger", {"ledger": own})

    def _name(self) -> str:
        found = self.rows("SELECT id FROM book")
        if len(found) != 1:
            raise LedgerBroken(f"{self.path} has lost its name.")
        return str(found[0][0])

    @contextmanager
    def writing(self) -> Generator[None, None, None]:
        """One transaction, and nobody else's beside it; on disk when it ends."""
        with self._lock, _readable(self.path), self.database:
            self.database.execute("BEGIN IMMEDIATE")
            yield

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """All that a query finds, or what a change to the tables returns: nothing."""
        with self._lock, _readable(self.path):
            return self.database.execute(query, values).fetchall()

    def note(self, what: str, said: Mapping[str, Any], *, once: bool = False) -> None:
        """Within ``writing``: what the audit log will say of this transaction.

        ``once``: not if it was said already and nothing but refusals has been said since. So whoever keeps asking
        what is refused does not fill the disk.
        """
        entry = (_PREFIX + what, json.dumps(said, sort_keys=True))
        since = "number > (SELECT max(number) FROM entries WHERE what != ?)"
        if once and self.rows(f"SELECT 1 FROM entries WHERE what = ? AND said = ? AND {since}", *entry, entry[0]):
            return
        self.rows("INSERT INTO entries (what, said) VALUES (?, ?)", *entry)

    def noted(self) -> Entries:
        """What the database says happened.

        Raises:
            LedgerBroken: it cannot be read.
        """
        found = self.rows("SELECT what, said FROM entries ORDER BY number")
        entries = [(what, self.value(said)) for what, said in found]
        if not all(isinstance(said, dict) for _, said in entries):
            raise LedgerBroken(f"{self.path} holds an entry that was not written by Cloister.")
        return entries

    def value(self, text: str) -> Any:
        """A JSON value that a table holds.

        Raises:
            LedgerBroken: it is none.
        """
        try:
            return json.loads(text)
        except (ValueError, TypeError):
            raise LedgerBroken(f"{self.path} holds a row that was not written by Cloister.") from None

    def told(self) -> list[audit.Entry]:
        """What the audit log says happened to this ledger.

        Raises:
            AuditBroken: the log was changed.
        """
        return _told(self.log)

    def publish(self) -> None:
        """Bring the audit log up to the database.

        Raises:
            LedgerBroken: the log tells of what the database does not hold.
            AuditBroken: the log was changed.
        """

        def missing(logged: list[audit.Entry]) -> list[tuple[str, Mapping[str, Any]]]:
            told = [(entry.what, entry.said) for entry in logged if entry.what.startswith(_PREFIX)]
            noted = self.noted()
            if noted[: len(told)] != told:
                raise LedgerBroken(f"{self.path} is not the ledger that {self.log.name} tells of, or an old copy.")
            return list(noted[len(told) :])

        audit.append_where(self.log, missing)

    def close(self) -> None:
        """Let go of the file."""
        self.database.close()


def begun(path: Path) -> bool:
    """Whether there is a ledger at ``path``, or the audit log beside it tells of one.

    Raises:
        AuditBroken: the log was changed.
    """
    log = path.with_name("audit.jsonl")
    return path.exists() or (log.exists() and bool(_told(log)))


def _told(log: Path) -> list[audit.Entry]:
    return [entry for entry in audit.verify(log) if entry.what.startswith(_PREFIX)]


@contextmanager
def _readable(path: Path) -> Generator[None, None, None]:
    try:
        yield
    except sqlite3.Error as error:
        raise LedgerBroken(f"{path} cannot be used as a ledger: {error}.") from None
