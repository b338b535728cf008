"""Heart disease by FLamby's protocol (du Terrail et al. 2022) through our engine, beside FLamby's figures.

One linear layer on 13 features, each centred and scaled by its hospital's own training rows (sample
standard deviation); 15 rounds of 100 local SGD steps on batches of 4; hospitals weighted by training rows;
accuracy at 0.5 on each hospital's test rows; seeds 42 to 46. Pooled: Adam, 50 epochs, statistics of all
training rows together. The learning rates are those that FLamby published; nothing was chosen here.

Known differences: FLamby's data loader goes on where the round before stopped, ours shuffles anew each
round; FLamby divides by sd + 1e-9, which differs only for a constant column, and such a column is 0 either
way.

    python simulations/benchmarks/heart_flamby.py    prints both tables, mean and sd over the seeds
"""

from __future__ import annotations

import csv
import math
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from figures import Figure, near, progress
from torch import nn

from cloister_client.connectors.connector import open_records
from cloister_client.dataset import Dataset, Rows, load_dataset, normalised
from cloister_client.evaluate import seen
from cloister_client.network import Network
from cloister_client.privacy import plain
from cloister_client.site import own_constants
from cloister_client.train import train
from cloister_server.store import Store
from cloister_shared.layout import gathered, initial_model, layout_of
from cloister_shared.objective import objective_of
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend
from cloister_simulations.federation import Arm, Options, plan_for, run_federated
from cloister_simulations.hospitals import build, data_folder
from cloister_simulations.scenario import read_scenario

Accuracies = dict[str, dict[str, list[float]]]
"""Method, then place, then one accuracy a seed."""

SEEDS = (42, 43, 44, 45, 46)
HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
FEDERATED = {
    "fedavg": (0.001, {"name": "fedavg"}),
    "fedadam": (
        0.01,
        {"name": "fedadam", "server_learning_rate": 0.01, "beta1": 0.9, "beta2": 0.999, "tau": 1e-8},
    ),
}
"""Method to local learning rate and strategy."""
BARS = {
    "fedavg": (0.731, 0.719, 0.650, 0.640),
    "fedadam": (0.752, 0.746, 0.738, 0.667),
}
EPOCHS_POOLED = 50


def figures() -> list[Figure]:
    found = ours()
    made = [
        near(f"heart.{method}.{hospital}", statistics.mean(found[method][hospital]), bar, 0.02)
        for method, bars in BARS.items()
        for hospital, bar in zip(HOSPITALS, bars, strict=True)
    ]
    return [*made, near("heart.pooled", statistics.mean(found["pooled"]["pooled test"]), 0.795, 0.01)]


def ours() -> Accuracies:
    """Every method and seed through our engine."""
    scenario = read_scenario("heart-disease")
    plan = amend(
        plan_for(scenario.plan, Arm("federated"), SEEDS[0]),
        normalisation={"method": "site"},
        rounds=15,
        training={"batch_size": 4, "local_steps": 100},
        evaluation={"resamples": 100},  # only the accuracy is used, not its interval
    )
    found: Accuracies = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = build(scenario.simulation.hospitals, folder / "hospitals")
        datasets = {path.parent.name: load_dataset(open_records(path), plan) for path in paths}
        for seed in SEEDS:
            for method, (rate, strategy) in FEDERATED.items():
                progress(f"heart disease: {method}, seed {seed}")
                terms = amend(plan, seed=seed, training={"learning_rate": rate}, strategy=strategy)
                arm, place = Arm("federated"), folder / f"{method}-{seed}"
                run_federated(terms, datasets, arm, place, Options(place), lambda *_: None)
                for hospital, accuracy in at_hospitals(terms, trained(terms, place), datasets).items():
                    found.setdefault(method, {}).setdefault(hospital, []).append(accuracy)
            progress(f"heart disease: pooled, seed {seed}")
            for where, accuracy in pooled(amend(plan, seed=seed), datasets).items():
                found.setdefault("pooled", {}).setdefault(where, []).append(accuracy)
    return found


def trained(plan: StudyPlan, folder: Path) -> nn.Module:
    """The final model of a finished run."""
    model, checkpoint = initial_model(plan), Store(folder).load(plan.digest)
    assert checkpoint
    assert checkpoint.round == plan.rounds
    gathered(model, layout_of(plan, model).shared)[:] = checkpoint.model
    return model


def at_hospitals(plan: StudyPlan, model: nn.Module, datasets: Mapping[str, Dataset]) -> dict[str, float]:
    """Accuracy on each hospital's test rows, scaled by that hospital's training rows.

    Taken here and not from the hospitals' own reports: Switzerland has too few healthy patients to report.
    """
    return {
        hospital: accuracy(plan, model, normalised(data.test, data.columns, constants_of(data.train)))
        for hospital, data in datasets.items()
    }


def accuracy(plan: StudyPlan, model: nn.Module, test: Rows) -> float:
    truth, risks = seen(Network(model, objective_of(plan)), test)
    return float(np.mean((risks >= 0.5) == (truth == 1)))


def constants_of(rows: Rows) -> tuple[tuple[float, float], ...]:
    """Mean and sd of every column: all thirteen are numbers."""
    return own_constants(rows, range(rows.x.shape[1]))


def pooled(plan: StudyPlan, datasets: Mapping[str, Dataset]) -> dict[str, float]:
    """One model on all rows; judged on all test rows, and on each hospital's as that hospital scales them."""
    everyone, tests = (_together([getattr(d, part) for d in datasets.values()]) for part in ("train", "test"))
    columns, constants = datasets[HOSPITALS[0]].columns, constants_of(everyone)
    rows, network = normalised(everyone, columns, constants), Network(initial_model(plan), objective_of(plan))
    terms = plan.training.model_copy(update={"optimizer": "adam", "learning_rate": 0.001})
    steps = EPOCHS_POOLED * math.ceil(len(rows) / terms.batch_size)
    generator = torch.Generator().manual_seed(plan.seed)
    train(plain(network, rows, terms.batch_size, generator), terms, steps)
    everywhere = accuracy(plan, network.model, normalised(tests, columns, constants))
    return {"pooled test": everywhere, **at_hospitals(plan, network.model, datasets)}


def _together(parts: list[Rows]) -> Rows:
    x, y = torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts])
    return Rows(x, y, np.arange(len(y)))


def published() -> Accuracies:
    """FLamby's results, one file a seed, from the folder of real records."""
    methods = {"FedAvg100": "fedavg", "FedAdam100": "fedadam", "Pooled Training": "pooled"}
    places = {f"client_test_{at}": hospital for at, hospital in enumerate(HOSPITALS)}
    places["Pooled Test"] = "pooled test"
    found: Accuracies = {}
    for seed in SEEDS:
        path = data_folder("flamby_reference") / "results" / f"heart_seed{seed}.csv"
        with path.open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if method := methods.get(row["Method"]):
                    place = found.setdefault(method, {}).setdefault(places[row["Test"]], [])
                    place.append(float(row["Metric"]))
    return found


def main() -> None:
    theirs, here = published(), ours()
    print(f"{'accuracy, mean ± sd of seeds 42 to 46':<40}{'ours':<18}{'FLamby':<18}difference")
    for method in (*FEDERATED, "pooled"):
        for place, values in here[method].items():
            reference = theirs[method][place]
            both = [f"{statistics.mean(v):.3f} ± {statistics.stdev(v):.3f}" for v in (values, reference)]
            apart = statistics.mean(values) - statistics.mean(reference)
            print(f"{method + ', ' + place:<40}{both[0]:<18}{both[1]:<18}{apart:+.3f}")


if __name__ == "__main__":
    main()
