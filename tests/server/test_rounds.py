"""The round engine against a scripted grid: one odd reply is named and left out, and the round goes on."""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from cloister_server.rounds import Study, noise_variance, run_round, step
from cloister_server.store import Checkpoint, Store
from cloister_server.strategies import fedadam, fedadam_without_noise
from cloister_server.total import Mean
from cloister_shared.charges import part_of, training_event
from cloister_shared.errors import CheckpointBroken, QuorumLost
from cloister_shared.layout import Layout
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend, read_plan
from cloister_shared.wire import ReplyHeader, pack, pack_vectors, unpack_ticket

PLAN = """
study: three
title: Three hospitals
task: {name: tabular}
table:
  features: [{name: age, kind: number, range: [0, 100]}]
  target: {name: died, positive: 1, negative: 0}
cohort: {min_sites: 2, min_patients: 5, max_rows: 1000}
rounds: 4
round_timeout: 0.3
strategy: {name: fedavg}
aggregation: {secure_sum: false, weights: rows, max_update_norm: 10, bound: 100}
training: {learning_rate: 0.1, batch_size: 8, local_steps: 1}
privacy: {mechanism: none}
"""
SECURE = {"secure_sum": True, "weights": "equal"}
LAYOUT = Layout((("head.weight", 3), ("head.bias", 1)), ())
SITES = {"ash": 1, "beech": 2, "cedar": 3}
Answer = Callable[[Message], Message | None]


class ScriptedGrid:
    """Answers each message by the function of its node; None is silence."""

    def __init__(self, answers: dict[int, Answer]):
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        self.answers, self.post, self.most_held = answers, dict[str, Message](), 0

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        names = []
        for message in messages:
            name = f"m{len(self.post)}-{time.monotonic_ns()}"
            message.metadata.__dict__["_message_id"] = name
            self.post[name] = message
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        for name in message_ids:
            if name in self.post:
                reply = self.answers[self.post[name].metadata.dst_node_id](self.post.pop(name))
                if reply is not None:
                    return [reply]
        return []


def answering(update: Iterable[float], rows: int = 10, **changes: object) -> Answer:
    def answer(message: Message) -> Message:
        ticket = unpack_ticket(message.content)
        header = {
            "run": ticket.header.run,
            "round": ticket.header.round,
            "site": ticket.header.site,
            "layout": LAYOUT.digest,
            "rows": rows,
            **changes,
        }
        vectors = {"update": np.array(list(update), dtype=np.float32)}
        return Message(pack(ReplyHeader(**header), pack_vectors(vectors)), reply_to=message)

    return answer


GOOD = answering([1, 0, 0, 0])


def study(tmp_path: Path, plan: StudyPlan | None = None) -> Study:
    plan = plan or read_plan(PLAN)
    store = Store(tmp_path)
    store.save(Checkpoint("run-1", plan.digest, 0, np.zeros(4, dtype=np.float32)))
    return Study(plan, LAYOUT, SITES, store)


def model_of(a_study: Study) -> list[float]:
    return a_study.checkpoint().model.tolist()


def test_the_mean_is_weighted_by_rows(tmp_path):
    a_study = study(tmp_path)
    answers = {1: answering([1, 0, 0, 0], rows=10), 2: answering([0, 1, 0, 0], rows=30), 3: answering([0] * 4, rows=40)}
    record = run_round(a_study, 1, ScriptedGrid(answers))
    assert model_of(a_study) == pytest.approx([10 / 80, 30 / 80, 0, 0])
    assert (record.answered, record.numbers["rows"]) == (("ash", "beech", "cedar"), 80)


def test_equal_weights(tmp_path):
    a_study = study(tmp_path, amend(read_plan(PLAN), aggregation={"weights": "equal"}))
    run_round(a_study, 1, ScriptedGrid({1: GOOD, 2: answering([0, 3, 0, 0], rows=900), 3: answering([0] * 4)}))
    assert model_of(a_study) == pytest.approx([1 / 3, 1, 0, 0])


def test_the_last_round_hands_over_the_average_and_every_other_goes_on_from_its_own_model(tmp_path):
    a_study = study(tmp_path, amend(read_plan(PLAN), averaging={"decay": 0.5}, rounds=3))
    grid = ScriptedGrid(dict.fromkeys(SITES.values(), GOOD))
    for number in (1, 2):
        run_round(a_study, number, grid)
        assert model_of(a_study) == pytest.approx([number, 0, 0, 0])
    again = Study(a_study.plan, LAYOUT, SITES, Store(tmp_path))  # the average survives a restart
    run_round(again, 3, grid)
    assert model_of(again) == pytest.approx([(1 * 0.25 + 2 * 0.5 + 3) / 1.75, 0, 0, 0], abs=1e-4)
    assert "average" not in again.checkpoint().state


SHARED = {"mechanism": "shared", "unit": "site", "epsilon": 3.0, "delta": 1e-5, "clip_norm": 1.0}


def test_the_noise_that_all_share_is_thinned_by_all(tmp_path):
    """Each hospital's part adds up in quadrature, and the mean divides the sum by how many answered."""
    plan = amend(read_plan(PLAN), privacy=SHARED, aggregation=SECURE)
    part = part_of(plan, training_event(plan, 1)) * 1.0
    assert noise_variance(plan, 4) == pytest.approx(part**2 / 4)
    by_patient = amend(plan, privacy={"unit": "record"}, training={"sample_rate": 0.2})
    part = part_of(by_patient, training_event(by_patient, 1)) * 1.0
    assert noise_variance(by_patient, 4) == pytest.approx((0.1 / 8) ** 2 * part**2 / 4)


