"""What a hospital tells of its records before training: counted right, paid for first, under noise of its own."""

import math

import numpy as np
import pandas as pd
import pytest

from cloister_client import site as site_module
from cloister_client import statistics
from cloister_client.connectors.connector import open_records
from cloister_client.coverage import Coverage, coverage
from cloister_client.dataset import load_dataset
from cloister_client.quality import QualityReport
from cloister_client.site import Site
from cloister_client.statistics import noisy_readiness
from cloister_shared import charges, readiness
from cloister_shared.budget import epsilon
from cloister_shared.errors import TicketRefused
from cloister_shared.noise import reproducible
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend, read_plan
from cloister_shared.tally import Numbers
from cloister_shared.wire import Ticket, TicketHeader
from cloister_simulations.site_folder import enrol_all, grant

PLAN = read_plan("""\
study: ready
title: Ready
task: {name: tabular}
table:
  patient_id: patient
  target: {name: died, positive: 1, negative: 0}
  duplicates: allow
  max_bad_rows: 0.5
  features:
    - {name: age, kind: number, range: [0, 120]}
    - {name: lactate, kind: number, range: [0, 30], missing: drop}
    - {name: smoker, kind: boolean, missing: indicator, fill: false}
    - {name: ward, kind: category, categories: [a, b], missing: fill, fill: a}
cohort: {min_sites: 2, min_patients: 5}
rounds: 2
strategy: {name: fedavg}
aggregation: {secure_sum: false}
training: {learning_rate: 0.1, batch_size: 60, local_steps: 1}
privacy: {mechanism: none}
readiness: {}
evaluation: {min_count: 1}
""")
DP = {"mechanism": "site", "unit": "patient", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0}
PRIVATE = amend(PLAN, privacy=DP, readiness={"epsilon_share": 0.2})
EXACT = amend(PLAN, evaluation={"min_count": 1})


@pytest.fixture
def frame() -> pd.DataFrame:
    """Sixty patients with one to three records each; gaps everywhere, and nobody's smoking is known."""
    draws = np.random.default_rng(5)
    patients = np.repeat([f"p{i}" for i in range(60)], draws.integers(1, 4, 60))
    n = len(patients)
    return pd.DataFrame(
        {
            "patient": patients,
            "died": draws.integers(0, 2, n),
            "age": np.where(draws.random(n) < 0.05, 200, draws.integers(20, 90, n)),  # out of range: a bad row
            "lactate": np.where(draws.random(n) < 0.4, np.nan, draws.random(n) * 5),
            "smoker": np.full(n, np.nan),
            "ward": np.where(draws.random(n) < 0.2, None, "b"),
        }
    )


@pytest.fixture
def seen(frame, tmp_path):
    """``seen(plan)``: what is known of those records."""

    def of(plan: StudyPlan) -> Coverage:
        found = opened(plan, frame, tmp_path).coverage
        assert found
        return found

    return of


def opened(plan, frame, folder):
    frame.to_csv(folder / "table.csv", index=False)
    accepts = "policy: {mechanisms: [none, site, shared]}\n"
    (folder / "site.yaml").write_text(f"site: elm\n{accepts}table:\n  path: table.csv\n")
    return load_dataset(open_records(folder / "site.yaml"), plan)


def told(seen: Coverage, plan: StudyPlan, seed: str = "s") -> Numbers:
    return noisy_readiness(seen, plan, reproducible(seed))


# --- the counts --------------------------------------------------------------------------------------------
def by_pandas(frame: pd.DataFrame, weights: np.ndarray) -> dict[str, float]:
    sound = frame["age"] <= 120
    used = sound & frame["lactate"].notna()
    return {
        "units": weights.sum(),
        "usable": weights[used].sum(),
        "has age": weights[sound].sum(),
        "has lactate": weights[frame["lactate"].notna()].sum(),
        "has smoker": 0.0,
        "has ward": weights[frame["ward"].notna()].sum(),
        "is died = 1": weights[used & (frame["died"] == 1)].sum(),
    }


def test_without_noise_they_are_a_plain_count_of_records(seen, frame):
    assert told(seen(EXACT), EXACT) == by_pandas(frame, np.ones(len(frame)))


def test_a_patient_counts_as_one_however_many_records(seen, frame, monkeypatch):
    monkeypatch.setattr(statistics, "readiness_event", lambda plan: None)  # exact, where there would be noise
    share = 1 / frame.groupby("patient")["age"].transform("size").to_numpy()
    plan = amend(PRIVATE, evaluation={"min_count": 1})
    found = {k: v for k, v in told(seen(plan), plan).items() if v is not None}
    expected = by_pandas(frame, share)
    assert found["units"] == pytest.approx(60)
    assert found == {name: pytest.approx(expected[name]) for name in found}


