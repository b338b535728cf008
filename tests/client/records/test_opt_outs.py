"""Patients who opted out are not in a dataset, and the audit log knows how many they are but not who."""

import hashlib
from pathlib import Path

import pytest

from cloister_client.connectors.connector import open_records
from cloister_client.dataset import Dataset, load_dataset
from cloister_shared import audit
from cloister_shared.errors import DataRefused
from cloister_shared.plan_file import read_plan

PLAN = """\
study: opted
title: Who opted out
task: {name: tabular}
table:
  patient_id: patient
  duplicates: allow
  target: {name: died, positive: 1, negative: 0}
  features: [{name: a, kind: number, range: [0, 100]}]
cohort: {min_sites: 2, min_patients: 1}
rounds: 1
strategy: {name: fedavg}
training: {learning_rate: 0.1, batch_size: 2, local_steps: 1}
privacy: {mechanism: none}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = "".join(f"{n // 2},{n},{n % 2}\n" for n in range(40))
    (tmp_path / "table.csv").write_text("patient,a,died\n" + rows)
    (tmp_path / "site.yaml").write_text("site: st-marys\ntable: {path: table.csv}\nopt_outs: opt_outs.txt\n")
    (tmp_path / "opt_outs.txt").write_text("# by post\n3\n 7 \n\n99\n")
    return tmp_path


def load(folder: Path, plan: str = PLAN) -> Dataset:
    return load_dataset(open_records(folder / "site.yaml"), read_plan(plan))


def test_their_rows_are_gone_before_anything_else(folder):
    text = (folder / "table.csv").read_text().replace("3,6,0\n", "3,a name,0\n")
    (folder / "table.csv").write_text(text)
    data = load(folder)
    assert len(data.train) + len(data.test) == 36
    assert {6.0, 7.0, 14.0, 15.0}.isdisjoint([*data.train.x.flatten().tolist(), *data.test.x.flatten().tolist()])
    assert "4 more rows are of patients who opted out" in data.quality.page()


def test_the_audit_log_learns_count_and_digest_once(folder):
    audit.append(folder / "audit.jsonl", "begun", {})
    load(folder)
    load(folder)
    (entry,) = [entry for entry in audit.verify(folder / "audit.jsonl") if entry.what == "opt-outs"]
    assert entry.said["count"] == 3
    assert len(entry.said["sha256"]) == 64
    (folder / "opt_outs.txt").write_text("3\n")
    load(folder)
    assert [e.said["count"] for e in audit.verify(folder / "audit.jsonl")[1:]] == [3, 1]


def test_a_digest_of_a_short_list_does_not_tell_the_id(folder):
    audit.append(folder / "audit.jsonl", "begun", {})
    (folder / "opt_outs.txt").write_text("3\n")
    load(folder)
    (_, entry) = audit.verify(folder / "audit.jsonl")
    assert entry.said["sha256"] != hashlib.sha256(b"3").hexdigest()


def test_a_list_that_cannot_be_read_stops_everything(folder):
    (folder / "opt_outs.txt").unlink()
    with pytest.raises(DataRefused, match="nobody's records are used"):
        load(folder)


def test_a_plan_that_does_not_know_patients_is_refused(folder):
    with pytest.raises(DataRefused, match="whose each row is"):
        load(folder, PLAN.replace("  patient_id: patient\n", ""))
