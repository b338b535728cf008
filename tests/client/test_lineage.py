"""A patient who withdraws is named where their rows were used, and nowhere else; no id is written down anywhere."""

import hashlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cloister_client import offers
from cloister_client.cli import app
from cloister_client.connectors.connector import open_records
from cloister_client.dataset import load_dataset
from cloister_client.lineage import Lineage, facts_of
from cloister_client.lineage_answer import Part, Trace
from cloister_client.lineage_book import LineageBook
from cloister_client.lineage_text import Answer, page
from cloister_client.site import Site
from cloister_shared import audit, model_file
from cloister_shared.envelope import new_identity
from cloister_shared.errors import KeyBroken, LineageBroken
from cloister_shared.plan_file import read_plan
from cloister_shared.pseudonyms import among, new_key, pseudonyms, read_key
from cloister_shared.wire import Ticket, TicketHeader
from cloister_simulations.site_folder import grant

PLAN = """\
study: asthma
title: Asthma
task: {name: tabular}
table:
  patient_id: patient
  duplicates: allow
  target: {name: died, positive: 1, negative: 0}
  features: [{name: a, kind: number, range: [0, 1000]}]
cohort: {min_sites: 2, min_patients: 1}
rounds: 8
strategy: {name: fedavg}
aggregation: {secure_sum: false}
training: {learning_rate: 0.1, batch_size: 100, local_steps: 1}
privacy: {mechanism: none}
evaluation: {split_column: part, min_count: 1}
"""
DP = "privacy: {mechanism: site, unit: patient, epsilon: 3.0, delta: 1.0e-5, clip_norm: 1.0}"
TRAINED, ALSO, HELD_OUT, NOBODY = "MRN-00000007", "MRN-00000011", "MRN-00000019", "MRN-99999999"
"""The first 16 patients of 20 train, and nobody has the last id."""


class Hospital:
    """A folder with a table of 20 patients, two rows each, and the commands in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.list = folder, folder / "opt_outs.txt"
        rows = [f"MRN-{n // 2:08},{n},{n % 2},{'train' if n < 32 else 'test'}" for n in range(40)]
        (folder / "table.csv").write_text("\n".join(["patient,a,died,part", *rows, ""]))
        terms = {"site": "st-marys", "table": {"path": "table.csv"}, "opt_outs": "opt_outs.txt"}
        (folder / "site.yaml").write_text(yaml.safe_dump(terms))
        self.list.write_text("# by post\n")

    def opens(self, text: str = PLAN, *, traced: bool = True) -> Site:
        """As the agent's child process does when it begins."""
        plan, state = read_plan(text), offers.study_folder(self.folder / "agent", read_plan(text).digest)
        dataset = load_dataset(open_records(self.folder / "site.yaml"), plan)
        lineage = Lineage(LineageBook(self.folder), plan, dataset) if traced else None
        if plan.private and not (self.folder / "ledger.sqlite").exists():
            grant(self.folder, plan)
        policy = replace(dataset.policy, mechanisms=("none", "site"), min_cohort=2)
        ledger = self.folder / "ledger.sqlite"
        dataset = replace(dataset, ids=None, policy=policy)
        site = Site(plan, dataset, state, ledger=ledger, lineage=lineage)
        site.enrol()
        return site

    def trains(self, *rounds: int, text: str = PLAN) -> Site:
        site = self.opens(text)
        for number in rounds:
            site.train(ticket(site, number))
        return site

    def says(self, *words: str) -> str:
        done = CliRunner().invoke(app, ["lineage", "--site", str(self.folder / "site.yaml"), *words])
        return " ".join([str(done.exit_code), *(done.output + done.stderr).split()])

    def study(self, name: str = "asthma") -> dict:
        """What a program is told."""
        done = CliRunner().invoke(app, ["lineage", "--site", str(self.folder / "site.yaml"), "--by-patient", "--json"])
        assert done.exit_code == 0, done.output
        (found,) = [study for study in json.loads(done.stdout)["studies"] if study["study"] == name]
        return found


def ticket(site: Site, number: int) -> Ticket:
    header = TicketHeader(run="run-1", plan=site.plan.digest, round=number, site=site.name)
    return Ticket(header, {"model": np.zeros(site.layout.size, np.float32)})


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    return Hospital(tmp_path)


