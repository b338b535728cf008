"""Series and monitoring as whole studies: secure sums, privacy, several hospitals, and what the figures ask for."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cloister_client.connectors.connector import open_records
from cloister_client.dataset import load_dataset
from cloister_client.evaluate import seen
from cloister_client.network import Network
from cloister_client.privacy import plain
from cloister_client.train import train
from cloister_shared.layout import initial_model
from cloister_shared.objective import objective_of
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend
from cloister_simulations.federation import Options, compare
from cloister_simulations.hospitals import build
from cloister_simulations.scenario import Scenario, read_scenario
from cloister_simulations.sources.ecg import Ecg
from cloister_simulations.sources.eicu_vitals import EicuVitals
from cloister_simulations.sources.generated_stays import GeneratedStays

STAYS = GeneratedStays(source="generated-stays", sites=3, stays=600)
ALARMS = {
    "task": {"name": "monitoring", "model": "forecast", "units": 6, "alarms": 0.1},
    "personalisation": {"local_layers": ["threshold"]},
}


def short(name: str, hospitals: Any = None, **changes: object) -> Scenario:
    """A shipped scenario of few rounds."""
    full = read_scenario(name)
    plan = amend(full.plan, rounds=3, evaluation={"resamples": 100, "min_count": 2}, **changes)
    simulation = full.simulation.model_copy(update={"hospitals": hospitals or full.simulation.hospitals})
    return full.model_copy(update={"plan": plan, "simulation": simulation})


def watched() -> Scenario:
    """The generated stays without an outcome; death is what an alarm should have been raised for."""
    plan = read_scenario("generated-stays").plan
    series = [feature.model_dump(mode="json") for feature in plan.table.features if feature.kind == "series"]
    table = {"features": series, "target": {"kind": "itself", "alarm": "died"}}
    return short("generated-stays", STAYS, table=table, **ALARMS)


def test_a_series_study_runs_privately_and_learns(tmp_path: Path) -> None:
    # With all rows in a step the price is known at once.
    scenario = short("generated-stays", STAYS, training={"batch_size": 400, "local_steps": 3, "learning_rate": 0.02})
    (result,) = compare(scenario, Options(tmp_path, arms=("private",), noise_seed=1)).results
    assert result.rejected == []
    assert max(result.epsilon.values()) <= 3.0
    assert result.overall["auroc"].value
    assert result.overall["auroc"].value > 0.55


def test_hospitals_with_other_names_and_units_give_the_same_inputs(tmp_path: Path) -> None:
    plan = read_scenario("generated-stays").plan
    means: list[Any] = []
    for path in build(STAYS, tmp_path):
        x = load_dataset(open_records(path), plan).train.x[:, 1:].reshape(-1, 12, 2, 4)
        values, taken = x[:, :, 0], x[:, :, 1]
        means.append(values.sum((0, 1)) / taken.sum((0, 1)))
    assert np.ptp(np.array([mean.numpy() for mean in means]), axis=0).max() < 0.25


def test_as_many_records_are_above_the_threshold_as_the_plan_says(tmp_path: Path) -> None:
    plan = watched().plan
    rows = load_dataset(open_records(build(STAYS, tmp_path)[0]), plan).train
    network = Network(initial_model(plan), objective_of(plan))
    mechanism = plain(network, rows, 64, torch.Generator().manual_seed(0))
    train(mechanism, amend(plan, training={"learning_rate": 0.005}).training, 300)
    _, said = seen(network, rows)
    assert (said[:, 1] >= 1).mean() == pytest.approx(0.1, abs=0.04)


def test_each_hospital_keeps_its_own_threshold(tmp_path: Path) -> None:
    compare(watched(), Options(tmp_path, arms=("federated",)))
    kept = list(tmp_path.glob("seed-0/federated/sites/*/*.local-*.safetensors"))
    assert {path.parent.name for path in kept} == {"alder", "birch", "cedar"}


REAL = {
    "mortality": ("physionet2012", {"source": "physionet2012", "max_stays": 600}),
    "monitoring": ("eicu_demo", None),
    "ecg": ("wfdb_samples", None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_scenario_of_real_records_runs_privately(
    name: str, tmp_path: Path, data_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, source = REAL[name]
    monkeypatch.setenv("CLOISTER_DATA", str(data_dir(folder).parent))
    hospitals = type(read_scenario(name).simulation.hospitals).model_validate(source) if source else None
    (result,) = compare(short(name, hospitals), Options(tmp_path, arms=("private",))).results
    assert result.rejected == []
    assert max(result.epsilon.values()) <= (short(name).plan.privacy.epsilon or 0)


def test_an_early_beat_is_in_view_with_the_one_before_it(
    tmp_path: Path, data_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOISTER_DATA", str(data_dir("wfdb_samples").parent))
    plan = read_scenario("ecg").plan
    rows = load_dataset(open_records(build(Ecg(source="ecg"), tmp_path)[0]), plan).train
    beat = rows.x.reshape(-1, 60, 4)
    assert (beat[:, :, 2:] == 1).all()  # every step of both leads was sampled
    assert int(beat[:, 30:, 0].mean(0).argmax()) + 30 == pytest.approx(45, abs=1)  # 0.9 s in steps of 20 ms
    assert rows.y[:, -1].sum() > 0


def test_windows_of_one_patient_are_at_one_site(
    tmp_path: Path, data_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOISTER_DATA", str(data_dir("eicu_demo").parent))
    plan: StudyPlan = read_scenario("monitoring").plan
    sites = build(EicuVitals(source="eicu-vitals"), tmp_path)
    patients = [set(open_records(path).rows(plan.table)["patient"]) for path in sites]
    assert len(sites) == 6
    assert len(set[object]().union(*patients)) == sum(map(len, patients))
    assert min(map(len, patients)) > 40


@pytest.mark.slow
def test_pooled_and_federated_reach_the_reference(
    data_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOISTER_DATA", str(data_dir("physionet2012").parent))
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "simulations" / "benchmarks"))
    found = importlib.import_module("clinical_series").figures()
    assert [figure.line() for figure in found if figure.holds is False] == []
