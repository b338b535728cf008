"""cloister_server.readiness: what the coordinator takes, keeps and shows of what the hospitals hold."""

import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from cloister_server import folder, readiness, worker
from cloister_server.cli import app
from cloister_server.dashboard import facts
from cloister_server.readiness import Table, checked, load, page, released, save
from cloister_shared.errors import CheckpointBroken, ReplyRejected, StudyHeld
from cloister_shared.plan_file import amend, read_plan
from cloister_shared.readiness import names
from cloister_shared.wire import Reply, ReplyHeader

TEXT = """
study: three
title: Three hospitals
task: {name: tabular}
table:
  patient_id: patient
  features:
    - {name: age, kind: number, range: [0, 100]}
    - {name: lactate, kind: number, range: [0, 30], missing: indicator, fill: 1}
  target: {name: died, positive: 1, negative: 0}
cohort: {min_sites: 2, min_patients: 5, max_rows: 1000}
rounds: 4
strategy: {name: fedavg}
training: {learning_rate: 0.1, batch_size: 8, local_steps: 1}
privacy: {mechanism: site, unit: patient, epsilon: 8.0, delta: 1.0e-5, clip_norm: 1.0}
readiness: {epsilon_share: 0.1}
"""
PLAN = read_plan(TEXT)
EXACT = amend(PLAN, privacy=dict.fromkeys(("unit", "epsilon", "delta", "clip_norm")) | {"mechanism": "none"},
              readiness={"epsilon_share": None})  # fmt: skip


def counts(units: float, usable: float, age: float, lactate: float | None, died: float) -> dict[str, float | None]:
    return dict(zip(names(PLAN), (units, usable, age, lactate, died), strict=True))


GOOD = counts(200.0, 195.0, 198.5, 40.0, 34.0)
TABLE = Table({"Ash": GOOD, "Beech": counts(100, 100, 101, 49, 25)}, {"Cedar": "no answer within 600 s"}, 5.0)


def reply(metrics: dict[str, float | None], **header: object) -> Reply:
    return Reply(ReplyHeader(**{"run": "run-1", "round": 0, "site": "Ash", "metrics": metrics, **header}))


# --- what is taken -----------------------------------------------------------------------------------------
def test_a_sound_reply_is_taken_as_it_is():
    assert checked(PLAN, 5.0, "Ash", reply(GOOD)) == GOOD


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        (reply({**GOOD, "has ssn": 3.0}), "the readiness is not 5 counts"),
        (reply({k: v for k, v in GOOD.items() if k != "usable"}), "the readiness is not 5 counts"),
        (reply({**GOOD, "units": None}), "the readiness is not 5 counts"),
        (reply({**GOOD, "has age": None}), "the readiness is not 5 counts"),  # under DP nothing is withheld
        (reply({**GOOD, "has age": 1e300}), "more than 1000"),
        (reply({**GOOD, "units": -51.0}), "what the plan does not allow"),
        (reply(GOOD, site="Beech"), "the readiness is Beech's for round 0"),
        (reply(GOOD, round=1), "the readiness is Ash's for round 1"),
    ],
)
def test_an_odd_reply_is_refused_in_a_sentence(odd, says):
    with pytest.raises(ReplyRejected, match=says) as refused:
        checked(PLAN, 5.0, "Ash", odd)
    assert "\n" not in str(refused.value)


def test_without_privacy_small_counts_may_be_withheld():
    assert checked(EXACT, None, "Ash", reply({**GOOD, "has lactate": None}))["has lactate"] is None


# --- what is kept ------------------------------------------------------------------------------------------
def test_the_table_is_kept(tmp_path):
    assert load(tmp_path) is None
    save(tmp_path, TABLE)
    assert load(tmp_path) == TABLE


def test_a_damaged_table_is_a_sentence(tmp_path):
    save(tmp_path, TABLE)
    path = tmp_path / "readiness.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(CheckpointBroken, match="damaged"):
        load(tmp_path)


def test_a_hold_is_let_go(tmp_path):
    save(tmp_path, Table({}, held=True))
    released(tmp_path)
    assert load(tmp_path) == Table({}, held=False)


