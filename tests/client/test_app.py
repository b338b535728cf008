"""cloister_client.site and app: a hospital answers to the plan it approved, says a thing once, and lets no row out."""

import hashlib
import logging
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import save

from cloister_client import site as site_module
from cloister_client.app import client_app
from cloister_client.consent import ANY
from cloister_client.dataset import Dataset, Rows
from cloister_client.privacy import plan_cost
from cloister_client.quality import QualityReport
from cloister_client.site import Site, own_constants
from cloister_shared import noise
from cloister_shared.envelope import new_identity, read_identity, save_roster
from cloister_shared.errors import (
    BudgetExceeded,
    CohortTooSmall,
    DataRefused,
    PlanRefused,
    TicketRefused,
    UpdateRefused,
    WeightsBroken,
)
from cloister_shared.inputs import columns
from cloister_shared.outcomes.binary import auroc
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend
from cloister_shared.wire import FAILED, REFUSED, Ticket, TicketHeader, pack, pack_vectors, unpack_reply
from cloister_simulations.site_folder import grant

MLP = {"name": "tabular", "model": "mlp", "hidden": [4], "norm": "layer"}
REMEMBERING = {
    "dp": {"dp": True},
    "scaffold": {"strategy": {"name": "scaffold"}},
    "local layers": {"task": MLP, "personalisation": {"local_layers": ["norm"]}},
}


def amended(ticket: Ticket, **changes: object) -> Ticket:
    header = TicketHeader(**{**ticket.header.model_dump(), **changes})
    return Ticket(header, ticket.vectors)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


@pytest.fixture
def control(open_site) -> Callable[[Site], dict[str, np.ndarray]]:
    """What a coordinator adds to a ticket for SCAFFOLD."""

    def made(site: Site) -> dict[str, np.ndarray]:
        if site.plan.strategy.name != "scaffold":
            return {}
        return {"control": np.linspace(-0.1, 0.1, site.layout.size, dtype=np.float32)}

    return made


# --- tickets that do not fit the approved plan -------------------------------------------------------------
def test_an_honest_ticket_passes(open_site, ticket_for, plan_with):
    site = open_site(plan_with())
    site.check(Ticket(ticket_for(site, 0).header), "statistics")
    site.check(ticket_for(site, 1), "train")
    site.check(ticket_for(site, 3), "train")
    site.check(ticket_for(site, 4), "evaluate")


@pytest.mark.parametrize(
    ("kind", "number"), [("train", 0), ("train", 4), ("evaluate", 1), ("evaluate", 5), ("statistics", 1)]
)
def test_work_in_the_wrong_round_is_refused(open_site, ticket_for, plan_with, kind, number):
    site = open_site(plan_with())
    with pytest.raises(TicketRefused, match=f"Round {number} of 3 has no work called {kind}"):
        site.check(ticket_for(site, number), kind)


@pytest.mark.parametrize("vectors", [{}, {"model", "control"}, {"control"}, {"model", "more"}])
def test_other_vectors_are_refused(open_site, ticket_for, plan_with, vectors):
    site = open_site(plan_with())
    zeros = np.zeros(site.layout.size, dtype=np.float32)
    with pytest.raises(TicketRefused, match="not model"):
        site.check(Ticket(ticket_for(site).header, dict.fromkeys(vectors, zeros)), "train")


def test_another_plan_is_refused(open_site, ticket_for, plan_with):
    site, other = open_site(plan_with(dp=True)), plan_with(privacy={"mechanism": "none"})
    with pytest.raises(
        TicketRefused, match=f"is for plan {other.digest[:12]}; st-marys approved {site.plan.digest[:12]}"
    ):
        site.check(amended(ticket_for(site), plan=other.digest), "train")


def test_a_digest_that_agrees_in_part_is_refused(open_site, ticket_for, plan_with):
    site = open_site(plan_with())
    digest = site.plan.digest
    for near in (digest[:-1], digest[:-1] + ("0" if digest[-1] != "0" else "1"), digest.upper(), ""):
        with pytest.raises(TicketRefused, match="approved"):
            site.check(amended(ticket_for(site), plan=near), "train")


