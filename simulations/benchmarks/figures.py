"""A measured figure, the bar it is held against, and how both are printed.

Imported before anything heavy: one thread a process, and nothing phones home.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

for name, value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "OMP_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(name, value)


@dataclass(frozen=True)
class Figure:
    """One line of a benchmark. ``holds`` is None where there is no bar."""

    name: str
    measured: str
    value: float | None = None
    bar: str = ""
    holds: bool | None = None

    @property
    def verdict(self) -> str:
        return {True: "holds", False: "falls short", None: "no bar"}[self.holds]

    def line(self) -> str:
        """Aligned for a terminal of 100 columns."""
        return f"{self.name:<36}  {self.measured:<35}  {self.bar:<14}  {self.verdict}"

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "verdict": self.verdict}


def near(name: str, value: float, target: float, margin: float) -> Figure:
    """A figure that should be ``target``, give or take ``margin``."""
    return Figure(name, f"{value:.3f}", value, f"{target:.3f} ± {margin:g}", abs(value - target) <= margin)


def at_most(name: str, value: float, most: float, said: str = "{:.3g}") -> Figure:
    """A figure that should not be above ``most``; ``said`` words the measured value."""
    return Figure(name, said.format(value), value, f"at most {most:g}", value <= most)


def at_least(name: str, value: float, least: float, said: str = "{:.3g}") -> Figure:
    """A figure that should not be below ``least``."""
    return Figure(name, said.format(value), value, f"at least {least:g}", value >= least)


def told(name: str, value: float, said: str = "{:.3g}") -> Figure:
    """A figure that is reported and held against nothing."""
    return Figure(name, said.format(value), value)


def missed(name: str, why: str) -> Figure:
    """A figure that could not be measured, which counts as missed."""
    return Figure(name, why, None, "", False)


def in_fresh_process(script: str, *arguments: str) -> Any:
    """What a script prints as JSON in a process of its own; what it says on stderr is seen here."""
    done = subprocess.run([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def progress(text: str) -> None:
    """What a long measurement is doing, for the reader who waits."""
    print(f"  {text}", file=sys.stderr, flush=True)
