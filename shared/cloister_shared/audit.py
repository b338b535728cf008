"""The audit log: what was decided, in lines of JSON, each of which holds the hash of the line before.

A line cannot be changed, taken out or put in without every later hash changing, so whoever was once told the last
hash (``export`` prints it) can tell whether the log they are shown is still the one of that day. Nobody with the
file alone can; the log is no proof against its owner.

Beside the log lies its head: the newest line, flushed to disk before it is appended. A log that ends in less than
its head, by that one line, was interrupted there, and the line is written out; one that ends in anything else was
cut, and is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from cloister_shared import durable
from cloister_shared.errors import AuditBroken

START = "0" * 64
"""What stands for the hash before the first entry."""

_KEYS = {"number", "at", "what", "said", "before", "hash"}


@dataclass(frozen=True)
class Entry:
    """One line: the ``number``-th thing that happened, at what time (UTC), and what was said of it."""

    number: int
    at: str
    what: str
    said: Mapping[str, Any]
    before: str
    hash: str

    @property
    def line(self) -> bytes:
        """As it stands in the file."""
        return _line(self.number, self.at, self.what, self.said, self.before, self.hash)


def append(path: Path, what: str, said: Mapping[str, Any]) -> Entry:
    """Write down that something happened; on disk when this returns.

    Raises:
        AuditBroken: the log as it is does not end where it was left.
    """
    with durable.locked(path):
        return append_locked(path, read_locked(path), what, said)


def append_where(path: Path, missing: Callable[[list[Entry]], list[tuple[str, Mapping[str, Any]]]]) -> list[Entry]:
    """Append what ``missing`` finds is not in the log yet, with nobody else writing in between; the whole log.

    Raises:
        AuditBroken: the log was changed.
    """
    with durable.locked(path):
        entries = read_locked(path)
        for what, said in missing(entries):
            entries.append(append_locked(path, entries, what, said))
        return entries


def verify(path: Path) -> list[Entry]:
    """The whole log, every hash checked.

    Raises:
        AuditBroken: names the first entry that is not what it was.
    """
    with durable.locked(path):
        return read_locked(path)


def export(path: Path) -> dict[str, Any]:
    """The log as one JSON value, with its head: the hash that stands for all of it.

    Raises:
        AuditBroken: the log was changed.
    """
    entries = verify(path)
    lines: list[Any] = [json.loads(entry.line) for entry in entries]
    return {"head": entries[-1].hash if entries else START, "entries": lines}


# --- the chain alone, for a log that has one writer and no head ---------------------------------------------
def after(last: Entry | None, what: str, said: Mapping[str, Any]) -> Entry:
    """The entry that follows ``last`` at this moment."""
    before, number = (last.hash, last.number + 1) if last else (START, 1)
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return Entry(number, at, what, said, before, _hash(number, at, what, said, before))


def read_entries(path: Path, lines: Iterable[bytes]) -> Iterator[Entry]:
    """The entries in these whole lines of the log at ``path``, one after the other, every hash checked.

    Raises:
        AuditBroken: names the first entry that is not what it was.
    """
    before = START
    for number, line in enumerate(lines, start=1):
        entry = _read(path, line, number, before)
        before = entry.hash
        yield entry


# --- with the lock held ------------------------------------------------------------------------------------
def append_locked(path: Path, entries: list[Entry], what: str, said: Mapping[str, Any]) -> Entry:
    """``append`` for who holds ``durable.locked(path)`` and has just read the log."""
    entry = after(entries[-1] if entries else None, what, said)
    durable.save_text(_head(path), entry.line.decode())
    _write(path, entry.line)
    return entry


def read_locked(path: Path) -> list[Entry]:
    """``verify`` for who holds ``durable.locked(path)``; writes out the line that a crash cut short."""
    held = path.read_bytes() if path.exists() else b""
    newest = _head(path).read_bytes() if _head(path).exists() else b""
    whole, tail = held[: held.rfind(b"\n") + 1], held[held.rfind(b"\n") + 1 :]
    entries = list(read_entries(path, whole.splitlines(keepends=True)))
    if not tail and newest == (entries[-1].line if entries else b""):
        return entries
    # Only one state is a crash's doing: the head is the next line, and the file holds a beginning of it.
    try:
        last = _read(_head(path), newest, len(entries) + 1, entries[-1].hash if entries else START)
    except AuditBroken:
        after = f"ends in something else after entry {len(entries)}" if tail else f"ends at entry {len(entries)}"
        raise AuditBroken(f"{path} {after}, and its head tells of another end.", mend=_MEND) from None
    if not newest.startswith(tail):
        raise AuditBroken(f"{path} ends in something else after entry {len(entries)}.", mend=_MEND)
    _write(path, newest[len(tail) :])
    return [*entries, last]


_MEND = "Restore the log and its .head from a backup; until then nothing private leaves this hospital."


def _read(path: Path, line: bytes, number: int, before: str) -> Entry:
    try:
        value: Any = json.loads(line)
        if not isinstance(value, dict) or set(cast(dict[str, Any], value)) != _KEYS:
            raise TypeError("other keys")
        entry = Entry(**cast(dict[str, Any], value))
        expected = _hash(number, entry.at, entry.what, entry.said, before)
        if entry.number == number and entry.before == before and entry.hash == expected and entry.line == line:
            return entry
    except (ValueError, TypeError, RecursionError):
        pass  # said below, in the same words: it is not the line that was written
    raise AuditBroken(f"Entry {number} of {path} is not what was written, or not in its place.", mend=_MEND)


def _write(path: Path, octets: bytes) -> None:
    if not path.exists():
        durable.save_text(path, "")  # which flushes the folder as well
    with path.open("ab") as file:
        file.write(octets)
        file.flush()
        os.fsync(file.fileno())


def _head(path: Path) -> Path:
    return path.with_name(path.name + ".head")


def _hash(number: int, at: str, what: str, said: Mapping[str, Any], before: str) -> str:
    return hashlib.sha256(_line(number, at, what, said, before, "")).hexdigest()


def _line(number: int, at: str, what: str, said: Mapping[str, Any], before: str, own: str) -> bytes:
    value = {"number": number, "at": at, "what": what, "said": said, "before": before, "hash": own}
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"
