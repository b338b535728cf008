"""Tables, time to event, treatment, invented patients, fusion, ComBat: each scenario against its bar or truth.

``make figures TOPIC=clinical ARGS="--only life"`` measures all of them, in some fifteen minutes on 2 cores;
``python simulations/benchmarks/clinical_life.py survival treatment`` some.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from figures import Figure, at_least, at_most, missed, near, progress, told

from cloister_client.connectors.connector import open_records
from cloister_client.dataset import Dataset, load_dataset
from cloister_shared.errors import DataRefused
from cloister_shared.outcomes import effect, survival
from cloister_shared.outcomes.binary import auroc
from cloister_shared.plan_file import amend
from cloister_simulations import boosting, synthetic_report
from cloister_simulations.federation import Arm, Options, Result, compare, plan_for
from cloister_simulations.hospitals import build
from cloister_simulations.scenario import Scenario, read_scenario
from cloister_simulations.sources.censored import log_hazard, outlives
from cloister_simulations.sources.trial import true_effect, untreated

SEEDS = (0, 1, 2)


def figures(only: tuple[str, ...] = ()) -> list[Figure]:
    """All of them, or those of some scenarios."""
    made: list[Figure] = []
    for name, measured in MEASURED.items():
        if only and name not in only:
            continue
        progress(f"{name}: every arm")
        with tempfile.TemporaryDirectory(prefix="cloister-") as scratch:
            try:
                made += measured(Path(scratch))
            except DataRefused as refused:  # the folder of real records is not there
                made.append(missed(name, str(refused).partition(".")[0]))
    return [replace(figure, name=f"life.{figure.name}") for figure in made]


def readmission(scratch: Path) -> list[Figure]:
    scenario = shipped("readmission")
    found = trained(scenario, scratch, ("pooled", "federated"), SEEDS)
    private = trained(scenario, scratch, ("private",), SEEDS[:1])
    apart = mean(found, "pooled", "auroc") - mean(found, "federated", "auroc")
    return [
        at_least("readmission.pooled", mean(found, "pooled", "auroc"), 0.66, "AUROC {:.4f}, 3 splits"),
        at_most("readmission.federated", apart, 0.01, "{:.4f} below pooled, 3 splits"),
        told("readmission.private", mean(private, "private", "auroc"), "AUROC {:.4f} at epsilon 3, a split"),
        told("readmission.trees", trees(scenario, scratch), "AUROC {:.4f} by trees, not DP"),
    ]


def icu_death(scratch: Path) -> list[Figure]:
    found = trained(shipped("icu-death"), scratch, ("pooled", "federated", "private"), SEEDS)
    return [
        told(f"icu-death.{kind}", mean(found, kind, "auroc"), f"AUROC {{:.3f}}{at}, 3 splits")
        for kind, at in (("pooled", ""), ("federated", ""), ("private", " at epsilon 8"))
    ]


def hazards(scratch: Path) -> list[Figure]:
    scenario = shipped("survival")
    found = trained(scenario, scratch, ("pooled", "federated", "private"), (0,))
    none = {"mechanism": "none"} | dict.fromkeys(("unit", "epsilon", "delta", "clip_norm"))
    cox = amend(scenario.plan, task={"name": "cox"}, privacy=none)
    other = trained(scenario.model_copy(update={"plan": cox}), scratch / "cox", ("federated",), (0,))
    tables = {path.parent.name: pd.read_csv(path.parent / "table.csv") for path in sites(scratch)}
    truth, y = list[Any](), list[Any]()
    for site, data in datasets(scenario, scratch).items():
        of = held_out(data, tables[site])
        truth.append(outlives(log_hazard(of), np.asarray(scenario.plan.table.target.cuts)))  # type: ignore[union-attr]
        y.append(data.test.arrays[1].astype(np.float64))
    metrics = survival.metrics(scenario.plan.table.target.cuts)  # type: ignore[union-attr]
    said, came = np.concatenate(truth), np.concatenate(y)
    best = {name: float(metric(came, said, np.ones((1, len(came))))[0]) for name, metric in metrics.items()}
    federated = {name: mean(found, "federated", name) for name in best}
    return [
        told("survival.truth", best["c_index"], "C-index {:.4f} of the true hazard"),
        near("survival.federated", federated["c_index"], best["c_index"], 0.02),
        told("survival.private", mean(found, "private", "c_index"), "C-index {:.4f} at epsilon 3"),
        told("survival.cox", mean(other, "federated", "c_index"), "C-index {:.4f}, Cox, not DP"),
        told("survival.brier.truth", best["integrated_brier"], "{:.4f} integrated, true hazard"),
        near("survival.brier", federated["integrated_brier"], best["integrated_brier"], 0.01),
    ]


def treatment(scratch: Path) -> list[Figure]:
    scenario = shipped("treatment")
    found = trained(scenario, scratch, ("federated", "private"), SEEDS)
    tables = {path.parent.name: pd.read_csv(path.parent / "table.csv") for path in sites(scratch)}
    gains, values = list[float](), list[float]()
    for seed in SEEDS:
        of = pd.concat([held_out(data, tables[site]) for site, data in datasets(scenario, scratch, seed).items()])
        gains.append(float(true_effect(of).mean()))
        values.append(float((untreated(of) + np.maximum(true_effect(of), 0)).mean()))
    gain, value = statistics.mean(gains), statistics.mean(values)
    return [
        told("treatment.truth", gain, "{:.3f} mmHg mean effect, 3 splits"),
        near("treatment.effect", mean(found, "federated", "mean_effect"), gain, 0.3),
        near("treatment.effect.private", mean(found, "private", "mean_effect"), gain, 0.5),
        told("treatment.policy.truth", value, "{:.3f} mmHg if whom it helps"),
        near("treatment.policy", mean(found, "federated", "policy_value"), value, 0.3),
        near("treatment.policy.private", mean(found, "private", "policy_value"), value, 0.5),
        at_least(
            "treatment.overlap", mean(found, "federated", "overlap"), effect.LEAST_OVERLAP, "{:.3f} can be compared"
        ),
    ]


def synthetic(scratch: Path) -> list[Figure]:
    scenario = shipped("synthetic")
    trained(scenario, scratch, ("federated", "private"), (0,))
    made: list[Figure] = []
    for arm, name in ((Arm("federated"), "synthetic"), (Arm("private", 3.0), "synthetic.private")):
        worth = synthetic_report.judge(scenario, scratch, arm, "readmitted_30d")
        lost = worth.taught_by_real - worth.taught_by_drawn
        made += [
            told(f"{name}.marginals", worth.marginal, "{:.4f} total variation, mean"),
            told(f"{name}.correlations", worth.correlation, "{:.4f} apart, mean pair of values"),
            told(f"{name}.taught", lost, f"{{:.4f}} AUROC below {worth.taught_by_real:.4f}"),
            near(f"{name}.nearest", worth.nearer_to_trained, 0.5, 0.03),
            near(f"{name}.membership", worth.membership, 0.5, 0.03),
        ]
    return made


def multimodal(scratch: Path) -> list[Figure]:
    scenario = shipped("multimodal")
    found = trained(scenario, scratch, ("pooled", "alone", "federated", "private"), (0,))
    blind = max(site for site in next(iter(found)).sites)  # names rise, and the last has no pictures
    (own,) = [result for result in found if result.arm.kind == "federated"]
    return [
        *(told(f"multimodal.{r.arm.kind}", r.overall["auroc"].value or 0.0, "AUROC {:.4f}") for r in found),
        told("multimodal.no-pictures", own.sites[blind]["auroc"].value or 0.0, "AUROC {:.4f} there, federated"),
    ]


def harmonised(scratch: Path) -> list[Figure]:
    """ComBat beside the same plan with ``method: federated``, whose constants are those of all hospitals together."""
    scenario = shipped("harmonised")
    other = scenario.model_copy(update={"plan": amend(scenario.plan, normalisation={"method": "federated"})})
    kinds = ("federated", "private")
    ours, theirs = trained(scenario, scratch / "combat", kinds, SEEDS), trained(other, scratch / "other", kinds, SEEDS)
    made: list[Figure] = []
    for kind, at in (("federated", ""), ("private", " at epsilon 3")):
        with_it, without = mean(ours, kind, "auroc"), mean(theirs, kind, "auroc")
        made += [
            at_least(f"harmonised.{kind}", with_it - without, 0.0, f"AUROC {{:.3f}} gained{at}, 3 splits"),
            told(f"harmonised.{kind}.auroc", with_it, f"AUROC {{:.3f}}{at}"),
        ]
    return made


MEASURED: dict[str, Callable[[Path], list[Figure]]] = {
    "readmission": readmission,
    "icu-death": icu_death,
    "survival": hazards,
    "treatment": treatment,
    "synthetic": synthetic,
    "multimodal": multimodal,
    "harmonised": harmonised,
}


# --- small things ------------------------------------------------------------------------------------------
def shipped(name: str) -> Scenario:
    """A scenario as it is shipped, with few resamples: intervals are not shown here."""
    scenario = read_scenario(name)
    return scenario.model_copy(update={"plan": amend(scenario.plan, evaluation={"resamples": 100})})


def trained(scenario: Scenario, folder: Path, kinds: tuple[str, ...], seeds: tuple[int, ...]) -> list[Result]:
    def done(result: Result) -> None:
        headline = {name: estimate.value for name, estimate in list(result.overall.items())[:1]}
        progress(f"{scenario.name}: {result.arm.name}, seed {result.seed}: {headline}, {result.seconds:.0f} s")

    return compare(scenario, Options(folder, arms=kinds, seeds=seeds), done=done).results


def mean(found: list[Result], kind: str, metric: str) -> float:
    """Over seeds; of several epsilons the first."""
    of = [result for result in found if result.arm.kind == kind]
    first = [result for result in of if result.arm == of[0].arm]
    return statistics.mean(float("nan") if (v := r.overall[metric].value) is None else v for r in first)


def sites(folder: Path) -> list[Path]:
    return sorted((folder / "hospitals").glob("*/site.yaml"))


def datasets(scenario: Scenario, folder: Path, seed: int = 0) -> dict[str, Dataset]:
    """What the hospitals of a finished run read with this seed."""
    plan = plan_for(scenario.plan, Arm("federated"), seed)
    return {path.parent.name: load_dataset(open_records(path), plan) for path in sites(folder)}


def held_out(data: Dataset, table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a table that are held out, in order; patients are numbered as their ids sort."""
    ids = np.unique(table["patient_id"])
    found = table.set_index("patient_id").loc[ids[data.test.patients]]
    assert len(found) == len(data.test)
    return found.reset_index()


def trees(scenario: Scenario, folder: Path) -> float:
    """AUROC of federated trees on the same split as seed 0's."""
    if not sites(folder):
        build(scenario.simulation.hospitals, folder / "hospitals")
    read = datasets(scenario, folder).values()
    train, test = (
        [
            boosting.Hospital(rows.x.numpy(), rows.y.numpy().astype(np.float64))
            for rows in (getattr(data, part) for data in read)
        ]
        for part in ("train", "test")
    )
    boosting.boosted(train, test, boosting.Terms())
    y, score = (np.concatenate([getattr(hospital, key) for hospital in test]) for key in ("y", "score"))
    return auroc(y, 1 / (1 + np.exp(-score)))


if __name__ == "__main__":
    found = figures(tuple(sys.argv[1:]))
    for figure in found:
        print(figure.line(), flush=True)
    sys.exit(any(figure.holds is False for figure in found))
