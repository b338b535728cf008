"""The egress log: what left this hospital, a line a message, on disk before the message is sent.

Each line names the study, the round, the kind of message, its octets, the SHA-256 that all of them follow from, and
what kinds of values it held: names, types and lengths of vectors, keys of the header. Never a value. The lines are
chained like those of the audit log (see ``audit``), by the agent alone, so a line takes one flush to disk.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any

from cloister_client.objects import Contents
from cloister_shared import audit, durable

_SENT = "sent"


class Egress:
    """The log in one file. Any thread may write; another process only reads."""

    def __init__(self, path: Path) -> None:
        """Raises AuditBroken if a line is not what was written."""
        self._lock, self._end = threading.Lock(), 0
        self._last: audit.Entry | None = None
        for entry in audit.read_entries(path, _whole_lines(path)):
            self._last, self._end = entry, self._end + len(entry.line)
        if not path.exists():
            durable.save_text(path, "")
        self._file = path.open("r+b", buffering=0)
        self._rewind()  # over the beginning of a line whose message was never sent

    def note(self, study: str, run: str, kind: str, message: str, octets: int, held: Contents) -> None:
        """Write down a message that is about to leave; on disk when this returns.

        ``message`` is the name of its root object, which is the SHA-256 of it.

        Raises:
            OSError: the disk did not take it; nothing of it is in the log.
        """
        said: dict[str, object] = {"study": study, "run": run, "kind": kind, "message": message, "octets": octets}
        if held.round is not None:
            said["round"] = held.round
        if held.error is not None:
            said["error"] = held.error
        else:
            said |= {"vectors": [list(vector) for vector in held.vectors], "header": list(held.header)}
        with self._lock:
            entry = audit.after(self._last, _SENT, said)
            try:
                left = memoryview(entry.line)
                while left:
                    left = left[self._file.write(left) :]
                os.fsync(self._file.fileno())
            except OSError:
                self._rewind()
                raise
            self._last, self._end = entry, self._end + len(entry.line)

    def close(self) -> None:
        """Write no more."""
        self._file.close()

    def _rewind(self) -> None:
        self._file.truncate(self._end)
        self._file.seek(self._end)


def told(path: Path) -> str:
    """The log as a table of at most 100 columns, its chain verified.

    Raises:
        AuditBroken: a line is not what was written.
    """
    lines: list[str] = []
    count, total, head = 0, 0, ""
    for entry in audit.read_entries(path, _whole_lines(path)):
        said = entry.said
        count, total, head = count + 1, total + int(said["octets"]), entry.hash
        round_ = f"round {said['round']}" if "round" in said else ""
        lines.append(
            f"{entry.at[:19].replace('T', ' ')}  study {said['study'][:12]}  {round_:<10}  {said['kind'][:16]:<16}"
            f"  {said['octets']:>15,} octets"
        )
        lines += wrap(_held(said), 100, initial_indent="    ", subsequent_indent="    ")
    if not count:
        return "Nothing has left this hospital yet."
    messages = f"{count:,} message{'s' if count > 1 else ''}"
    return "\n".join([*lines, f"{messages}, {total:,} octets; the log's head is {head[:16]}"])


def _held(said: Mapping[str, Any]) -> str:
    if "error" in said:
        return f"error {said['error']}"
    vectors = [f"{name} ({kind} x {length:,})" for name, kind, length in said["vectors"]]
    return ", ".join([*vectors, *said["header"]])


def _whole_lines(path: Path) -> Iterator[bytes]:
    """Without the last one if a crash cut it short, before its message was sent."""
    if path.exists():
        with path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))
