"""How long ``cloister-sim --help`` takes: the median of five fresh processes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from figures import Figure, at_most, missed

NAME, BAR, STARTS = "start-up.help", 0.5, 5


def figures() -> list[Figure]:
    script = Path(sys.executable).parent / "cloister-sim"
    command = [str(script)] if script.exists() else [sys.executable, "-m", "cloister_simulations.cli"]
    seconds: list[float] = []
    for _ in range(STARTS):
        began = time.perf_counter()
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
        seconds.append(time.perf_counter() - began)
        if done.returncode:
            return [missed(NAME, "no such command")]
        if "Usage" not in done.stdout:
            return [missed(NAME, "the command prints no help")]
    return [at_most(NAME, statistics.median(seconds), BAR, "{:.3f} s")]