# --- who is named ------------------------------------------------------------------------------------------
def test_who_withdraws_after_training_is_named_with_the_rounds(hospital):
    hospital.trains(1, 2, 3)
    hospital.list.write_text(f"# by post\n{TRAINED}\n{NOBODY}\n")
    found = hospital.study()
    assert found["trained"] == {"patients": 1, "rounds": [[1, 3]]}
    assert found["by_line"]["2"]["trained"] == [[1, 3]], "the list's second line, and no other"
    assert list(found["by_line"]) == ["2"]
    assert "rows of 1 patient, in rounds 1 to 3 of 8" in hospital.says()


def test_who_withdrew_before_is_not_named(hospital):
    hospital.list.write_text(f"{TRAINED}\n")
    hospital.trains(1, 2)
    assert hospital.study()["patients"] == 0
    assert "no row of theirs was used in 1 study" in hospital.says()


def test_held_out_rows_are_said_to_be_held_out(hospital):
    hospital.trains(1, 2)
    hospital.list.write_text(f"{HELD_OUT}\n")
    found = hospital.study()
    assert (found["trained"]["patients"], found["held_out"]) == (0, {"patients": 1, "rounds": [[1, 2]]})
    said = hospital.says()
    assert "taught it nothing; exact metrics over such rows left, which nothing bounds" in said
    assert "keeps what it learned" not in said


@pytest.mark.parametrize(
    ("terms", "withdrawn"),
    [("readiness: {}", [HELD_OUT]), ("normalisation: {method: federated}", [HELD_OUT, TRAINED])],
)
def test_readiness_counts_who_is_held_out_and_the_sums_for_the_scale_do_not(hospital, terms, withdrawn):
    site = hospital.opens(f"{PLAN}{terms}\n")
    (site.readiness if "readiness" in terms else site.statistics)(ticket(site, 0))
    hospital.list.write_text("\n".join(withdrawn))
    assert "rows of 1 patient, in the sums and counts before round 1" in hospital.says()


def test_of_two_studies_the_one_that_used_them_is_named(hospital):
    hospital.trains(1)
    hospital.list.write_text(f"{TRAINED}\n")
    hospital.trains(1, 2, text=PLAN.replace("asthma", "sepsis"))
    assert (hospital.study("asthma")["patients"], hospital.study("sepsis")["patients"]) == (1, 0)
    assert "rows of 1 were used, in 1 of 2 studies on record" in hospital.says()


def test_who_withdraws_in_the_middle_is_not_used_from_then_on(hospital):
    hospital.trains(1, 2, 3)
    hospital.list.write_text(f"{TRAINED}\n")
    hospital.trains(4, 5)
    found = hospital.study()
    assert (found["trained"]["rounds"], found["unused_from"], found["still_in"]) == ([[1, 3]], 4, 0)
    assert "from round 4 on none of their rows was used" in hospital.says()


def test_who_comes_back_has_two_stretches(hospital):
    hospital.trains(1, 2)
    hospital.list.write_text(f"{TRAINED}\n")
    hospital.trains(3)
    hospital.list.write_text("")
    hospital.trains(4, 5)
    hospital.list.write_text(f"{TRAINED}\n")
    assert hospital.study()["trained"]["rounds"] == [[1, 2], [4, 5]]


def test_a_round_that_is_over_changes_nothing_and_a_lower_one_begins_a_new_stretch(hospital):
    hospital.trains(4, 4, 5, 2)
    hospital.list.write_text(f"{TRAINED}\n")
    assert hospital.study()["trained"]["rounds"] == [[2, 2], [4, 5]]


def test_a_list_of_ones_own_and_what_is_not_on_the_opt_outs(hospital):
    hospital.trains(1)
    asked = hospital.folder / "asked.txt"
    asked.write_text(f"{TRAINED}\n{ALSO}\n{TRAINED}\n")
    said = hospital.says("--patients", str(asked))
    assert "2 patients are on asked.txt; rows of 2 were used" in said
    assert "not known here any more" in said, "there is no agent's folder"


def test_a_plan_that_does_not_know_patients_is_said_to_trace_nobody(hospital):
    (hospital.folder / "site.yaml").write_text("site: st-marys\ntable: {path: table.csv}\n")
    hospital.trains(1, text=PLAN.replace("  patient_id: patient\n", ""))
    asked = hospital.folder / "asked.txt"
    asked.write_text(f"{TRAINED}\n")
    said = hospital.says("--patients", str(asked))
    assert said.startswith("0 ")
    assert re.search(r"asthma, version 1 \(\w{12}\) names no table.patient_id: nobody can be traced", said)