def test_another_hospitals_ticket_is_refused(open_site, ticket_for, plan_with):
    site = open_site(plan_with())
    with pytest.raises(TicketRefused, match=r"is addressed to st-lukes\. This is st-marys\."):
        site.check(amended(ticket_for(site), site="st-lukes"), "train")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["model", "control"])
def test_vectors_that_are_not_finite_are_refused(open_site, ticket_for, plan_with, name, value):
    site = open_site(plan_with(strategy={"name": "scaffold"}))
    zeros = np.zeros(site.layout.size, dtype=np.float32)
    odd = zeros.copy()
    odd[-1] = value
    with pytest.raises(TicketRefused, match=f"The ticket's {name} is not 4 finite numbers"):
        site.check(Ticket(ticket_for(site).header, {"model": zeros, "control": zeros} | {name: odd}), "train")


@pytest.mark.parametrize("size", [0, 3, 5])
def test_vectors_of_another_size_are_refused(open_site, ticket_for, plan_with, size):
    site = open_site(plan_with())
    with pytest.raises(TicketRefused, match="The ticket's model is not 4 finite numbers"):
        site.check(Ticket(ticket_for(site).header, {"model": np.zeros(size, dtype=np.float32)}), "train")


def test_federated_constants_may_not_change_within_a_run(open_site, ticket_for, plan_with):
    site = open_site(plan_with(normalisation={"method": "federated"}))
    with pytest.raises(TicketRefused, match="lacks the federated statistics"):
        site.train(ticket_for(site))
    constants = ((0.0, 1.0),) * 3
    site.train(amended(ticket_for(site), normalisation=constants))
    with pytest.raises(TicketRefused, match="changed within the run"):
        site.train(amended(ticket_for(site, 2), normalisation=((0.0, 2.0), *constants[1:])))


def test_statistics_are_refused_where_the_plan_asks_for_none(open_site, ticket_for, plan_with):
    with pytest.raises(TicketRefused, match="does not ask for statistics"):
        (site := open_site(plan_with())).statistics(ticket_for(site, 0))


# --- a thing is said once ----------------------------------------------------------------------------------
def test_the_same_ticket_has_the_same_answer_and_costs_once(open_site, ticket_for, plan_with):
    plan = plan_with(dp=True)
    site = open_site(plan)
    first = site.train(ticket_for(site))
    again = [site.train(ticket_for(site)), open_site(plan).train(ticket_for(site))]  # also after a restart
    for reply in again:
        assert reply.header == first.header
        assert same(reply.vectors, first.vectors)
    assert len(site.ledger.history(site.plan.digest)) == 1
    assert site.ledger.history(site.plan.digest)[0].steps == plan.training.local_steps


def test_another_model_for_an_answered_round_is_refused(open_site, ticket_for, plan_with):
    """Or a coordinator would average the noise away."""
    site = open_site(plan_with(dp=True))
    ticket = ticket_for(site)
    site.train(ticket)
    with pytest.raises(TicketRefused, match="already answered for another model"):
        site.train(Ticket(ticket.header, {"model": ticket.vectors["model"] + 1}))


def test_a_run_ends_with_its_budget(open_site, ticket_for, plan_with):
    """The noise is calibrated to the plan's rounds: one more would pass epsilon, whatever it is called."""
    site = open_site(plan_with(dp=True))
    for number in (1, 2, 3):
        site.train(ticket_for(site, number))
    for number in (0, 4):
        with pytest.raises(BudgetExceeded):
            site.train(ticket_for(site, number))
    assert len(site.ledger.history(site.plan.digest)) == 3


