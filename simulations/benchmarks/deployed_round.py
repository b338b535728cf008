"""What a round costs that trains next to nothing: 5 hospitals on loopback, every message signed, masked and logged.

A round is the time from its predecessor's record to its own, so that the coordinator's checkpoint counts.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import deployed
from deployed import agree, between, plan_of, records, run
from figures import Figure, at_most, progress, told

from cloister_server.store import RoundRecord
from cloister_simulations.consortium import trained_here
from cloister_simulations.deployment import Consortium

SITES, ROUNDS, BAR, LONGEST = 5, 25, 0.5, 300.0


def figures() -> list[Figure]:
    progress(f"round: {SITES} hospitals, {ROUNDS} rounds with the secure sum and {ROUNDS} without")
    masked, plain = (
        plan_of(f"overhead-{name}", SITES, ROUNDS, aggregation={"secure_sum": secure})
        for name, secure in (("masked", True), ("plain", False))
    )
    here: list[RoundRecord] = []
    with deployed.consortium(SITES) as consortium:
        (whole, recorded), (without, _) = (seconds(consortium, plan) for plan in (masked, plain))
        trained_here(masked, consortium.sites, Path(consortium.folder) / "in-process", here.append)
    return [
        at_most("round.overhead", whole, BAR, "{:.3f} s, median, secure sum"),
        told("round.overhead.recorded", recorded, "{:.3f} s without the checkpoint"),
        told("round.overhead.plain", without, "{:.3f} s without the secure sum"),
        told("round.in-process", statistics.median(record.seconds for record in here), "{:.3f} s, one process"),
    ]


def seconds(consortium: Consortium, plan: deployed.StudyPlan) -> tuple[float, float]:
    """The median round from record to record, and as the coordinator's record says."""
    agree(consortium, plan)
    run(consortium, plan, LONGEST)
    found = records(consortium, plan)
    return statistics.median(between(found)), statistics.median(record["seconds"] for record in found)
