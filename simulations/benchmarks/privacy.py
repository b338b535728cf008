"""Every figure of privacy: what was measured, the bar, and whether it holds.

    make figures TOPIC=privacy                          all of them, some twenty minutes
    make figures TOPIC=privacy ARGS="--only clip audit" some families, or figures by the start of their name
    make figures TOPIC=privacy ARGS=--json              as a list for a program

Exits 1 when a figure falls short. Nothing here needs records: patients are invented.
"""

from __future__ import annotations

import sys

import suite

FAMILIES = {
    "clip": "clipping_steps",
    "noise": "noise_figures",
    "patient": "patient_records",
    "ledger": "ledger_figures",
    "accuracy": "privacy_accuracy",
    "platform": "platform_accuracy",
    "audit": "audit_figures",
}
"""Start of the figures' names: the module beside this one whose ``figures()`` measures them."""


if __name__ == "__main__":
    sys.exit(suite.run("Measure privacy against its bars.", FAMILIES))
