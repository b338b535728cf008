"""cloister-site map: what it proposes, which unit it suspects, and that it never says a value."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from cloister_client.cli import app
from cloister_client.connectors.connector import open_records
from cloister_client.mapping import Mapping, mapped
from cloister_shared.console import BROKEN
from cloister_shared.plan_file import read_plan
from cloister_simulations.sources.clinical_forms import invent, write_form

PLAN = """\
study: mapped
title: Columns that are called otherwise
task: {name: tabular}
table:
  patient_id: patient
  target: {name: died, positive: 1, negative: 0, code: "LOCAL:death", window: {since: 0, until: 720}}
  features:
    - {name: age, kind: number, unit: year, range: [18, 110], code: "LOCAL:age"}
    - {name: weight, kind: number, unit: kg, range: [30, 130], code: "LOINC:29463-7"}
    - {name: creatinine, kind: number, unit: mg/dL, range: [0.1, 12], code: "LOINC:2160-0"}
    - {name: sex, kind: category, categories: [female, male], code: "LOCAL:sex"}
    - {name: ferritin, kind: number, unit: ug/L, range: [0, 5000], code: "LOINC:2276-4"}
cohort: {min_sites: 2, min_patients: 1}
rounds: 1
strategy: {name: fedavg}
training: {learning_rate: 0.1, batch_size: 2, local_steps: 1}
privacy: {mechanism: none}
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    pd.DataFrame(
        {
            "patient": [f"p{n}" for n in range(200)],
            "AGE_YEARS": rng.integers(20, 90, 200),
            "weight": rng.normal(175, 25, 200).round(1),
            "lab_2160_0": rng.normal(95, 20, 200).round(0),
            "SEX": rng.choice(["female", "male"], 200),
            "ward": rng.choice(["a", "b"], 200),
            "died": rng.integers(0, 2, 200),
        }
    ).to_csv(tmp_path / "table.csv", index=False)
    (tmp_path / "site.yaml").write_text("site: st-marys\ntable: {path: table.csv}\n")
    return tmp_path / "site.yaml"


def of(site: Path) -> Mapping:
    return mapped(read_plan(PLAN).table, open_records(site))


def test_columns_are_found_by_name_and_by_code(table):
    found = {match.name: match.here for match in of(table).matches}
    assert found == {
        "age": "AGE_YEARS",
        "weight": "weight",
        "creatinine": "lab_2160_0",
        "sex": "SEX",
        "ferritin": "",
        "died": "died",
        "patient": "patient",
    }


def test_values_far_outside_the_range_suggest_another_unit(table):
    found = {match.name: match for match in of(table).matches}
    assert found["weight"].unit == "lb"
    assert "lb would fit" in found["weight"].note
    assert found["creatinine"].unit == "umol/L"
    assert found["creatinine"].factor == pytest.approx(0.011312)
    assert not found["age"].unit


def test_what_it_prints_is_a_site_yaml(table):
    shown = CliRunner().invoke(app, ["map", str(plan_file(table)), "--site", str(table)])
    assert shown.exit_code == 1
    assert max(map(len, shown.output.splitlines())) <= 100
    section = shown.output[shown.output.index("\ntable:\n") :].replace("table:", "table:\n  path: table.csv", 1)
    table.write_text(f"site: st-marys\n{section}")
    assert [m.name for m in of(table).matches if not m.sound] == ["ferritin"]


def plan_file(beside: Path) -> Path:
    (beside.parent / "plan.yaml").write_text(PLAN)
    return beside.parent / "plan.yaml"


def test_codes_are_looked_up_in_clinical_records(tmp_path):
    found = {match.name: match for match in of(write_form(invent(20, 1), "omop", tmp_path, "st-marys")).matches}
    assert found["weight"].here == "LOINC:29463-7"
    assert found["weight"].told
    assert 0 < found["weight"].records < found["weight"].of
    assert found["ferritin"].note == "no fact under LOINC:2276-4"
    assert found["died"].records > 0


def test_a_local_code_is_proposed_for_what_its_text_is_like(tmp_path):
    site = write_form(invent(20, 1), "fhir", tmp_path, "st-marys")
    for path in (tmp_path / "export").glob("Observation*.ndjson"):
        text = path.read_text().replace("http://loinc.org", "http://st-marys").replace("29463-7", "BODY_WEIGHT")
        path.write_text(text)
    (tmp_path / "export" / "Observation.001.ndjson.gz").unlink()
    weight = next(match for match in of(site).matches if match.name == "weight")
    assert weight.here == "LOCAL:BODY_WEIGHT"
    assert not weight.told
    assert weight.records > 0


@pytest.mark.parametrize(("form", "package"), [("fhir", "orjson"), ("omop", "duckdb")])
def test_a_package_that_is_missing_is_named_with_the_extra_that_brings_it(tmp_path, monkeypatch, form, package):
    site = write_form(invent(20, 1), form, tmp_path, "st-marys")
    (tmp_path / "plan.yaml").write_text(PLAN)
    monkeypatch.setitem(sys.modules, package, None)
    said = CliRunner().invoke(app, ["map", str(tmp_path / "plan.yaml"), "--site", str(site)])
    assert said.exit_code == BROKEN
    assert said.stderr == f"This needs {package}, which is not installed. Run pip install 'cloister[records]'.\n"
