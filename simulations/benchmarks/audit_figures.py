"""The audit of the mechanism as ``cloister-sim audit`` runs it: how tight, how long, and whether four bugs are caught.

    python simulations/benchmarks/audit_figures.py          about four minutes
    python simulations/benchmarks/audit_figures.py --json

``audit.eps2`` and ``audit.eps8`` are the lower bound over the claimed epsilon, of one run whose noise is made
for the claim by exact accounting (PLD). Seconds are CPU time of the whole command on one core, imports and
all; wall time, which depends on what else runs, is told beside them.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

import suite
from figures import Figure, at_least, at_most, progress, told

CLAIMS = (2, 8)
PLANTS = ("noise", "twice", "shuffled", "batchnorm")
SECONDS, SHARE = 60, 0.9
CLEAN = 5
"""Clean runs of both claims for false alarms and times; the bounds are the first one's."""


def figures() -> list[Figure]:
    clean: list[list[dict[str, Any]]] = []
    seconds: list[float] = []
    wall: list[float] = []
    for number in range(CLEAN):
        progress(f"audit: clean run {number + 1} of {CLEAN}")
        began, used = time.monotonic(), cpu_of_children()
        clean.append(audit())
        seconds.append(cpu_of_children() - used)
        wall.append(time.monotonic() - began)
    made: list[Figure] = []
    for claim, first in zip(CLAIMS, clean[0], strict=True):
        made += [
            at_least(f"audit.eps{claim}", first["lower"] / first["claimed"], SHARE, "{:.3f} of the claim"),
            told(f"audit.eps{claim}.one-run", first["one_run"], "{:.2f} from the final model alone"),
        ]
    alarms = sum(bool(one["caught"]) for run in clean for one in run)
    least = min(one["share"] for run in clean for one in run)
    caught = sum(is_caught(plant) for plant in PLANTS)
    return [
        *made,
        told("audit.least", least, f"{{:.3f}} over {CLEAN} runs of both"),
        at_most("audit.seconds", max(seconds), SECONDS, f"{{:.1f}} CPU-s, the slowest of {CLEAN}"),
        told("audit.wall", max(wall), "{:.1f} s, the slowest"),
        Figure("audit.caught", f"{caught} of {len(PLANTS)}", caught / len(PLANTS), "all", caught == len(PLANTS)),
        told("audit.false-alarms", alarms, f"{{:.0f}} in {CLEAN * len(CLAIMS)} clean audits"),
    ]


def is_caught(plant: str) -> bool:
    """Whether the command finds the bug at every claim, by the bound on epsilon as well as in words."""
    progress(f"audit: planted {plant}")
    found = audit("--plant", plant)
    return all(one["caught"] and (one["lower"] is None or one["lower"] > one["allowed"]) for one in found)


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def audit(*arguments: str) -> list[dict[str, Any]]:
    """What the command says; its exit code has to agree."""
    command = [sys.executable, "-m", "cloister_simulations.cli", "audit", "--json", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    found = json.loads(done.stdout)
    if done.returncode != int(any(one["verdict"] != "holds" for one in found)):
        raise RuntimeError(f"cloister-sim audit exited with {done.returncode}, against what it said.")
    return found


if __name__ == "__main__":
    sys.exit(suite.run("Audit the mechanism against its bars.", {"audit": "audit_figures"}))
