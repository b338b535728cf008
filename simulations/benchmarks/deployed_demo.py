"""``cloister-sim consortium`` as anybody would type it: how long it takes, and whether its model is the engine's."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from figures import Figure, at_most, progress
from processes import said_by

from cloister_simulations.deployment import CommandFailed

BAR, LONGEST = 60.0, 600.0


def figures() -> list[Figure]:
    progress("demo: cloister-sim consortium")
    with TemporaryDirectory(prefix="cloister-") as scratch:
        command = [sys.executable, "-m", "cloister_simulations.cli", "consortium", "--out", str(Path(scratch) / "out")]
        began = time.monotonic()
        said = said_by(command, LONGEST, allowed=(0, 1))  # 1 where the models differ, which is a figure below
        seconds = time.monotonic() - began
    return [
        at_most("demo.seconds", seconds, BAR, "{:.0f} s, a study of 5 hospitals"),
        at_most("demo.same-model", difference(said), 0.0, "{:.3g} apart from the in-process"),
    ]


def difference(said: str) -> float:
    """Between the deployed model and the in-process engine's, as the command tells it.

    Raises:
        CommandFailed: it does not.
    """
    found = re.search(r"in-process engine's:\s+(?:the\s+(same),|(\S+)\s+apart)", said)
    if found is None:
        raise CommandFailed(f"The command compared no models: {said[-400:].strip()}")
    return 0.0 if found[1] else float(found[2])