def test_a_record_without_a_patients_id_is_nobodys(seen, frame):
    frame.loc[frame.index[:3], "patient"] = None
    assert told(seen(EXACT), EXACT)["units"] == len(frame) - 3


def test_small_counts_are_withheld_on_both_sides(seen):
    found = told(
        Coverage(np.arange(20), np.array([[i < 2, i < 18, i < 10, False, True, i < 3] for i in range(20)])), few()
    )
    assert [found[name] for name in readiness.names(few())] == [20.0, None, None, 10.0, 0.0, 20.0, None]


def few() -> StudyPlan:
    return amend(PLAN, evaluation={"min_count": 3 + 1})


def test_a_withheld_class_does_not_follow_from_the_others():
    target = {"kind": "classes", "name": "kind", "classes": ["x", "y", "z"]}
    plan = amend(PLAN, table={"target": target}, evaluation={"min_count": 5})
    counts = dict.fromkeys(readiness.names(plan), 60.0) | {"is kind = x": 2.0, "is kind = y": 20.0, "is kind = z": 38.0}
    found = readiness.told(plan, counts)
    assert [found[f"is kind = {each}"] for each in "xyz"] == [None, None, 38.0]


def test_each_channel_of_a_series_is_a_feature_of_its_own():
    channels = [{"name": name, "range": [0, 1]} for name in ("pulse", "pressure")]
    features = [{"name": "vitals", "kind": "series", "steps": 2, "channels": channels, "required": False}]
    plan = amend(PLAN, task={"name": "series", "model": "gru"}, table={"features": features, "patient_id": None})
    taken = np.array([[[1, 0], [0, 0]], [[0, 0], [1, 1]], [[0, 0], [0, 0]]], np.float32)  # [records, steps, channels]
    x = np.concatenate([np.full_like(taken, 0.3), taken], axis=2).reshape(3, -1)
    frame = pd.DataFrame({"vitals": [None] * 3})
    found = coverage(frame, x, np.ones(3), np.ones(3, bool), plan, QualityReport("elm", 3, []))
    counts = dict(zip(readiness.questions(plan), found.answers.sum(0).tolist(), strict=True))
    assert counts == {"usable": 3, "has vitals: pulse": 2, "has vitals: pressure": 1, "is died = 1": 3}


# --- the noise ---------------------------------------------------------------------------------------------
def test_no_patient_moves_them_by_more_than_the_sensitivity(monkeypatch):
    """The worst: a patient with all the answers, or with none; and one whose records differ."""
    caught = []
    monkeypatch.setattr(
        statistics, "with_noise", lambda exact, sensitivity, *_: caught.append((exact, sensitivity)) or exact
    )
    questions = len(readiness.questions(PRIVATE))
    others = np.random.default_rng(1).random((9, questions)) < 0.5
    for own in (np.ones((4, questions)), np.zeros((1, questions)), np.eye(questions)):
        told(Coverage(np.arange(9), others), PRIVATE)
        told(Coverage(np.array([*range(9), *[9] * len(own)]), np.concatenate([others, own > 0])), PRIVATE)
        (without, sensitivity), (with_one, _) = caught[-2:]
        moved = np.linalg.norm(with_one - without)
        assert moved <= sensitivity * (1 + 1e-12)
        assert moved == pytest.approx(sensitivity) or own.shape[0] == questions
    assert sensitivity == pytest.approx(math.sqrt(1 + questions / 4))


@pytest.mark.parametrize("shared", [False, True])
def test_the_noise_is_what_the_event_says_and_whole(seen, shared):
    """A hospital's own: also where, in training, its part is a fraction of the noise."""
    plan = shared_noise() if shared else PRIVATE
    event = charges.readiness_event(plan)
    assert event
    assert (event.sample_rate, event.steps, event.purpose) == (1.0, 1, "readiness")
    assert epsilon([event], 1e-5) == pytest.approx(0.2 * 8.0, rel=5e-3)
    known, expected = seen(plan), by_pandas_of(seen(plan))
    draws = np.array([list(told(known, plan, f"{i}").values()) for i in range(600)])
    spread = event.noise_multiplier * math.sqrt(1 + len(readiness.questions(plan)) / 4)
    assert readiness.spread(plan) == pytest.approx(spread)
    assert draws[:, 0].std() == pytest.approx(spread, rel=0.12)
    assert draws[:, 1:].std(0).mean() == pytest.approx(spread * math.sqrt(1.25), rel=0.06)
    np.testing.assert_allclose(draws.mean(0), expected, atol=5 * spread / math.sqrt(600))
    steps = draws * 2**21
    assert (steps == np.rint(steps)).all()  # on the grid: no low bits that tell


