"""Clinical scenarios through a real coordinator and real agents: each in its training process without a network."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest
import yaml

from cloister_client.connectors.connector import open_records
from cloister_client.ledger import Ledger
from cloister_server.records import Study
from cloister_shared import budget
from cloister_shared.plan import Mechanism
from cloister_simulations.consortium import Shown, demonstrate, own, told
from cloister_simulations.scenario import read_scenario, shipped

ROUNDS = 2
FEWER = {
    "clinical-forms": {"patients": 400},
    "generated-stays": {"stays": 400},
    "dicom": {"patients": 80},
}
"""Coded records in three forms to an MLP; series to a GRU, under noise of each hospital; pictures to a CNN, under noise
that all hospitals share."""


@pytest.fixture(scope="module", params=FEWER)
def shown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    folder = tmp_path_factory.mktemp(request.param)
    scenario = yaml.safe_load(shipped()[request.param].read_text())
    scenario["simulation"]["hospitals"] |= FEWER[request.param]
    (folder / "fewer.yaml").write_text(yaml.safe_dump(scenario))
    return demonstrate(folder, str(folder / "fewer.yaml"), ROUNDS, lambda what, took: None)


@pytest.mark.slow
def test_every_hospital_is_in_every_round_and_the_model_is_the_engines(shown):
    assert shown.study.state == "finished", shown.study.reason
    assert [set(record["answered"]) for record in shown.rounds] == [set(shown.sites)] * ROUNDS
    assert shown.difference == 0
    assert "the same, bit for bit" in told(shown, Path("out"))


@pytest.mark.slow
def test_what_left_was_masked(shown):
    assert shown.plan.aggregation.secure_sum
    for site_yaml in shown.sites.values():
        lines = (site_yaml.parent / "agent/egress.jsonl").read_text().splitlines()
        sent = [json.loads(line)["said"] for line in lines]
        updates = [said for said in sent if said["kind"] == "train"]
        assert len(updates) == ROUNDS
        left = {(name, of) for said in updates for name, of, _ in said["vectors"]}
        assert left == {("update", "uint8"), ("tally", "uint8"), ("shares", "uint8")}  # no float, which is unmasked


@pytest.mark.slow
def test_each_ledger_is_charged_what_the_plan_costs(shown):
    for site_yaml in shown.sites.values():
        ledger = Ledger(site_yaml.parent / "ledger.sqlite", "patients")
        spent = ledger.history(shown.plan.digest)
        ledger.close()
        promised = shown.plan.privacy.epsilon
        assert 0.9 * promised < budget.epsilon(spent, shown.plan.privacy.delta) <= promised


def test_a_hospital_that_lies_elsewhere_gets_a_folder_of_its_own(tmp_path):
    """Whoever tries it with a real ``site.yaml`` finds neither keys nor a charged ledger beside it."""
    at = tmp_path / "theirs"
    at.mkdir()
    pd.DataFrame({"patient": ["a"], "age": [41]}).to_csv(at / "north.csv", index=False)
    (at / "north.yaml").write_text("site: north\ntable: {path: north.csv}\n")
    (at / "ledger.sqlite").write_bytes(b"real")
    before = sorted(at.iterdir())
    site_yaml = own(at / "north.yaml", tmp_path / "hospitals")
    assert site_yaml == tmp_path / "hospitals/north/site.yaml"
    assert open_records(site_yaml).count() == 1
    assert not (site_yaml.parent / "ledger.sqlite").exists()
    assert sorted(at.iterdir()) == before


def test_what_is_told_of_a_study_without_privacy_names_no_noise():
    plan = read_scenario("breast-cancer").plan
    plain = plan.model_copy(update={"privacy": plan.privacy.model_copy(update={"mechanism": Mechanism.NONE})})
    study = Study("", plan.study, "", "", "", {}, "", datetime.now(UTC), "finished", "", 1)
    said = [told(Shown(study, one, {}, difference=0.0, parameters=3), Path("out")) for one in (plan, plain)]
    assert ["noise" in page for page in said] == [True, False]
    assert max(len(line) for page in said for line in page.splitlines()) <= 100
