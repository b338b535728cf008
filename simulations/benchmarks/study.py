"""Every figure of the training core: what was measured, the bar, and whether it holds.

    make figures TOPIC=study                             all of them, some ten minutes
    make figures TOPIC=study ARGS="--only heart memory"  some families, or figures by the start of their name
    make figures TOPIC=study ARGS=--json                 as a list for a program

Exits 1 when a figure falls short. Real records are read from the folder that CLOISTER_DATA names.
"""

from __future__ import annotations

import sys
import warnings

import suite

FAMILIES = {
    "heart": "heart_flamby",
    "demo": "demo",
    "round": "round_time",
    "memory": "memory",
    "epsilon": "accounting",
    "resume": "resume",
    "start-up": "start_up",
    "engines": "engines_agree",
    "vectors": "vectors",
}
"""Start of the figures' names: the module beside this one whose ``figures()`` measures them."""


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # Opacus, on every network
    sys.exit(suite.run("Measure the training core against its bars.", FAMILIES))
