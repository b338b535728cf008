"""The hospital's record of what its patients' privacy has cost, kept across crashes.

A round is committed before its first noisy byte exists. If the hospital dies after that and is asked the very
same thing again, nothing had left it and the same commitment stands; asked anything else, it refuses.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from cloister_shared import budget
from cloister_shared.budget import Event
from cloister_shared.errors import BudgetExceeded, TicketRefused


class Ledger:
    """One hospital's events, in SQLite, flushed to disk before ``commit`` returns."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS events (run TEXT, round INTEGER, ticket TEXT, noise_multiplier REAL,"
            " sample_rate REAL, steps INTEGER, purpose TEXT, PRIMARY KEY (run, round, purpose))"
        )

    def commit(self, run: str, number: int, ticket: str, event: Event, *, epsilon: float, delta: float) -> None:
        """Write an event down for good, or refuse it.

        ``ticket`` is the digest of what was asked; the same ticket may be committed again, at no cost.

        Raises:
            TicketRefused: this round was already committed for another ticket.
            BudgetExceeded: the run would pass ``epsilon`` at ``delta``.
        """
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            known = self._database.execute(
                "SELECT ticket FROM events WHERE run = ? AND round = ? AND purpose = ?", (run, number, event.purpose)
            ).fetchone()
            if known == (ticket,):
                return
            if known:
                raise TicketRefused(
                    f"Round {number} was already answered for another model.",
                    mend="Resume the run from its own checkpoint, or start a new run.",
                )
            after = budget.epsilon([*self.history(run), event], delta)
            if after > epsilon:
                raise BudgetExceeded(
                    f"Round {number} would take epsilon to {after:.4g}; the plan allows {epsilon:.4g}."
                )
            self._database.execute(
                "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)",
                (run, number, ticket, event.noise_multiplier, event.sample_rate, event.steps, event.purpose),
            )

    def history(self, run: str) -> list[Event]:
        """Every committed event of a run, in order."""
        rows = self._database.execute(
            "SELECT noise_multiplier, sample_rate, steps, purpose FROM events WHERE run = ? ORDER BY round, purpose",
            (run,),
        )
        return [Event(*row) for row in rows]

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()
