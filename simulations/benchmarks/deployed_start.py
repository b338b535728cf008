"""From starting the agents to the first round, where all else is done: approved, run asked for, its worker waiting."""

from __future__ import annotations

import time
from pathlib import Path

import deployed
from deployed import agree, plan_of, records
from figures import Figure, at_most, progress, told

from cloister_simulations.deployment import Consortium, until

SITES, BAR, LONGEST = 5, 10.0, 180.0


def figures() -> list[Figure]:
    progress(f"start: {SITES} agents, until the first round")
    plan = plan_of("start", SITES, 1)
    with deployed.consortium(SITES) as consortium:
        agree(consortium, plan)
        consortium.end(*consortium.sites)
        consortium.coordinator("study", "run", plan.study)
        consortium.wait(plan.study, ("waiting",), LONGEST)  # which its worker says once it is there and alone
        began = time.time()
        for name in consortium.sites:
            consortium.agent(name)
        until(lambda: answered(consortium) > 0, LONGEST, "a hospital answers the first round")
        first = time.time() - began
        consortium.wait(plan.study, ("finished",), LONGEST)
        whole = deployed.moment(records(consortium, plan)[0]) - began
    return [
        at_most("start.first-round", first, BAR, "{:.1f} s to the first answer of round 1"),
        told("start.whole-round", whole, f"{{:.1f}} s to its end, {SITES} hospitals"),
    ]


def answered(consortium: Consortium) -> int:
    """Hospitals that have answered a round of training, by their own logs of what left."""
    logs = [Path(site).parent / "agent" / "egress.jsonl" for site in consortium.sites.values()]
    return sum('"kind":"train"' in log.read_text(encoding="utf-8").replace(" ", "") for log in logs)
