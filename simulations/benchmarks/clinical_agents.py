"""Clinical scenarios between organisations: a real coordinator and real agents, under the secure sum and privacy.

agents.SCENARIO.same-model   largest difference between a parameter of the deployed model and of the in-process engine's
agents.SCENARIO.epsilon      of the hospital that spent most, by its own ledger
agents.SCENARIO.seconds      from the first key to the comparison
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from figures import Figure, at_most, progress, told

from cloister_client.ledger import Ledger
from cloister_client.site_file import read_site
from cloister_shared import budget
from cloister_simulations.consortium import Shown, demonstrate

SCENARIOS = ("clinical-forms", "generated-stays", "dicom")
"""Coded records in three forms, series, and pictures under shared noise: none needs records that are not shipped."""
ROUNDS = 3


def figures() -> list[Figure]:
    return [figure for scenario in SCENARIOS for figure in deployed(scenario)]


def deployed(scenario: str) -> list[Figure]:
    progress(f"{scenario}: a coordinator and agents, {ROUNDS} rounds")
    with TemporaryDirectory(prefix="cloister-") as scratch:
        shown = demonstrate(Path(scratch), scenario, ROUNDS, lambda what, took: None)
        spent = [epsilon(shown, site_yaml) for site_yaml in shown.sites.values()]
    name, plan = f"agents.{scenario}", shown.plan
    assert plan.aggregation.secure_sum
    assert plan.privacy.epsilon
    assert shown.difference is not None
    return [
        at_most(f"{name}.same-model", shown.difference, 0.0, f"{{:.3g}} apart, of {shown.parameters} parameters"),
        at_most(f"{name}.epsilon", max(spent), plan.privacy.epsilon, f"{{:.4f}} at {len(spent)} hospitals"),
        told(f"{name}.seconds", shown.seconds, "{:.0f} s"),
    ]


def epsilon(shown: Shown, site_yaml: Path) -> float:
    """What a hospital's ledger was charged for the study, at the plan's delta."""
    assert shown.plan.privacy.delta
    ledger = Ledger(site_yaml.parent / "ledger.sqlite", read_site(site_yaml).population)
    try:
        return budget.epsilon(ledger.history(shown.plan.digest), shown.plan.privacy.delta)
    finally:
        ledger.close()


if __name__ == "__main__":
    for figure in figures():
        print(figure.line(), flush=True)
