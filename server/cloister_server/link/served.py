"""Whether the hospitals' port is open, and since when: one small file that the process behind it keeps fresh."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from cloister_shared.errors import LinkLost

FRESH = 2.0
"""Seconds between two touches."""


@contextmanager
def alone(folder: Path) -> Generator[None, None, None]:
    """Nobody else serves this folder, as long as this process lives.

    Raises:
        LinkLost: somebody does.
    """
    folder.mkdir(exist_ok=True, mode=0o700)
    with (folder / "served.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LinkLost(f"Another process serves {folder}.", mend="End it first.") from None
        yield


def opened(folder: Path) -> None:
    """The port is open; now, unless it was before."""
    if not served_for(folder):
        (folder / "served").write_text(f"{time.time()}\n")


def touched(folder: Path) -> None:
    """It is open still."""
    os.utime(folder / "served")


def served_for(folder: Path) -> float:
    """Seconds for which the port has been open; 0 while it is closed."""
    path = folder / "served"
    try:
        if time.time() - path.stat().st_mtime > 5 * FRESH:
            return 0.0
        return time.time() - float(path.read_text())
    except (OSError, ValueError):
        return 0.0
