"""Every figure of the secure sum: what was measured, the bar, and whether it holds.

    make figures TOPIC=secure-sum                            all of them, some ten minutes
    make figures TOPIC=secure-sum ARGS="--only mask exact"   some families, or figures by the start of their name
    make figures TOPIC=secure-sum ARGS=--json                as a list for a program
    make figures TOPIC=secure_costs                          the table of costs by hospitals and parameters

Exits 1 when a figure falls short. Seconds are CPU time of one core, of the best of several repeats, so that what
else runs on the machine counts little; ours and Flower's are taken in one run. Real records are read from the
folder that CLOISTER_DATA names.
"""

from __future__ import annotations

import sys

import suite

FAMILIES = {
    "mask": "masking_time",
    "round": "secure_round",
    "n100": "hundred_hospitals",
    "exact": "exactness",
    "scenarios": "secure_scenarios",
    "attacks": "attacks_refused",
}

if __name__ == "__main__":
    sys.exit(suite.run("Measure the secure sum against its bars.", FAMILIES))
