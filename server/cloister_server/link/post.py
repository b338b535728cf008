"""What is asked of Flower's tables many times a second: straight to SQLite, read only, in microseconds.

Flower keeps its unsigned 64-bit numbers as signed ones.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable
from pathlib import Path

_OPEN = """FROM message_ins
    WHERE NOT EXISTS (SELECT 1 FROM message_res WHERE reply_to_message_id = message_ins.message_id)"""
"""Messages that wait for an answer. Whether Flower ever delivered them does not matter."""


class Post:
    """One reader of the messages; of one thread."""

    def __init__(self, database: Path) -> None:
        self._link = sqlite3.connect(database, isolation_level=None, check_same_thread=False)
        self._link.execute("PRAGMA query_only = ON")
        self._link.execute("PRAGMA busy_timeout = 5000")

    def close(self) -> None:
        """Read no more."""
        self._link.close()

    def version(self) -> int:
        """Another number after anybody else has written anything."""
        return self._link.execute("PRAGMA data_version").fetchone()[0]

    def waiting(self) -> dict[int, set[str]]:
        """Of each node, the messages that it has not answered."""
        found = dict[int, set[str]]()
        for node, message in self._link.execute(f"SELECT dst_node_id, message_id {_OPEN}"):
            found.setdefault(_unsigned(node), set()).add(message)
        return found

    def next(self, node: int, holding: Collection[str], now: float) -> tuple[int, str] | None:
        """The oldest message that the node has not answered and is not working on: its run and name.

        So one whose way was cut off, or whose reader died, is given again.
        """
        row = self._link.execute(
            f"""SELECT run_id, message_id {_OPEN} AND dst_node_id = ? AND created_at + ttl > ?
                AND message_id NOT IN (SELECT value FROM json_each(?)) ORDER BY created_at, message_id""",
            (_signed(node), now, json.dumps(list(holding))),
        ).fetchone()
        return row and (_unsigned(row[0]), row[1])

    def asks(self, node: int, run: int, message: str = "") -> bool:
        """Whether the node is asked something in this run; this very message, if it is named."""
        return bool(
            self._link.execute(
                "SELECT 1 FROM message_ins WHERE dst_node_id = ? AND run_id = ? AND (message_id = ? OR ? = '')",
                (_signed(node), _signed(run), message, message),
            ).fetchone()
        )

    def answered(self, messages: Iterable[str]) -> dict[str, str]:
        """Of these messages, those that have a whole reply, in the order in which they came; message to reply."""
        return dict(
            self._link.execute(
                """SELECT reply_to_message_id, message_id FROM message_res
                    WHERE reply_to_message_id IN (SELECT value FROM json_each(?)) ORDER BY rowid""",
                (json.dumps(list(messages)),),
            )
        )

    def silent(self, messages: Iterable[str], now: float) -> list[str]:
        """Of these messages, those to a node whose time is up, or that is not there at all."""
        rows = self._link.execute(
            """SELECT value FROM json_each(?) LEFT JOIN message_ins ON message_id = value
                LEFT JOIN node ON node.node_id = dst_node_id AND status != 'unregistered'
                WHERE coalesce(online_until, 0.0) < ?""",
            (json.dumps(list(messages)), now),
        )
        return [message for (message,) in rows]


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _unsigned(number: int) -> int:
    return number % 2**64