def by_pandas_of(seen: Coverage) -> list[float]:
    _, whose, counts = np.unique(seen.patients, return_inverse=True, return_counts=True)
    weights = 1 / counts[whose]
    return [weights.sum(), *(weights @ seen.answers)]


def shared_noise() -> StudyPlan:
    return amend(
        PRIVATE,
        privacy={"mechanism": "shared"},
        aggregation={"secure_sum": True},
        cohort={"min_sites": 4},
        training={"sample_rate": 1.0},
    )


# --- the ledger --------------------------------------------------------------------------------------------
@pytest.fixture
def hospital(frame, tmp_path):
    """``hospital(plan)``: it has enrolled, so all is reserved."""

    def made(plan: StudyPlan) -> Site:
        folder = tmp_path / "sites" / "elm"
        enrol_all(tmp_path, ["elm", "oak", "ash", "yew"])
        if plan.private:
            grant(folder, plan)
        site = Site(plan, opened(plan, frame, tmp_path), folder)
        site.enrol()
        return site

    return made


def ask(site: Site, run: str = "run-1") -> Ticket:
    return Ticket(TicketHeader(run=run, plan=site.plan.digest, round=0, site=site.name))


def test_the_ledger_is_charged_before_there_is_anything_to_send(hospital, monkeypatch):
    site = hospital(PRIVATE)
    at_work = []
    monkeypatch.setattr(
        site_module,
        "noisy_readiness",
        lambda *_: at_work.append([event.purpose for event in site.ledger.history(site.plan.digest)]) or {},
    )
    site.readiness(ask(site))
    assert at_work == [["readiness"]]


def test_asked_again_it_says_the_same_and_is_charged_once(hospital):
    site = hospital(PRIVATE)
    first, again = site.readiness(ask(site)), site.readiness(ask(site))
    assert first.header == again.header
    assert [event.purpose for event in site.ledger.history(site.plan.digest)] == ["readiness"]


def test_after_training_there_is_no_second_noise(hospital):
    site = hospital(PRIVATE)
    site.readiness(ask(site))
    model = np.zeros(site.layout.size, np.float32)
    site.train(Ticket(ask(site).header.model_copy(update={"round": 1}), {"model": model}))
    with pytest.raises(TicketRefused, match="Round 0 is over"):
        site.readiness(ask(site))


def test_the_whole_study_keeps_its_epsilon():
    plan = amend(PRIVATE, normalisation={"method": "federated"}, evaluation={"epsilon_share": 0.1})
    assert [event.purpose for event in charges.charges(plan, 60)] == [
        "readiness",
        "statistics",
        "training",
        "evaluation",
    ]
    assert 0.99 * 8.0 < epsilon(charges.charges(plan, 60), 1e-5) <= 8.0


def test_under_shared_noise_colluders_take_nothing_of_it():
    """What all others tell of their noise leaves a hospital's own counts as they were."""
    with_it, alone = shared_noise(), charges.readiness_event(shared_noise())
    rows = charges.certificate(with_it)
    assert rows[0].epsilon <= 8.0
    assert rows[-1].epsilon > epsilon([alone], 1e-5)
    without = charges.certificate(amend(with_it, readiness=None))
    assert rows[-1].epsilon < without[-1].epsilon  # its part of epsilon is not multiplied by collusion


# --- the message -------------------------------------------------------------------------------------------
def test_it_travels_bare_under_the_secure_sum_and_tells_no_number_of_rows(hospital):
    site = hospital(amend(PRIVATE, aggregation={"secure_sum": True}))
    site.check(ask(site), "readiness")
    reply = site.readiness(ask(site))
    assert (reply.header.rows, reply.vectors, reply.octets) == (0, {}, {})
    assert tuple(reply.header.metrics) == readiness.names(site.plan)


def test_a_plan_that_does_not_ask_is_told_nothing(hospital):
    site = hospital(amend(PLAN, readiness=None))
    with pytest.raises(TicketRefused, match="does not ask for readiness"):
        site.readiness(ask(site))


def test_only_before_the_first_round(hospital):
    site = hospital(PRIVATE)
    with pytest.raises(TicketRefused, match="no work called readiness"):
        site.check(Ticket(ask(site).header.model_copy(update={"round": 1})), "readiness")
