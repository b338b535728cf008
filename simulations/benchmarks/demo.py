"""The demo scenario as it ships: breast cytology, its three seeds, with and without privacy."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path

from figures import Figure, at_most, progress, told

from cloister_shared.outcomes.judging import Estimate
from cloister_simulations.federation import Options, Result, compare
from cloister_simulations.scenario import read_scenario


def figures() -> list[Figure]:
    progress("demo: breast-cancer, every arm with every seed")
    with tempfile.TemporaryDirectory() as name:
        results = compare(read_scenario("breast-cancer"), Options(Path(name))).results
    by_arm: dict[str, list[Result]] = {}
    for result in results:
        by_arm.setdefault(result.arm.folder, []).append(result)
    pooled, federated = (_mean(_auroc(by_arm[arm])) for arm in ("pooled", "federated"))
    made = [
        told("demo.auroc.pooled", pooled, _with_interval(_auroc(by_arm["pooled"]))),
        told("demo.auroc.federated", federated, _with_interval(_auroc(by_arm["federated"]))),
        at_most("demo.federated-from-pooled", abs(federated - pooled), 0.01, "{:.4f} apart"),
    ]
    spent = 0.0
    for arm, found in by_arm.items():
        target = found[0].arm.epsilon
        if target is None:
            continue
        made.append(told(f"demo.auroc.{arm}", _mean(_auroc(found)), _with_interval(_auroc(found))))
        spent = max(spent, *(value / target for result in found for value in result.epsilon.values()))
    return [*made, at_most("demo.epsilon-spent", spent, 1.0, "{:.6f} of the target at most")]


def _auroc(results: Iterable[Result]) -> list[Estimate]:
    """Over the held-out patients of all hospitals together, one a seed."""
    return [result.overall["auroc"] for result in results]


def _mean(found: list[Estimate]) -> float:
    return statistics.mean(e.value for e in found if e.value is not None)


def _with_interval(found: list[Estimate]) -> str:
    """The mean, then the lowest and highest bound of the seeds' bootstrap intervals."""
    low = min(e.low for e in found if e.low is not None)
    high = max(e.high for e in found if e.high is not None)
    return f"{{:.4f}}, in {low:.3f} to {high:.3f}"