def test_without_a_list_one_sentence_says_what_to_write(hospital):
    (hospital.folder / "site.yaml").write_text("site: st-marys\ntable: {path: table.csv}\n")
    said = hospital.says()
    assert said.startswith("1 ")
    assert "opt_outs: FILE" in said


# --- what bounds it, and which model --------------------------------------------------------------------------
def test_the_bound_is_the_plans_and_the_ledgers(hospital):
    hospital.trains(1, 2, text=PLAN.replace("privacy: {mechanism: none}", DP))
    hospital.list.write_text(f"{TRAINED}\n")
    found = hospital.study()
    assert 0 < found["budget"]["spent"] < found["budget"]["whole"] <= 3
    assert "the model tells of any one patient at most epsilon 3 at delta 1e-05" in hospital.says()


def test_without_privacy_nothing_is_said_to_bound_it(hospital):
    hospital.trains(1)
    hospital.list.write_text(f"{TRAINED}\n")
    assert "Bound none: without differential privacy nothing limits" in hospital.says()


def test_the_model_is_the_file_that_is_released(hospital, tmp_path):
    site = hospital.trains(1)
    final = ticket(site, 9)
    final.vectors["model"][:] = np.arange(site.layout.size)
    site.evaluate(final)
    hospital.list.write_text(f"{TRAINED}\n")
    key = new_identity(tmp_path / "signing.key")
    made = model_file.write(
        tmp_path / "model", site.plan, final.vectors["model"], None, key, at=8, metrics={}, metrics_of="x"
    )
    assert hospital.study()["model"] == made.files[model_file.WEIGHTS]
    assert made.files[model_file.WEIGHTS] in hospital.says()


def test_a_budget_refusal_is_no_use(hospital):
    site = hospital.opens(PLAN.replace("privacy: {mechanism: none}", DP))
    site.ledger.settle(site.plan.digest)
    with pytest.raises(Exception, match="cannot be paid for"):
        site.train(ticket(site, 1))
    hospital.list.write_text(f"{TRAINED}\n")
    assert "no row of theirs was used in 0 studies" in hospital.says()


def test_a_page_of_a_study_that_runs_is_narrow(hospital):
    plan = read_plan(PLAN.replace("privacy: {mechanism: none}", DP))
    facts = facts_of(plan, load_dataset(open_records(hospital.folder / "site.yaml"), plan))
    trace = Trace(facts, {1: Part(trained=((1, 2),))}, True, frozenset({1}), None, 2, "running", "", None)
    said = page(Answer("a-list", (1, 2), frozenset(), [trace], ["asthma (0123456789ab)"]), by_patient=True)
    assert "not used from round 3 on" in " ".join(said.split())
    assert max(map(len, said.splitlines())) <= 100


def test_after_a_withdrawal_the_others_are_drawn_as_was_reserved(hospital):
    text = PLAN.replace("privacy: {mechanism: none}", DP).replace("batch_size: 100", "batch_size: 4")
    assert "sample_rate" not in text
    hospital.trains(1, text=text)
    hospital.list.write_text(f"{TRAINED}\n")
    again = hospital.opens(text)
    again.enrol()
    again.train(ticket(again, 2))
    (study,) = (one for one in again.ledger.reservations() if one.plan == again.plan.digest)
    assert len({(event.sample_rate, event.noise_multiplier) for event in study.spent}) == 1
    assert sum(event.steps for event in study.spent) == 2 * again.plan.training.local_steps
    assert hospital.study()["unused_from"] == 2


# --- durable, and without an id ---------------------------------------------------------------------------------
def test_no_id_is_in_any_file_but_the_hospitals_own(hospital):
    site = hospital.trains(1, 2, text=PLAN.replace("privacy: {mechanism: none}", DP))
    site.evaluate(ticket(site, 9))
    hospital.list.write_text(f"{TRAINED}\n")
    said = hospital.says("--by-patient") + hospital.says("--json", "--by-patient")
    own = {"table.csv", "opt_outs.txt"}
    written = {
        path: path.read_bytes() for path in hospital.folder.rglob("*") if path.is_file() and path.name not in own
    }
    assert {"lineage.sqlite", "lineage.key", "audit.jsonl"} <= {path.name for path in written}
    ids = [f"MRN-{n:08}".encode() for n in range(20)]
    plain = [hashlib.sha256(id_).digest() for id_ in ids]
    for octets in (*written.values(), said.encode()):
        assert not any(id_ in octets for id_ in [*ids, *plain, *(digest.hex().encode() for digest in plain)])


