"""The hospital's record of what its patients' privacy has cost, kept across crashes.

A release is committed before its first noisy byte exists. If the hospital dies after that and is asked the very
same thing again, nothing had left it and the same commitment stands. Asked anything else for that round, or
asked again once a later release was committed, it refuses: a commitment pays for one draw of noise.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

from cloister_shared import budget
from cloister_shared.budget import Event
from cloister_shared.errors import BudgetExceeded, TicketRefused


@dataclass(frozen=True)
class Release:
    """One answer that leaves the hospital with noise: what for, what was asked (a digest), and what it costs."""

    plan: str
    run: str
    round: int
    ticket: str
    event: Event


class Ledger:
    """One hospital's releases, in SQLite, flushed to disk before ``commit`` returns."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS releases (number INTEGER PRIMARY KEY, plan TEXT, run TEXT, round INTEGER,"
            " ticket TEXT, noise_multiplier REAL, sample_rate REAL, steps INTEGER, purpose TEXT,"
            " UNIQUE (run, round, purpose))"
        )

    def commit(self, release: Release, *, epsilon: float, delta: float) -> None:
        """Write a release down for good, or refuse it.

        The plan's epsilon is for all its runs together: whoever names the runs cannot renew it.

        Raises:
            TicketRefused: this round was committed for another ticket, or is over.
            BudgetExceeded: the plan would pass ``epsilon`` at ``delta``.
        """
        event, number = release.event, release.round
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            known = self._database.execute(
                "SELECT number, ticket FROM releases WHERE run = ? AND round = ? AND purpose = ?",
                (release.run, number, event.purpose),
            ).fetchone()
            if known:
                last = self._database.execute("SELECT max(number) FROM releases WHERE plan = ?", (release.plan,))
                if known == (last.fetchone()[0], release.ticket):
                    return
                why = "is over" if known[1] == release.ticket else "was already answered for another model"
                raise TicketRefused(f"Round {number} {why}.", mend="Resume the run from its own checkpoint.")
            after = budget.epsilon([*self.history(release.plan), event], delta)
            if after > epsilon:
                raise BudgetExceeded(
                    f"Round {number} would take epsilon to {after:.4g}; the plan allows {epsilon:.4g}."
                )
            self._database.execute(
                "INSERT INTO releases (plan, run, round, ticket, noise_multiplier, sample_rate, steps, purpose)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    release.plan,
                    release.run,
                    number,
                    release.ticket,
                    event.noise_multiplier,
                    event.sample_rate,
                    event.steps,
                    event.purpose,
                ),
            )

    def history(self, plan: str) -> list[Event]:
        """Every committed event of a plan, in order."""
        rows = self._database.execute(
            "SELECT noise_multiplier, sample_rate, steps, purpose FROM releases WHERE plan = ? ORDER BY number", (plan,)
        )
        return [Event(*row) for row in rows]

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()
