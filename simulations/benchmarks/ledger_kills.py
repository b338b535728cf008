"""A hospital's ledger, killed with SIGKILL at every durable write of a study's life, one after another.

The life: name an officer, set a ceiling, change it, reserve a plan, commit three of its four rounds, each followed
by its noisy byte, and settle. A point is a statement that SQLite is about to run within a transaction or that ends
it, a flush or a rename of a file before and after it, and the middle of a line of the audit log.

After each kill three things are held: every byte that left was committed before; what was reserved and not spent is
free again after an explicit, logged command; and the same life, taken up again, ends as one that was not killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from cloister_client.ceilings import officers_of, pin_officer
from cloister_client.ledger import Cost, Ledger, Release
from cloister_shared import audit, budget
from cloister_shared.budget import Event
from cloister_shared.envelope import read_identity

EVENT, DELTA, ROUNDS = Event(10.0, 1.0, 2), 1e-5, 3
CEILING = budget.epsilon([Event(10.0, 1.0, 13)], DELTA)
COST = Cost("plan-1" * 8, "first", (Event(10.0, 1.0, 8),), 3.0, DELTA, rounds=4)
OTHER = Cost("plan-2" * 8, "other", (Event(10.0, 1.0, 6),), 3.0, DELTA, rounds=3)
"""Fits beside the three rounds that are spent, and not beside the four that are reserved."""

_WRITES = ("BEGIN", "COMMIT", "INSERT", "UPDATE", "CREATE")


@dataclass(frozen=True)
class Kill:
    """Where it was killed, and what was wrong after it; nothing where all is sound."""

    point: str
    wrong: str


def life(folder: Path) -> None:
    """From the first officer to the settled plan; begun again, it goes on where it was."""
    folder.mkdir(exist_ok=True)
    ledger, key = Ledger(folder / "ledger.sqlite"), folder / "ada.key"
    if "ada" not in officers_of(folder):
        pin_officer(ledger.book, "ada", key)
    for epsilon in (2 * CEILING, CEILING):
        if (now := ledger.ceiling()) is None or now.epsilon > epsilon:
            ledger.set_ceiling(epsilon, DELTA, officer="ada", identity=read_identity(key))
    if (folder / "settled").exists():
        return
    ledger.reserve(COST)
    for number in range(1, ROUNDS + 1):
        if number not in answered(folder):
            ledger.commit(Release(COST.plan, "run", number, f"t{number}", EVENT), epsilon=COST.epsilon, delta=DELTA)
            (folder / f"noisy-{number}").touch()
    ledger.settle(COST.plan)
    (folder / "settled").touch()
    ledger.close()


def answered(folder: Path) -> set[int]:
    """The rounds whose noisy byte has left."""
    return {number for number in range(1, ROUNDS + 1) if (folder / f"noisy-{number}").exists()}


def walk() -> list[Kill]:
    """Kill a life at its first point, another at its second, and so on until one is not killed.

    In memory where the machine has such a folder: SIGKILL takes nothing from the page cache, and nobody waits.
    """
    with TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as scratch:
        return _walk(Path(scratch))


def _walk(folder: Path) -> list[Kill]:
    kills: list[Kill] = []
    life(folder / "whole")  # so that no child has to compute a curve
    wrong_after(folder / "whole", folder / "copy")
    while True:
        place, named = folder / f"{len(kills)}", folder / f"{len(kills)}.point"
        child = os.fork()
        if child == 0:
            try:
                _armed(len(kills) + 1, named)
                life(place)
                os._exit(0)
            finally:
                os._exit(3)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if ended == 0:
            kills.append(Kill("none", wrong_after(place, folder / "copy")))
            return kills
        assert ended == -signal.SIGKILL, f"the life ended with {ended}"
        kills.append(Kill(named.read_text(), wrong_after(place, folder / "copy")))
        shutil.rmtree(place)


def wrong_after(place: Path, copy: Path) -> str:
    """What is not as it should be in a hospital's folder after a kill."""
    shutil.rmtree(copy, ignore_errors=True)
    if place.exists():
        shutil.copytree(place, copy)
    try:
        ledger = Ledger(_begun(copy) / "ledger.sqlite")
        spent = len(ledger.history(COST.plan))
        if spent < len(answered(copy)):
            return "a byte left that was not committed"
        if any(one.open for one in ledger.reservations()):
            ledger.recover("first", "killed")
        if ledger.counted() != ledger.spent() or len(ledger.history(COST.plan)) != spent:
            return "what was not spent is not free after the reservation was recovered"
        if ledger.ceiling() is None:
            ledger.set_ceiling(CEILING, DELTA, officer="ada", identity=read_identity(copy / "ada.key"))
        ledger.reserve(OTHER)
        ledger.close()
        life(place)
        ledger = Ledger(place / "ledger.sqlite")
        if ledger.counted() != [Event(10.0, 1.0, 2 * ROUNDS)] or any(one.open for one in ledger.reservations()):
            return f"taken up again it counts {ledger.counted()}"
        told = [entry.what.removeprefix("budget.") for entry in audit.verify(ledger.book.log)]
        ledger.close()
        # Killed once it was settled, the life taken up again reserves the fourth round again, and settles.
        again = ["reserved", "closed"] * (told.count("reserved") - 1)
        named = ["officer"] * told.count("officer")  # once more, where it was killed before the key was pinned
        if told != ["ledger", *named, "ceiling", "ceiling", "reserved", "closed", *again] or len(again) > 2:
            return f"the log tells {told}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _begun(folder: Path) -> Path:
    """A folder with an officer, as it is or made so."""
    folder.mkdir(exist_ok=True)
    ledger = Ledger(folder / "ledger.sqlite")
    if "ada" not in officers_of(folder):
        pin_officer(ledger.book, "ada", folder / "ada.key")
    ledger.close()
    return folder


def _armed(nth: int, named: Path) -> None:
    """Make this process die at its ``nth`` point, and say beforehand in ``named`` where that is."""
    passed = 0

    def die(point: str) -> NoReturn:
        named.write_text(point)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")

    def at(point: str) -> bool:
        nonlocal passed
        passed += 1
        return passed == nth

    def around(name: str) -> None:
        do = getattr(os, name)

        def wrapped(*given: Any, **named_: Any) -> Any:
            if at(name):
                die(f"before {name}")
            done = do(*given, **named_)
            if at(name):
                die(f"after {name}")
            return done

        setattr(os, name, wrapped)

    around("fsync")
    around("replace")
    write: Callable[[Path, bytes], None] = audit._write

    def torn(path: Path, octets: bytes) -> None:
        if at("line"):
            with path.open("ab") as file:
                file.write(octets[: len(octets) // 2])
            die("within a line")
        write(path, octets)

    audit._write = torn
    connect = sqlite3.connect

    def traced(*given: Any, **named_: Any) -> sqlite3.Connection:
        database = connect(*given, **named_)

        def seen(statement: str) -> None:
            if statement.startswith(_WRITES) and at(statement):
                die(" ".join(statement.split()[:3]))

        database.set_trace_callback(seen)
        return database

    sqlite3.connect = traced
