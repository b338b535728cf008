"""Death in intensive care from vitals and laboratory values: the scenario ``mortality``, pooled and federated.

The held-out quarter of the stays is drawn by a hash of the stay and the seed: seed 0 is the fixed split that the bar
is of, and two more tell how much of a difference is the split's. What was chosen (steps of two hours, units, rates) was
chosen by cross-validation within seed 0's training part. The sites are kinds of unit: PROXIES for hospitals. Needs
CLOISTER_DATA/physionet2012; some five minutes.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from figures import Figure, at_least, at_most, progress, told

from cloister_simulations.federation import Options, compare
from cloister_simulations.scenario import Scenario, read_scenario

POOLED, BEHIND = 0.83, 0.01
SEEDS = (0, 1, 2)


def figures() -> list[Figure]:
    scenario = read_scenario("mortality")
    found = {arm: aurocs(scenario, arm, SEEDS) for arm in ("pooled", "federated")}
    pooled, federated = (list(found[arm].values()) for arm in ("pooled", "federated"))
    behind = [one - other for one, other in zip(pooled, federated, strict=True)]
    spread = f"{min(behind):+.4f} to {max(behind):+.4f}"
    return [
        at_least("mortality.pooled", found["pooled"][SEEDS[0]], POOLED, "AUROC {:.4f}, fixed split"),
        told("mortality.pooled.splits", statistics.mean(pooled), f"AUROC {{:.4f}}, mean of {len(SEEDS)} splits"),
        told("mortality.federated.splits", statistics.mean(federated), "AUROC {:.4f}, 4 proxy sites"),
        told("mortality.federated.fixed", behind[0], "{:+.4f} behind pooled, fixed split"),
        at_most("mortality.federated", statistics.mean(behind), BEHIND, f"{{:+.4f}} behind ({spread})"),
    ]


def aurocs(scenario: Scenario, arm: str, seeds: tuple[int, ...]) -> Mapping[int, float]:
    """AUROC over the held-out stays of all sites together, by seed."""
    found: dict[int, float] = {}
    with TemporaryDirectory(prefix="cloister-") as scratch:
        for result in compare(scenario, Options(Path(scratch), seeds=seeds, arms=(arm,))).results:
            found[result.seed] = result.overall["auroc"].value or 0.0
            progress(f"mortality: {arm}, seed {result.seed}: AUROC {found[result.seed]:.4f}")
    return found


if __name__ == "__main__":
    for figure in figures():
        print(figure.line(), flush=True)
