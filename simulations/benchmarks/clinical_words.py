"""Notes, molecules and genomics: what models of real records reach, pooled and federated, from the shipped scenarios.

mtsamples.*   accuracy of a note's specialty, mean of three held-out quarters
bbbp.*        AUROC of molecules of scaffolds that no model has seen, mean of ten draws of these
esol.*        RMSE of the logarithm of solubility, of such molecules
pbmc.*        accuracy of a blood cell's type
polygenic.*   correlation of the federated score with the true one, of held-out invented patients
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
from figures import Figure, at_least, at_most, progress, told

from cloister_client.connectors.connector import open_records
from cloister_client.dataset import load_dataset, normalised
from cloister_server.store import Store
from cloister_shared.layout import untrained
from cloister_shared.outcomes.outcome import outcome_of
from cloister_simulations.federation import Arm, Options, compare, plan_for
from cloister_simulations.hospitals import build
from cloister_simulations.scenario import Scenario, read_scenario

POOLED, MARGIN = 0.78, 0.01
BOTH = ("pooled", "federated")


def figures() -> list[Figure]:
    notes = scores("specialty", BOTH, seeds=(0, 1, 2))
    barrier = scores("barrier", BOTH, draws=range(10))
    dissolved = scores("solubility", BOTH, draws=range(3))
    cells = scores("expression", BOTH, seeds=(0, 1, 2))
    gap = barrier["pooled"] - barrier["federated"]
    return [
        at_least("mtsamples.pooled", float(notes["pooled"].mean()), POOLED, "accuracy {:.4f}"),
        told("mtsamples.federated", float(notes["federated"].mean()), "accuracy {:.4f}"),
        told("bbbp.pooled", float(barrier["pooled"].mean()), "AUROC {:.4f}"),
        at_most("bbbp.federated", float(gap.mean()), MARGIN, f"{barrier['federated'].mean():.4f}: pooled - {{:.4f}}"),
        told("bbbp.spread", 2 * float(gap.std(ddof=1)) / len(gap) ** 0.5, "gap ± {:.4f}, two standard errors"),
        told("esol.pooled", float(dissolved["pooled"].mean()), "RMSE {:.3f}"),
        told("esol.federated", float(dissolved["federated"].mean()), "RMSE {:.3f}"),
        told("pbmc.pooled", float(cells["pooled"].mean()), "accuracy {:.4f}"),
        told("pbmc.federated", float(cells["federated"].mean()), "accuracy {:.4f}"),
        told("polygenic.federated", correlation(), "r = {:.3f} with the true score"),
    ]


def scores(
    name: str, arms: Sequence[str], *, seeds: Sequence[int] = (0,), draws: Sequence[int] = (0,)
) -> dict[str, np.ndarray]:
    """The headline metric of each arm on all held-out records, for each draw of hospitals and split, and each seed."""
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    for draw in draws:
        progress(f"{name}: {', '.join(arms)}, draw {draw}")
        scenario = drawn(read_scenario(name), draw)
        headline = outcome_of(scenario.plan.table).headline
        with TemporaryDirectory(prefix="cloister-") as scratch:
            compared = compare(scenario, Options(Path(scratch), seeds=tuple(seeds), arms=tuple(arms)))
        for result in compared.results:
            value = result.overall[headline].value
            assert value is not None
            found[result.arm.kind].append(value)
    return {arm: np.array(values) for arm, values in found.items()}


def drawn(scenario: Scenario, seed: int) -> Scenario:
    """The same with other hospitals and, where the source splits, other held-out records."""
    hospitals: Any = scenario.simulation.hospitals.model_copy(update={"seed": seed})
    return scenario.model_copy(update={"simulation": scenario.simulation.model_copy(update={"hospitals": hospitals})})


def correlation() -> float:
    """Of what the federated model says of held-out patients with their true scores, which no model ever sees."""
    progress("polygenic: federated")
    scenario, arm = read_scenario("polygenic"), Arm("federated")
    plan = plan_for(scenario.plan, arm, 0)
    with TemporaryDirectory(prefix="cloister-") as scratch:
        folder = Path(scratch)
        compare(scenario, Options(folder, seeds=(0,), arms=("federated",)))
        checkpoint = Store(folder / "seed-0" / arm.folder).load(plan.digest)
        assert checkpoint is not None
        assert checkpoint.normalisation is not None
        model = untrained(plan)
        _fill(model, checkpoint.model)
        said, true = list[np.ndarray](), list[np.ndarray]()
        for site_yaml in build(scenario.simulation.hospitals, folder / "hospitals"):
            dataset = load_dataset(open_records(site_yaml), plan)
            test = normalised(dataset.test, dataset.columns, checkpoint.normalisation)
            said.append(model(test.x).detach().numpy()[:, 0])
            true.append(_true_scores(site_yaml, dataset.test.patients))
    return float(np.corrcoef(np.concatenate(said), np.concatenate(true))[0, 1])


def _true_scores(site_yaml: Path, patients: np.ndarray) -> np.ndarray:
    """Patients are numbered by their ids in order."""
    table = pd.read_parquet(site_yaml.parent / "table.parquet").sort_values("patient_id")
    return table["true_score"].to_numpy()[patients]


def _fill(model: Any, vector: np.ndarray) -> None:
    import torch

    at = 0
    with torch.no_grad():
        for part in model.parameters():
            part.copy_(torch.from_numpy(vector[at : at + part.numel()].copy()).view_as(part))
            at += part.numel()


if __name__ == "__main__":
    for figure in figures():
        print(figure.line(), flush=True)