def test_key_and_record_are_their_owners_alone(hospital):
    hospital.trains(1)
    for name in ("lineage.key", "lineage.sqlite"):
        assert (hospital.folder / name).stat().st_mode & 0o077 == 0


def test_the_audit_log_has_a_line_for_each_new_set_and_no_other(hospital):
    hospital.trains(1, 2)
    hospital.trains(3)
    hospital.list.write_text(f"{TRAINED}\n")
    hospital.trains(4)
    lines = [entry.said for entry in audit.verify(hospital.folder / "audit.jsonl") if entry.what == "lineage.set"]
    assert [(said["round"], said["train"]["count"], said["held_out"]["count"]) for said in lines] == [
        (1, 16, 4),
        (4, 15, 4),
    ]
    book = LineageBook(hospital.folder)
    assert {name.ljust(16, b"\0") for name in book.members(lines[0]["train"]["sha256"])} > {
        name.ljust(16, b"\0") for name in book.members(lines[1]["train"]["sha256"])
    }


KILLED = """
import os, sys
from pathlib import Path
from test_lineage import *
hospital = object.__new__(Hospital)
hospital.folder, hospital.list = Path(sys.argv[1]), Path(sys.argv[1]) / "opt_outs.txt"
site = hospital.opens(PLAN.replace("privacy: {mechanism: none}", DP))
where, name = (audit, "append_where") if sys.argv[2] == "before the log" else (site, "_reply")
if sys.argv[2] == "before the commitment":
    where, name = site, "_commit"
setattr(where, name, lambda *a, **k: os._exit(9))
site.train(ticket(site, 1))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "used"), [("before the commitment", False), ("before the log", True), ("before the reply", True)]
)
def test_a_kill_leaves_nobody_unrecorded_and_the_log_whole(hospital, stage, used):
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(hospital.folder), stage], env={**os.environ, "PYTHONPATH": path}, check=False
    )
    assert done.returncode == 9
    asked = hospital.folder / "asked.txt"
    asked.write_text(f"{TRAINED}\n")
    assert ("rows of 1 were used" in hospital.says("--patients", str(asked))) == used
    hospital.trains(1, text=PLAN.replace("privacy: {mechanism: none}", DP))
    hospital.list.write_text(f"{TRAINED}\n")
    assert hospital.study()["trained"] == {"patients": 1, "rounds": [[1, 1]]}
    told = [entry.what for entry in audit.verify(hospital.folder / "audit.jsonl")]
    assert (told.count("lineage.begun"), told.count("lineage.set")) == (1, 1)


def test_an_answer_from_before_a_withdrawal_stays_recorded(hospital):
    """It is repeated from the disk after the list grew: the patient is in it."""
    text = PLAN.replace("privacy: {mechanism: none}", DP).replace("batch_size: 100", "batch_size: 8, sample_rate: 0.5")
    site = hospital.trains(1, text=text)
    first = site.train(ticket(site, 1)).vectors["update"]
    hospital.list.write_text(f"{TRAINED}\n")
    again = hospital.opens(text)
    np.testing.assert_array_equal(again.train(ticket(again, 1)).vectors["update"], first)
    assert hospital.study()["trained"]["rounds"] == [[1, 1]]
    again.train(ticket(again, 2))
    assert hospital.study()["unused_from"] == 2


AT_ONCE = """
import sys, time
from pathlib import Path
import numpy as np
from cloister_client.lineage_book import Facts, LineageBook, Patients
from cloister_shared.pseudonyms import pseudonyms
own, begins = int(sys.argv[2]), float(sys.argv[3])
facts = Facts(f"{own:064}", f"study-{own}", 1, 8, "", "", None, None, False, False, True)
for number, folder in enumerate(sorted(Path(sys.argv[1]).iterdir())):
    while time.time() < begins + number * 0.05:
        pass
    book = LineageBook(folder)
    patients = Patients(np.sort(pseudonyms(book.key, [f"p{n}" for n in range(own, own + 50)])))
    for round_ in (1, 2):
        book.used(facts, round_, patients, Patients(None))
    book.close()
