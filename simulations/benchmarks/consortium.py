"""Every figure of a deployed consortium: what was measured, the bar, and whether it holds.

    make figures TOPIC=consortium                           all of them, some twenty minutes
    make figures TOPIC=consortium ARGS="--only round idle"  some families, or figures by the start of their name
    make figures TOPIC=consortium ARGS=--json               as a list for a program

Exits 1 when a figure falls short. Every process is real, with mutual TLS on this machine's loopback, and hospitals
and records are invented. All processes share this machine, so that seconds need one with 4 cores and little else to do.
"""

from __future__ import annotations

import signal
import sys

import suite

FAMILIES = {
    "demo": "deployed_demo",
    "round": "deployed_round",
    "idle": "deployed_idle",
    "start": "deployed_start",
    "big": "deployed_big",
    "soak": "deployed_soak",
    "probe": "deployed_probe",
    "faults": "deployed_faults",
}

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was begun is ended
    sys.exit(suite.run("Measure a deployed consortium against its bars.", FAMILIES))
