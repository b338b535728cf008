"""The attacks on the secure sum, run against the real code: how many are refused, out of all."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from figures import Figure, progress, told

from cloister_simulations.attacks import suite


def figures() -> list[Figure]:
    logging.getLogger("cloister.site").addFilter(lambda record: False)  # what each hospital says of each attack
    with tempfile.TemporaryDirectory() as scratch:
        found, limits = suite.run_all(Path(scratch), lambda name, number, count: progress(f"attacks: {name}"))
    refused = sum(outcome.refused for outcome in found)
    for outcome in found:
        if not outcome.refused:
            progress(f"attacks: {outcome.name} SUCCEEDED: {outcome.reason}")
    known = sum(not limit.refused for limit in limits)
    return [
        Figure("attacks.refused", f"{refused} of {len(found)}", refused / len(found), "all", refused == len(found)),
        told("attacks.not-stopped", known, "{:.0f} known limits, as documented"),
    ]