# --- what is shown -----------------------------------------------------------------------------------------
def test_the_page():
    assert page(PLAN, TABLE).splitlines() == [
        "                     Ash   Beech     all",
        "patients             200     100     300",
        "usable               98%    100%     98%",
        "age                  99%    100%    100%",
        "lactate            20% !   49% ?   30% !",
        "died = 1             17%   25% ?     20%",
        "noise of a share   ±2.5%   ±5.0%   ±2.4%",
        "",
        "Each hospital added noise of its own: a standard deviation of 5.0 patients on how many there are. Of",
        "   a share it is in the last line.",
        "!  Thin: fewer than half of the patients have it; of an outcome, fewer than 20, though two standard",
        "   deviations be the noise's. ?  The noise hides whether it is so.",
        "Not told: Cedar: no answer within 600 s",
    ]


def test_a_withheld_count_is_a_dash_and_so_is_the_sum():
    shown = page(EXACT, Table({"Ash": {**GOOD, "has lactate": None}, "Beech": GOOD})).splitlines()
    assert shown[4] == "lactate        –   20% !       –"
    assert "–  Withheld: fewer than 5 records have it, or lack it." in shown
    assert not any("noise" in line for line in shown)


def test_any_number_of_hospitals_fits_a_terminal():
    many = Table({f"A hospital with a long name {at}": GOOD for at in range(23)}, spread=5.0)
    lines = page(PLAN, many).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("lactate") for line in lines) == -(-23 // 3)


def test_a_hospital_of_nobody_divides_by_nothing():
    shown = page(PLAN, Table({"Ash": counts(-3, 1, 1, 1, 1), "Beech": GOOD}, spread=5.0))
    assert "No patients to tell of" in shown


# --- the commands ------------------------------------------------------------------------------------------
@pytest.fixture
def study(made_once, tmp_path, monkeypatch):
    """The study in ./consortium, and the folder of its state."""
    shutil.copytree(made_once, tmp_path / "consortium")
    monkeypatch.chdir(tmp_path)
    opened = folder.open_consortium(tmp_path / "consortium")
    opened.registry.add_study(PLAN.digest, "three", TEXT, "plan.yaml", "officer", {}, "")
    place = tmp_path / "consortium" / "studies" / PLAN.digest[:16]
    place.mkdir(parents=True)
    yield opened, place
    opened.registry.close()


def typed(*words):
    return CliRunner().invoke(app, ["study", "readiness", *words])


def test_the_command_shows_the_table(study, tmp_path):
    opened, place = study
    save(place, TABLE)
    done = typed("three")
    assert done.exit_code == 0, done.output
    assert page(PLAN, TABLE) in done.output
    as_json = json.loads(typed("three", "--json").output)
    assert as_json["counts"]["Ash"] == GOOD
    assert as_json["shares"]["lactate"]["Ash"] == {"share": 0.2, "mark": "!"}
    assert '"study readiness"' in (tmp_path / "consortium" / "audit.jsonl").read_text()
    assert facts.readiness_page(opened.registry.study("three"), tmp_path / "consortium") == page(PLAN, TABLE)


def test_the_worker_stops_a_study_for_its_reader_and_whoever_resumes_it_lets_it_go(study, tmp_path, monkeypatch):
    """Stopped first and let go after it: a crash between the two stops it again, and never lets it go unread."""
    opened, place = study
    opened.registry.move(PLAN.digest, "running")
    save(place, Table(TABLE.told, held=True))
    at_release = []

    def hold(*_: object) -> None:
        raise StudyHeld("2 hospitals told what they hold.")

    monkeypatch.setattr(worker, "open_consortium", lambda folder: opened)
    monkeypatch.setattr(worker, "open_link", lambda folder: SimpleNamespace(run=lambda digest: nullcontext()))
    monkeypatch.setattr(worker, "_gather", lambda *_: None)
    monkeypatch.setattr(worker, "run_study", hold)
    let_go = readiness.released
    monkeypatch.setattr(
        readiness, "released", lambda folder: at_release.append(opened.registry.study("three").state) or let_go(folder)
    )
    worker.work(tmp_path / "consortium", PLAN.digest)
    assert at_release == ["stopped"]
    assert "cloister-coordinator study readiness" in opened.registry.study("three").reason
    assert load(place) == Table(TABLE.told, held=False)


def test_before_it_is_told_the_command_says_so(study):
    done = typed("three")
    assert done.exit_code == 1
    assert "three: no hospital told what it holds. It comes once the study runs." in done.output


def test_a_page_needs_no_table(study, tmp_path):
    opened, _ = study
    assert facts.readiness_page(opened.registry.study("three"), tmp_path / "consortium") == ""
    assert readiness.load(tmp_path) is None
