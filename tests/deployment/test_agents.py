"""Clinical scenarios through a real coordinator and real agents: each in its training process without a network."""

import json
from pathlib import Path

import pytest
import yaml

from cloister_client.ledger import Ledger
from cloister_shared import budget
from cloister_simulations.consortium import Shown, demonstrate, told
from cloister_simulations.scenario import shipped

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