@pytest.mark.parametrize("correct", [False, True])
def test_adams_step_is_without_the_noise_if_the_plan_says_so(tmp_path, correct):
    adam = {"name": "fedadam", "correct_noise": correct, "server_learning_rate": 0.1}
    plan = amend(read_plan(PLAN), privacy=SHARED, aggregation=SECURE, strategy=adam)
    update, model, sites = (
        np.array([3.0, -2.0, 1.0, 0.5], dtype=np.float32),
        np.zeros(4, dtype=np.float32),
        ("ash", "beech"),
    )
    after = step(study(tmp_path, plan), 1, Mean(sites, {}, {"update": update.copy()}, {}, 1.0))
    if correct:
        want, state = fedadam_without_noise(model, update, {}, plan.strategy, noise_variance(plan, 2))
    else:
        want, state = fedadam(model, update, {}, plan.strategy)
    assert after.model == pytest.approx(want)
    assert after.state.keys() == state.keys()


def raw(message: Message, **parts: object) -> Message:
    return Message(RecordDict(parts), reply_to=message)


def with_array(array: Array) -> Answer:
    def answer(message: Message) -> Message:
        good = GOOD(message)
        assert good
        header = good.content.config_records["header"]
        return raw(message, vectors=ArrayRecord({"update": array}), header=header)

    return answer


ODD: dict[str, tuple[Answer, str]] = {
    "not finite": (answering([1, np.nan, 0, 0]), "not finite"),
    "infinite": (answering([1, np.inf, 0, 0]), "not finite"),
    "another length": (answering([1, 0, 0]), "holds 3 parameters, not 4"),
    "another layout": (answering([1, 0, 0, 0], layout="other"), "another model"),
    "too long": (answering([11, 0, 0, 0]), "norm 11 is above 10"),
    "too many rows": (answering([1, 0, 0, 0], rows=1001), "1001 rows is outside"),
    "too few rows": (answering([1, 0, 0, 0], rows=4), "4 rows is outside"),
    "another round": (answering([1, 0, 0, 0], round=3), "for round 3"),
    "another hospital": (answering([1, 0, 0, 0], site="ash"), "ash's"),
    "an error": (
        lambda m: Message(Error(code=1001, reason="the hospital says no"), reply_to=m),
        "the hospital says no",
    ),
    "silence": (lambda m: None, "no answer within 0.3 s"),
    "other parts": (lambda m: raw(m, things=ConfigRecord({})), "other parts"),
    "a header that is not JSON": (
        lambda m: raw(m, vectors=ArrayRecord({}), header=ConfigRecord({"json": "{"})),
        "cannot be read",
    ),
    "an unknown header key": (
        lambda m: raw(
            m, vectors=ArrayRecord({}), header=ConfigRecord({"json": '{"run":"r","round":1,"site":"x","a":1}'})
        ),
        "a: extra inputs",
    ),
    "float64": (with_array(Array("float64", (4,), "cloister.float32.le", bytes(32))), "float64"),
    "a pickle": (with_array(Array("float32", (4,), "numpy.ndarray", bytes(16))), "numpy.ndarray"),
    "fewer bytes than its shape": (with_array(Array("float32", (4,), "cloister.float32.le", bytes(12))), "12 bytes"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_reply_is_named_and_left_out(tmp_path, name):
    answer, reason = ODD[name]
    a_study = study(tmp_path)
    record = run_round(a_study, 1, ScriptedGrid({1: GOOD, 2: answer, 3: GOOD}))
    assert reason in record.rejected["beech"]
    assert record.answered == ("ash", "cedar")
    assert model_of(a_study) == pytest.approx([1, 0, 0, 0])


def test_below_the_quorum_nothing_changes(tmp_path):
    a_study = study(tmp_path)
    grid = ScriptedGrid({1: GOOD, 2: answering([np.nan] * 4), 3: lambda m: None})
    with pytest.raises(QuorumLost, match=r"Round 1: 1 of the 2 .*beech: .*not finite.*cedar: no answer.*--resume"):
        run_round(a_study, 1, grid)
    assert model_of(a_study) == [0, 0, 0, 0]
    assert a_study.checkpoint().round == 0
    assert a_study.store.rounds() == []


def test_robust_rules_see_every_update(tmp_path):
    plan = amend(read_plan(PLAN), strategy={"name": "median"})
    a_study = study(tmp_path, plan)
    updates = {1: answering([1, 0, 0, 0]), 2: answering([2, 0, 0, 0]), 3: answering([9, 0, 0, 0])}
    run_round(a_study, 1, ScriptedGrid(updates))
    assert model_of(a_study) == [2, 0, 0, 0]


def test_rounds_are_recorded_once_even_if_done_over(tmp_path):
    a_study = study(tmp_path)
    grid = ScriptedGrid({1: GOOD, 2: GOOD, 3: GOOD})
    run_round(a_study, 1, grid)
    # killed after the line and before the checkpoint: the line stands, and a torn one after it
    with (tmp_path / "rounds.jsonl").open("a") as lines:
        lines.write("\n" + json.dumps({"round": 2, "answered": []}) + '\n{"round": 3, "ans')
    assert [record["round"] for record in a_study.store.rounds(upto=1)] == [1]
    run_round(a_study, 2, grid)
    assert [len(record["answered"]) for record in a_study.store.rounds()] == [3, 3]


def test_a_damaged_checkpoint_is_a_sentence(tmp_path):
    a_study = study(tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointBroken, match="is damaged"):
        a_study.checkpoint()


def test_a_checkpoint_of_another_plan_is_refused(tmp_path):
    a_study = study(tmp_path)
    with pytest.raises(CheckpointBroken, match="is of plan"):
        a_study.store.load(amend(a_study.plan, rounds=5).digest)
