"""Every task has one life: schema, quality report, training, evaluation, explanation, export, and scores at a hospital.

A new task is one line of LIVES: a shipped scenario, how small its hospitals are made, and what its plan changes.
"""

import csv
from pathlib import Path

import numpy as np
import pytest

from cloister_client import explain
from cloister_client.connectors.connector import open_records
from cloister_client.dataset import load_dataset
from cloister_client.predict import predict, told
from cloister_client.released import open_released, read_new
from cloister_shared import model_file
from cloister_shared.envelope import read_roster
from cloister_shared.outcomes.answers import names
from cloister_shared.outcomes.outcome import outcome_of, title
from cloister_shared.plan_file import amend
from cloister_shared.plan_text import summary
from cloister_simulations import models, report
from cloister_simulations.federation import Options, compare
from cloister_simulations.scenario import Scenario, read_scenario

FEW = {
    "rounds": 2,
    "cohort": {"min_sites": 2, "min_patients": 20},
    "training": {"local_steps": 2},
    "evaluation": {"resamples": 100, "min_count": 2},
}
LIVES: dict[str, tuple[str, dict[str, object], dict[str, object]]] = {
    "tabular": ("generated-ehr", {"sites": 3, "patients": 400}, {}),
    "tabular, own constants": (
        "generated-ehr",
        {"sites": 3, "patients": 400},
        {"normalisation": {"method": "plan"}, "task": {"model": "logistic", "hidden": []}},
    ),
    "tabular transformer": (
        "generated-ehr",
        {"sites": 3, "patients": 400},
        {"task": {"name": "tabular-transformer", "width": 8}},
    ),
    "survival": ("survival", {"sites": 3, "patients": 900}, {}),
    "effect": ("treatment", {"sites": 3, "patients": 900}, {}),
    "many kinds of record": ("multimodal", {"sites": 3, "patients": 400}, {}),
    "series": ("generated-stays", {"sites": 3, "stays": 400}, {}),
    "lesions": ("lesions", {"sites": 3, "patients": 40}, {}),
    "pictures": ("dicom", {"sites": 3, "patients": 60}, {}),
    "genomes": ("polygenic", {"sites": 3, "patients": 600}, {}),
    "FHIR, OMOP and a table": ("clinical-forms", {"patients": 400}, {}),
}


def small(name: str, hospitals: dict[str, object], changes: dict[str, object]) -> Scenario:
    read = read_scenario(name)
    source = read.simulation.hospitals.model_copy(update=hospitals)
    simulation = read.simulation.model_copy(update={"hospitals": source, "seeds": (0,), "epsilons": (4.0,)})
    few = {key: terms for key, terms in FEW.items() if key != "training" or not read.plan.shared_noise}
    plan = amend(amend(read.plan, **few), **changes)
    return read.model_copy(update={"plan": plan, "simulation": simulation})


@pytest.mark.slow
@pytest.mark.parametrize("life", LIVES)
def test_a_task_lives(life: str, tmp_path: Path) -> None:
    scenario = small(*LIVES[life])
    plan, outcome = scenario.plan, outcome_of(scenario.plan.table)

    assert plan.study in summary(plan)  # schema: what people approve

    found = compare(scenario, Options(tmp_path, arms=("pooled", "federated", "private")))  # training and evaluation
    hospital = sorted((tmp_path / "hospitals").glob("*/site.yaml"))[0]
    page = load_dataset(open_records(hospital), plan).quality.page()  # the quality report
    assert "Data quality at" in page
    for result in found.results:
        assert result.overall[outcome.headline].value is not None
    assert title(outcome.headline) in report.write(found).read_text(encoding="utf-8")

    exported = models.export(found)  # export
    assert [path.name for path in exported] == ["federated", "private-4"]
    roster = read_roster(tmp_path / models.ROSTER)
    model = model_file.read(exported[-1], roster)
    assert model.plan.digest == found.results[-1].plan
    assert (exported[-1] / "MODEL_CARD.md").exists()

    released = open_released(model, hospital)
    rows = read_new(hospital, hospital, plan.table)
    features = [feature.name for feature in plan.table.features]
    assert set(explain.groups(plan.table)) == set(features)  # explanation
    assert np.isfinite(explain.of_rows(released, rows)).all()
    assert set(explain.of_model(released)) <= set(features)

    scored = predict(released, rows, tmp_path / "scores.csv")  # and scores
    assert scored.scored == int(rows.read.sum()) > 0
    lines = list(csv.DictReader((tmp_path / "scores.csv").read_text().splitlines()))
    assert len(lines) == scored.rows
    assert set(names(plan.table)) < set(lines[0])
    assert told(released, scored)