def test_the_budget_is_committed_before_any_gradient(open_site, ticket_for, plan_with, monkeypatch):
    site = open_site(plan_with(dp=True))

    def crash(*_: object, **__: object) -> None:
        assert len(site.ledger.history(site.plan.digest)) == 1
        raise RuntimeError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(site_module, "train", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            site.train(ticket_for(site))
    # Nothing had left: the same ticket may be answered now, on the same commitment.
    site.train(ticket_for(site))
    assert len(site.ledger.history(site.plan.digest)) == 1


def test_an_answer_is_on_disk_before_it_is_given(open_site, ticket_for, plan_with, monkeypatch):
    site = open_site(plan_with(dp=True))

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        site.train(ticket_for(site))


def test_an_old_ticket_gives_no_second_noise(open_site, ticket_for, plan_with):
    """Rounds 1, 2 and then 1 again: the same noisy update, or a refusal, but never a second draw."""
    site = open_site(plan_with(dp=True))
    first = site.train(ticket_for(site, 1))
    site.train(ticket_for(site, 2))
    try:
        again = site.train(ticket_for(site, 1))
    except TicketRefused:
        return
    assert same(again.vectors, first.vectors)


def test_after_the_evaluation_the_last_round_gives_no_second_noise(open_site, ticket_for, plan_with):
    """Exact metrics cost nothing, so the last round's commitment is still the newest: its answer must be there too."""
    site = open_site(plan_with(dp=True, rounds=1))
    first = site.train(ticket_for(site, 1))
    site.evaluate(ticket_for(site, 2))
    assert same(site.train(ticket_for(site, 1)).vectors, first.vectors)


def test_old_statistics_give_no_second_noise(open_site, ticket_for, plan_with):
    site = open_site(plan_with(dp=True, normalisation={"method": "federated"}))
    first = site.statistics(ticket_for(site, 0))
    site.train(amended(ticket_for(site, 1), normalisation=((0.0, 1.0),) * 3))
    try:
        again = site.statistics(ticket_for(site, 0))
    except TicketRefused:
        return
    assert same(again.vectors, first.vectors)


def test_another_run_of_the_plan_has_no_budget_of_its_own(open_site, ticket_for, plan_with):
    site = open_site(plan_with(dp=True))
    for number in (1, 2, 3):
        site.train(ticket_for(site, number, run="run-1"))
    with pytest.raises((BudgetExceeded, TicketRefused)):
        site.train(ticket_for(site, 1, run="run-2"))


def test_statistics_are_priced_and_said_once(open_site, ticket_for, plan_with):
    site = open_site(plan_with(dp=True, normalisation={"method": "federated"}))
    first, again = (site.statistics(ticket_for(site, 0)) for _ in range(2))
    assert same(first.vectors, again.vectors)
    assert [event.purpose for event in site.ledger.history(site.plan.digest)] == ["statistics"]
    for number in (1, 2, 3):
        site.train(amended(ticket_for(site, number), normalisation=((0.0, 1.0),) * 3))
    assert len(site.ledger.history(site.plan.digest)) == 4


# --- what is kept, and rounds done over --------------------------------------------------------------------
def test_without_privacy_nothing_is_written(open_site, ticket_for, plan_with, tmp_path):
    site = open_site(plan_with())
    for number in (1, 2):
        site.train(ticket_for(site, number))
    site.evaluate(ticket_for(site, 4))
    assert files(tmp_path) == set()


def test_what_is_written_is_of_the_last_rounds_only(open_site, ticket_for, plan_with, tmp_path):
    site = open_site(plan_with(rounds=6, **REMEMBERING["local layers"]))
    for number in range(1, 7):
        site.train(ticket_for(site, number))
    assert files(tmp_path / "st-marys") == {
        "run-1.answer.safetensors",
        "run-1.answer.safetensors.lock",
        f"{site.plan.digest}.local-000005.safetensors",
        f"{site.plan.digest}.local-000006.safetensors",
    }


@pytest.mark.parametrize(
    "changes", [{}, REMEMBERING["scaffold"], REMEMBERING["local layers"]], ids=["plain", "scaffold", "local"]
)
def test_a_round_done_over_gives_the_same_update(open_site, ticket_for, plan_with, control, tmp_path, changes):
    """The coordinator died before its checkpoint, and the hospital restarted and lost its answer."""
    plan = plan_with(training={"batch_size": 7}, **changes)
    site = open_site(plan)
    extra = control(site)
    for number in (1, 2):
        site.train(ticket_for(site, number, **extra))
    third = site.train(ticket_for(site, 3, **extra))
    for path in (tmp_path / "st-marys").glob("*.answer.safetensors"):
        path.unlink()
    restarted = open_site(plan)
    assert same(restarted.train(ticket_for(site, 3, **extra)).vectors, third.vectors)
    # And no two rounds are alike, or the same update would mean nothing.
    assert not same(restarted.train(ticket_for(site, 2, **extra)).vectors, third.vectors)


def test_local_layers_stay_and_are_picked_up_again(open_site, ticket_for, plan_with):
    plan = plan_with(**REMEMBERING["local layers"])
    site = open_site(plan)
    names = [name for name, _ in site.layout.shared]
    assert names == ["hidden_0.weight", "hidden_0.bias", "head.weight", "head.bias"]
    reply = site.train(ticket_for(site, 1))
    assert reply.vectors["update"].size == site.layout.size
    after = site.network.model.state_dict()["norm_0.weight"].clone()
    assert not torch.equal(after, torch.ones(4))
    restarted = open_site(plan)
    kept = restarted.local.before(plan.digest, 2)["layers"]
    np.testing.assert_array_equal(kept[:4], after.numpy())
    # Another plan begins with untrained layers; another run of this one, after hospitals joined, goes on from these.
    assert restarted.local.before(plan_with(seed=9).digest, 2) is None


# --- what a reply says -------------------------------------------------------------------------------------
def test_an_update_is_where_training_ended_less_where_it_began(open_site, ticket_for, plan_with, flat):
    site = open_site(plan_with())
    ticket = ticket_for(site)
    reply = site.train(ticket)
    np.testing.assert_array_equal(reply.vectors["update"], flat(site.network.model) - ticket.vectors["model"])
    assert (reply.header.run, reply.header.round, reply.header.site) == ("run-1", 1, "st-marys")
    assert (reply.header.layout, reply.header.rows) == (site.layout.digest, 24)


@pytest.mark.parametrize("dp", [True, False])
def test_metrics_are_of_the_incoming_model_on_held_out_rows(open_site, ticket_for, plan_with, rows, dp):
    """The loss of training rows never leaves: what they are moves nothing in the metrics."""
    test, found = rows(20, seed=9), []
    for seed in (0, 1):
        site = open_site(plan_with(dp=dp), folder=f"site-{seed}", train=rows(seed=seed), test=test)
        found.append(site.train(ticket_for(site)).header.metrics)
    assert found[0] == found[1]
    w = ticket_for(site).vectors["model"]
    risk = 1 / (1 + np.exp(-test.x.double().numpy() @ w[:3] - w[3]))
    y = test.y.numpy().astype(float)
    loss = -np.log(np.where(y == 1, risk, 1 - risk)).mean()
    assert found[0] == pytest.approx({"loss": loss, "auroc": auroc(y, risk)})


@pytest.mark.parametrize(
    ("positives", "negatives", "said"), [(2, 18, False), (18, 2, False), (3, 3, True), (0, 20, False)]
)
def test_small_counts_silence_metrics(open_site, ticket_for, plan_with, rows, positives, negatives, said):
    """min_count is 3 of either outcome."""
    some = rows(positives + negatives)
    test = Rows(some.x, torch.tensor([1.0] * positives + [0.0] * negatives), some.patients)
    site = open_site(plan_with(evaluation={"resamples": 100}), test=test)
    assert bool(site.train(ticket_for(site)).header.metrics) == said
    assert bool(site.evaluate(ticket_for(site, 4)).header.estimates["final"]) == said


def test_fine_tuning_changes_no_later_answer(open_site, ticket_for, plan_with):
    plan = plan_with(personalisation={"fine_tune_steps": 5}, evaluation={"resamples": 100})
    site = open_site(plan)
    first = site.evaluate(ticket_for(site, 4)).header.estimates
    assert first.keys() == {"final", "fine-tuned"}
    assert first["final"] != first["fine-tuned"]
    assert site.evaluate(ticket_for(site, 4)).header.estimates == first


def test_a_model_of_the_hospitals_own_is_in_no_update(open_site, ticket_for, plan_with):
    """Ditto: what leaves is bit for bit what leaves without it; the own model is another, and is kept."""
    without = open_site(plan_with())
    site = open_site(plan_with(personalisation={"ditto": {"lam": 0.1, "steps": 9}}, evaluation={"resamples": 100}))
    assert (
        site.train(ticket_for(site)).vectors["update"] == without.train(ticket_for(without)).vectors["update"]
    ).all()
    before = site.local.before(site.plan.digest, 2)
    assert before is not None
    site.train(ticket_for(site, 2))
    after = site.local.before(site.plan.digest, 3)
    assert after is not None
    assert (before["ditto"] != after["ditto"]).any()
    said = site.evaluate(ticket_for(site, 4)).header.estimates
    assert said.keys() == {"final", "ditto"}
    assert said["final"] != said["ditto"]


def test_the_stronger_the_pull_the_nearer_the_common_model(open_site, ticket_for, plan_with):
    away = []
    for lam in (0.01, 3.0):
        site = open_site(plan_with(personalisation={"ditto": {"lam": lam, "steps": 30}}))
        ticket = ticket_for(site)
        site.train(ticket)
        kept = site.local.before(site.plan.digest, 2)
        assert kept is not None
        away.append(float(abs(kept["ditto"] - ticket.vectors["model"]).max()))
    assert away[1] < away[0] / 2


# --- public weights ----------------------------------------------------------------------------------------
WEIGHT, BIAS = torch.linspace(-0.5, 1.0, 12).reshape(4, 3), torch.full((4,), 0.5)
PUBLIC = save({"hidden_0.weight": WEIGHT, "hidden_0.bias": BIAS})
PRIVATE = {"mechanism": "site", "unit": "record", "epsilon": 3.0, "delta": 1e-5, "clip_norm": 1.0}
WAYS = {
    "plain": {},
    "adam": {"training": {"optimizer": "adam"}},
    "scaffold": {"strategy": {"name": "scaffold"}},
    "fedprox": {"strategy": {"name": "fedprox", "mu": 0.8}},
    "norm": {"task": {"norm": "layer"}, "personalisation": {"local_layers": ["norm"]}},
    "fine-tuned": {"personalisation": {"fine_tune_steps": 2}},
    "record": {"privacy": PRIVATE},
}


@pytest.fixture
def frozen_plan(plan_with, tmp_path) -> Callable[..., StudyPlan]:
    """Two layers of which the first is public and stands still; its file lies at the hospital."""
    (tmp_path / "st-marys").mkdir()
    (tmp_path / "st-marys" / "pretrained.safetensors").write_bytes(PUBLIC)
    public = {"sha256": hashlib.sha256(PUBLIC).hexdigest(), "frozen": ["hidden"]}

    def made(**changes: object) -> StudyPlan:
        plan = plan_with(task={**MLP, "norm": "none", "pretrained": public})
        return amend(plan, **changes) if changes else plan

    return made


@pytest.mark.parametrize("way", WAYS)
def test_frozen_layers_never_change_and_are_not_sent(open_site, ticket_for, frozen_plan, control, way):
    plan = frozen_plan(**WAYS[way])
    site = open_site(plan)
    for number in (1, 2, 3):
        reply = site.train(ticket_for(site, number, **control(site)))
        assert {vector.size for vector in reply.vectors.values()} == {4 + 1}
        assert all(vector.all() for vector in reply.vectors.values())  # what is trained has moved
    site.evaluate(ticket_for(site, 4))
    state = site.network.model.state_dict()
    assert torch.equal(state["hidden_0.weight"], WEIGHT)
    assert torch.equal(state["hidden_0.bias"], BIAS)


def test_the_head_alone_is_what_the_round_computes(open_site, ticket_for, frozen_plan, rows):
    """Logistic regression on what the public layer makes of a row."""
    site = open_site(frozen_plan(training={"local_steps": 3}))
    ticket = ticket_for(site)
    began = w = ticket.vectors["model"].astype(float)
    made = Rows((rows().x @ WEIGHT.T + BIAS).clamp(min=0), rows().y, rows().patients)
    for _ in range(3):
        w = w - 0.5 * logistic_gradient(made, w)
    np.testing.assert_allclose(site.train(ticket).vectors["update"], w - began, rtol=1e-4, atol=1e-6)


def test_other_weights_are_refused_before_anything_is_read_or_paid(open_site, frozen_plan, tmp_path, ask):
    plan = frozen_plan()
    (tmp_path / "st-marys" / "pretrained.safetensors").write_bytes(PUBLIC + b" ")
    with pytest.raises(WeightsBroken, match="is not what the plan names"):
        open_site(plan)
    message = ask(lambda _: open_site(plan), RecordDict(), "query.enrol")
    assert message.error.code == REFUSED
    assert str(tmp_path) not in message.error.reason


# --- strategies' local halves, against NumPy ---------------------------------------------------------------
def logistic_gradient(rows: Rows, w: np.ndarray) -> np.ndarray:
    inputs = np.column_stack([rows.x.double().numpy(), np.ones(len(rows))])
    return inputs.T @ (1 / (1 + np.exp(-inputs @ w)) - rows.y.double().numpy()) / len(rows)


def test_fedprox_is_the_papers(open_site, ticket_for, plan_with, rows):
    site = open_site(plan_with(strategy={"name": "fedprox", "mu": 0.8}, training={"local_steps": 4}))
    ticket = ticket_for(site)
    began = w = ticket.vectors["model"].astype(float)
    for _ in range(4):
        w = w - 0.5 * (logistic_gradient(rows(), w) + 0.8 * (w - began))
    np.testing.assert_allclose(site.train(ticket).vectors["update"], w - began, rtol=1e-4, atol=1e-6)


def test_scaffold_is_the_papers(open_site, ticket_for, plan_with, rows, control):
    """Two rounds of Karimireddy et al. 2020, option II, and the hospital's own variate is kept here."""
    site = open_site(plan_with(strategy={"name": "scaffold"}, training={"local_steps": 3}))
    c, own = control(site)["control"].astype(float), np.zeros(site.layout.size)
    for number in (1, 2):
        ticket = ticket_for(site, number, **control(site))
        began = w = ticket.vectors["model"].astype(float)
        for _ in range(3):
            w = w - 0.5 * (logistic_gradient(rows(), w) - own + c)
        new = own - c + (began - w) / (3 * 0.5)
        reply = site.train(ticket)
        np.testing.assert_allclose(reply.vectors["update"], w - began, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(reply.vectors["control"], new - own, rtol=1e-4, atol=1e-6)
        own = new
        np.testing.assert_allclose(
            site.local.before(site.plan.digest, number + 1)["control"], own, rtol=1e-4, atol=1e-6
        )


def test_own_constants_are_mean_and_sd(rows):
    some = rows(50)
    some.x[:, 2] = 7.0
    found = own_constants(some, [0, 2])
    np.testing.assert_allclose(found[0], (some.x[:, 0].numpy().mean(), some.x[:, 0].numpy().std(ddof=1)), rtol=1e-5)
    assert found[1] == (7.0, 1.0)


# --- messages ----------------------------------------------------------------------------------------------
@pytest.fixture
def ask() -> Callable[..., Message]:
    """Send a ticket through a real ClientApp, as Flower would."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1

    def asked(open_: Callable[[Context], Site], asking: Ticket | RecordDict, kind: str = "train") -> Message:
        content = asking if isinstance(asking, RecordDict) else pack(asking.header, pack_vectors(asking.vectors))
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
        return client_app(open_)(Message(content, 1, kind), context)

    return asked


def test_a_reply_travels(open_site, ticket_for, plan_with, ask):
    site, twin = open_site(plan_with()), open_site(plan_with(), folder="twin")
    message = ask(lambda _: site, ticket_for(site))
    reply, expected = unpack_reply(message.content), twin.train(ticket_for(site))
    assert reply.header == expected.header
    assert same(reply.vectors, expected.vectors)
    assert unpack_reply(ask(lambda _: site, ticket_for(site), "query.enrol").content).header == site.enrol()


@pytest.mark.parametrize("kind", ["train", "evaluate", "query.statistics"])
def test_a_refusal_travels_as_a_sentence(open_site, ticket_for, plan_with, ask, kind):
    site = open_site(plan_with(normalisation={"method": "federated"}))
    message = ask(lambda _: site, amended(ticket_for(site), site="st-lukes"), kind)
    assert message.error.code == REFUSED
    assert message.error.reason == "The ticket is addressed to st-lukes. This is st-marys."


@pytest.mark.parametrize("error", [DataRefused, CohortTooSmall])
def test_what_is_wrong_with_the_table_stays_here(open_site, ticket_for, plan_with, ask, caplog, error):
    """Row numbers, counts of faults and of patients are for the hospital's own log."""

    def refuse(_: Context) -> Site:
        raise error("17 rows of admissions.csv are bad.")

    message = ask(refuse, ticket_for(open_site(plan_with())), "query.enrol")
    assert message.error.code == REFUSED
    assert "17" not in message.error.reason
    assert "17 rows" in caplog.text


def test_a_message_that_is_no_ticket_is_refused(open_site, plan_with, ask):
    site = open_site(plan_with())
    message = ask(lambda _: site, RecordDict({"header": ConfigRecord({"json": "{}"})}))
    assert message.error.code == REFUSED
    assert message.error.reason.startswith("The ticket cannot be read: ")


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_crash_does_not_quote_a_row(open_site, ticket_for, plan_with, ask, monkeypatch, caplog, kind):
    """Libraries put values into their messages; only the kind of fault leaves, the log keeps the rest."""
    site = open_site(plan_with())

    def crash(*_: object, **__: object) -> None:
        raise ValueError("cannot convert Zzyzx of patient 98765.4321")

    monkeypatch.setattr(site_module, "train" if kind == "train" else "in_full", crash)
    with caplog.at_level(logging.ERROR):
        message = ask(lambda _: site, ticket_for(site, 1 if kind == "train" else 4), kind)
    assert message.has_error()
    assert message.error.code == FAILED
    assert message.error.reason == "ValueError at the hospital; its log says more"
    assert "Zzyzx" not in repr(message.__dict__)
    assert "Zzyzx" in caplog.text


def broken(_: Context) -> Site:
    raise ValueError("cannot convert Zzyzx of patient 98765.4321")


@pytest.mark.parametrize("kind", ["train", "evaluate", "query.statistics"])
def test_a_crash_while_opening_does_not_quote_a_row(open_site, ticket_for, plan_with, ask, kind):
    message = ask(broken, ticket_for(open_site(plan_with())), kind)
    assert message.error.reason == "ValueError at the hospital; its log says more"


def test_a_crash_while_enrolling_does_not_quote_a_row(open_site, ticket_for, plan_with, ask):
    message = ask(broken, ticket_for(open_site(plan_with())), "query.enrol")
    assert message.error.reason == "ValueError at the hospital; its log says more"


# --- the batches and the noise of a request ----------------------------------------------------------------
def test_batches_depend_on_seed_site_and_round(open_site, ticket_for, plan_with):
    """So that a run can be repeated without privacy, and no two hospitals or rounds draw alike."""
    plan = plan_with(training={"batch_size": 5})
    site = open_site(plan)

    def update(of, number):
        return of.train(ticket_for(of, number)).vectors["update"].tobytes()

    assert update(site, 1) == update(site, 1) != update(site, 2)


def test_under_privacy_a_request_draws_from_the_operating_system(open_site, ticket_for, plan_with):
    """A keystream under a key of the operating system's, another for every request."""
    site, seeded = open_site(plan_with(dp=True)), open_site(plan_with(dp=True), folder="seeded", noise_seed=1)
    ticket = ticket_for(site)
    assert site._draw_from(ticket)(32) != site._draw_from(ticket)(32)
    assert site._draw_from(ticket).__qualname__ == noise.keystream().__qualname__
    assert seeded._draw_from(ticket)(32) == seeded._draw_from(ticket)(32)


def test_a_hospital_larger_than_the_plan_allows_spends_nothing(open_site, ticket_for, plan_with):
    site = open_site(plan_with(dp=True, cohort={"max_rows": 23}))
    with pytest.raises(UpdateRefused, match="more rows than the plan"):
        site.check(ticket_for(site), "train")
    assert site.ledger.history(site.plan.digest) == []


def test_a_hospital_without_a_budget_is_refused_before_round_1(open_site, plan_with, tmp_path):
    """And so is a second study on the same patients, where the first has reserved all there is."""
    plan = plan_with(dp=True)
    first = open_site(plan)
    ledger = tmp_path / "st-marys" / "ledger.sqlite"
    second = Site(plan_with(dp=True, seed=7), first.dataset, tmp_path / "second", ledger=ledger)
    with pytest.raises(BudgetExceeded, match=r"asks for epsilon 3; .* \(3 with what is reserved\)"):
        second.enrol()
    none = Site(plan, first.dataset, tmp_path / "none")
    with pytest.raises(BudgetExceeded, match="No ceiling is set"):
        none.enrol()


@pytest.mark.parametrize(("bound", "fits"), [(1.0, False), (100.0, True)])
def test_shared_noise_that_does_not_fit_the_ring_is_refused_before_anything_is_reserved(
    plan_with, rows, tmp_path, bound, fits
):
    plan = plan_with(
        privacy={"mechanism": "shared", "unit": "site", "epsilon": 3.0, "delta": 1e-5, "clip_norm": 1.0},
        aggregation={"secure_sum": True, "bound": bound},
        cohort={"min_sites": 6, "max_sites": 8},
    )
    new_identity(tmp_path / "identity.key")
    save_roster(tmp_path / "roster.json", {"st-marys": read_identity(tmp_path / "identity.key").public})
    grant(tmp_path, amend(plan, privacy={"epsilon": 9.0}))  # only the ring is in the way
    dataset = Dataset(columns(plan.table), rows(), rows(), QualityReport("st-marys", 24, []), ANY)
    site = Site(plan, dataset, tmp_path)
    if fits:
        site.enrol()
    else:
        with pytest.raises(PlanRefused, match="would not fit into the sum"):
            site.enrol()
    assert site.ledger
    assert bool(site.ledger.counted()) == fits


def test_what_a_study_did_not_spend_is_free_after_its_final_evaluation(open_site, ticket_for, plan_with):
    site = open_site(plan_with(dp=True))
    site.train(ticket_for(site, 1))
    assert sum(event.steps for event in site.ledger.counted()) == 6
    site.evaluate(ticket_for(site, 4))
    assert site.ledger.counted() == site.ledger.history(site.plan.digest)


def test_a_quote_that_was_approved_for_other_rows_is_refused(open_site, plan_with, rows, tmp_path):
    plan = plan_with(dp=True)
    site = open_site(plan)
    approved = plan_cost(plan, site.dataset).digest
    assert Site(plan, site.dataset, tmp_path / "st-marys", approved=approved).enrol()
    other = replace(site.dataset, train=rows(30))
    with pytest.raises(TicketRefused, match=r"is not what was approved|with other charges"):
        Site(plan, other, tmp_path / "another", approved=approved).enrol()


def test_what_was_reserved_holds_when_there_are_other_rows(open_site, plan_with, rows, tmp_path):
    plan = plan_with(dp=True)
    site = open_site(plan)
    before = Site(plan, site.dataset, tmp_path / "st-marys")
    before.enrol()
    after = Site(plan, replace(site.dataset, train=rows(30)), tmp_path / "st-marys")
    after.enrol()
    assert before.spending
    assert after.spending
    assert after.spending.cost == before.spending.cost
    assert plan_cost(plan, after.dataset) != before.spending.cost