"""


@pytest.mark.slow
def test_studies_that_begin_at_once_are_all_on_record(tmp_path):
    folders = [tmp_path / f"{n:03}" for n in range(40)]
    for folder in folders:
        folder.mkdir()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", AT_ONCE, str(tmp_path)]
    running = [subprocess.Popen([*words, str(n), str(time.time() + 3)], env=env) for n in range(4)]
    assert [one.wait(120) for one in running] == [0, 0, 0, 0]
    for folder in folders:
        told = [entry.what for entry in audit.verify(folder / "audit.jsonl")]
        assert sorted(told) == ["lineage.begun", *["lineage.set"] * 4]


# --- what is lost or damaged ---------------------------------------------------------------------------------
def test_a_lost_key_is_one_sentence_and_stops_training(hospital):
    hospital.trains(1)
    (hospital.folder / "lineage.key").unlink()
    said = hospital.says()
    assert said.startswith("2 ")
    assert "lineage.key is not there" in said
    assert "Restore lineage.sqlite, lineage.key" in said
    with pytest.raises(LineageBroken, match="Nobody can be found"):
        hospital.trains(2)


def test_another_key_is_refused(hospital):
    hospital.trains(1)
    (hospital.folder / "lineage.key").unlink()
    new_key(hospital.folder / "lineage.key")
    assert "was made with another key" in hospital.says()


def test_a_key_that_others_can_read_is_refused(tmp_path):
    new_key(tmp_path / "k")
    (tmp_path / "k").chmod(0o640)
    with pytest.raises(KeyBroken, match="Others on this machine can read"):
        read_key(tmp_path / "k")


def garbage(path: Path) -> None:
    path.write_bytes(b"no database" * 400)


def flipped(path: Path) -> None:
    with sqlite3.connect(path) as one:
        one.execute("UPDATE sets SET members = zeroblob(length(members)) WHERE length(members) > 16 * 10")


def cut(path: Path) -> None:
    with sqlite3.connect(path) as one:
        one.execute("DELETE FROM uses")


def renamed(path: Path) -> None:
    with sqlite3.connect(path) as one:
        one.execute("""UPDATE studies SET facts = '{"plan": 1}'""")


@pytest.mark.parametrize("damage", [garbage, flipped, cut, renamed])
def test_a_damaged_record_is_one_sentence_that_names_file_and_mend(hospital, damage):
    hospital.trains(1).close()
    damage(hospital.folder / "lineage.sqlite")
    hospital.list.write_text(f"{TRAINED}\n")
    said = hospital.says()
    assert said.startswith("2 ")
    assert str(hospital.folder / "lineage.sqlite") in said
    assert "Restore lineage.sqlite" in said
    assert "Traceback" not in said


def test_a_missing_record_is_named_and_one_begun_anew_says_what_it_cannot_trace(hospital):
    hospital.trains(1).close()
    (hospital.folder / "lineage.sqlite").unlink()
    assert "lineage.sqlite is missing" in hospital.says()
    hospital.list.write_text(f"{TRAINED}\n")
    hospital.trains(1, text=PLAN.replace("asthma", "sepsis"))
    said = hospital.says()
    assert said.startswith("0 ")
    assert re.search(r"Whose rows asthma \(\w{12}\) used is on no record here: nobody can be traced", said)


def test_a_study_from_before_the_record_is_said_to_trace_nobody(hospital):
    site = hospital.opens(PLAN.replace("privacy: {mechanism: none}", DP), traced=False)
    site.train(ticket(site, 1))
    hospital.list.write_text(f"{TRAINED}\n")
    assert "nobody can be traced" in hospital.says()


# --- membership ------------------------------------------------------------------------------------------------
@given(st.sets(st.text(max_size=12), max_size=40), st.sets(st.text(max_size=12), max_size=40))
@settings(max_examples=60, deadline=None)
def test_an_id_is_found_where_it_was_put_and_nowhere_else(inside, outside):
    key, asked = bytes(range(32)), [*sorted(inside), *sorted(outside - inside)]
    members = np.sort(pseudonyms(key, inside))
    assert among(pseudonyms(key, asked), members).tolist() == [id_ in inside for id_ in asked]
    other = np.sort(pseudonyms(bytes(32), inside))
    assert not among(pseudonyms(key, asked), other).any()
