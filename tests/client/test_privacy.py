"""cloister_client.privacy: every gradient that leaves is clipped, sampled and noised as its price says."""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from cloister_client.dataset import Rows
from cloister_client.privacy import Mechanism, Units, dp_sgd, noisy, refuse_running_statistics, with_its_part
from cloister_shared import charges, tally
from cloister_shared.budget import epsilon
from cloister_shared.errors import PlanRefused
from cloister_shared.layout import initial_model
from cloister_shared.networks.losses import binary
from cloister_shared.noise import Entropy, reproducible
from cloister_shared.objective import Objective, objective_of
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend
from cloister_shared.schema import Schema
from cloister_shared.tasks.tabular import Tabular
from cloister_shared.tasks.task import Augment, Augmentation

CLIP = 0.7
DP = {"mechanism": "site", "unit": "record", "epsilon": 3.0, "delta": 1e-5, "clip_norm": 1.0}
MLP = {"name": "tabular", "model": "mlp", "hidden": [5], "norm": "layer"}


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch):
    """Noise so small that a gradient can be compared with its definition."""
    monkeypatch.setattr(charges, "calibrate", lambda *_: 1e-12)


@pytest.fixture
def dp_plan(plan_with) -> Callable[..., StudyPlan]:
    def made(**changes: object) -> StudyPlan:
        plan = plan_with(dp=True, **changes)
        return amend(plan, privacy={"clip_norm": CLIP})

    return made


def seeded(seed: int = 0) -> Entropy:
    return reproducible(str(seed))


def private(
    model: nn.Module, rows: Rows, plan: StudyPlan, entropy: Entropy, objective: Objective | None = None
) -> Mechanism:
    units = len(Units.of(rows, plan.privacy.unit or "record"))
    return dp_sgd(model, objective or objective_of(plan), rows, plan, charges.training_event(plan, units), entropy)


def gradient_of(model: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def one_gradient(plan: StudyPlan, rows: Rows) -> Tensor:
    model = initial_model(plan)
    private(model, rows, plan, seeded()).gradient()
    return gradient_of(model)


def by_definition(plan: StudyPlan, rows: Rows, clip_norm: float) -> Tensor:
    """Abadi et al. 2016, algorithm 1, a row at a time and without noise."""
    model, total = initial_model(plan), torch.zeros((), dtype=torch.float64)
    for x, y in zip(rows.x, rows.y, strict=True):
        model.zero_grad()
        logit = model(x[None])[0, 0]
        (torch.log1p(torch.exp(-logit)) if y else torch.log1p(torch.exp(logit))).backward()
        gradient = gradient_of(model).double()
        total = total + gradient / max(1.0, float(gradient.norm()) / clip_norm)
    return (total / plan.training.batch_size).float()


def only(rows: Rows, at: NDArray[np.int64] | list[int]) -> Rows:
    return Rows(rows.x[at], rows.y[at], rows.patients[at])


# --- clipping ----------------------------------------------------------------------------------------------
ZOO = [
    {"name": "tabular"},
    MLP,
    {**MLP, "hidden": [6, 4], "norm": "none"},
    {**MLP, "hidden": [8], "norm": "group"},
    {**MLP, "hidden": [8], "norm": "group", "standardise": True},
]
"""Every kind of model that a plan can name takes a step."""


@pytest.mark.parametrize("task", ZOO)
def test_gradient_is_the_definitions(no_noise, dp_plan, rows, task):
    plan, some = dp_plan(task=task), rows()
    norms = [float(by_definition(plan, only(some, [i]), math.inf).norm()) for i in range(len(some))]
    clip_norm = float(np.median(norms)) * plan.training.batch_size  # half of the rows are clipped
    plan = amend(plan, privacy={"clip_norm": clip_norm})
    expected = by_definition(plan, some, clip_norm)
    assert not torch.allclose(expected, by_definition(plan, some, math.inf), rtol=0.05)
    torch.testing.assert_close(one_gradient(plan, some), expected, rtol=2e-5, atol=5e-7)  # Opacus adds 1e-6 to a norm


@pytest.mark.parametrize("task", [{"name": "tabular"}, MLP])
def test_no_row_moves_the_sum_by_more_than_the_clip(no_noise, dp_plan, rows, task):
    """The sensitivity that the noise is scaled to, for rows as wild as float32 allows."""
    plan, some = dp_plan(task=task), rows()
    some.x[:8] *= torch.tensor([1e2, 1e4, 1e8, 1e15, 1e19, 1e25, 1e30, 1e38])[:, None]
    with_all = one_gradient(plan, some)
    moved = []
    for out in range(len(some)):
        without = one_gradient(plan, only(some, [i for i in range(len(some)) if i != out]))
        moved.append(float((with_all - without).norm()) * plan.training.batch_size)
    assert max(moved) <= CLIP * (1 + 1e-4)
    assert max(moved) > 0.99 * CLIP


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("task", [{"name": "tabular"}, MLP])
def test_a_row_without_finite_gradient_is_silenced_and_no_other(no_noise, dp_plan, rows, task, bad):
    plan, some = dp_plan(task=task), rows()
    some.x[5, 1] = bad
    others = one_gradient(plan, only(some, [i for i in range(len(some)) if i != 5]))
    found = one_gradient(plan, some)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, others)


def test_divisor_is_the_expected_batch_size_whatever_is_drawn(no_noise, dp_plan, rows):
    """Dividing by the number drawn would tell it, and would break the sensitivity."""
    few, many = rows(6), rows(6)
    doubled = Rows(many.x.repeat(2, 1), many.y.repeat(2), np.arange(12))
    torch.testing.assert_close(one_gradient(dp_plan(), doubled), 2 * one_gradient(dp_plan(), few))


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_frozen_layers_have_no_part_in_clip_or_noise(no_noise, dp_plan, rows, norm):
    """As if the head were the whole model, on inputs that the hidden layer makes."""
    plan, some = dp_plan(task={**MLP, "norm": norm}), rows()
    model = initial_model(plan)
    assert isinstance(model, nn.Sequential)
    model[:-1].requires_grad_(False)
    mechanism = private(model, some, plan, seeded())
    assert [part.numel() for part in mechanism.parameters] == [5, 1]
    mechanism.gradient()
    with torch.no_grad():
        inputs, total = torch.cat([model[:-1](some.x), torch.ones(24, 1)], dim=1), torch.zeros(6)
        for row, outcome, said in zip(inputs, some.y, model(some.x)[:, 0], strict=True):
            gradient = (torch.sigmoid(said) - outcome) * row
            total += gradient / max(1.0, float(gradient.norm()) / CLIP)
    torch.testing.assert_close(gradient_of(model), total / plan.training.batch_size, rtol=2e-5, atol=5e-7)


# --- sampling ----------------------------------------------------------------------------------------------
STEPS, ROWS, RATE = 2000, 40, 0.2


@pytest.fixture
def inclusions(no_noise, dp_plan, rows, recorder) -> NDArray[np.bool_]:
    """Which rows entered which step, [steps, rows], as the loss saw them."""
    plan = dp_plan(training={"batch_size": round(ROWS * RATE)})
    some, task = rows(ROWS), recorder()
    some = Rows(some.x, torch.arange(ROWS).float(), some.patients)
    mechanism = private(nn.Linear(3, 1), some, plan, seeded(1), task)
    assert mechanism.event is not None
    assert mechanism.event.sample_rate == RATE
    mechanism.gradient()
    task.drawn.clear()  # what the clipper tried out
    entered = np.zeros((STEPS, ROWS), dtype=bool)
    for step in range(STEPS):
        seen = len(task.drawn)
        mechanism.gradient()
        for drawn in task.drawn[seen:]:
            assert len(set(drawn)) == len(drawn), "a row entered a step twice"
            entered[step, drawn] = True
    return entered


def test_sampling_is_poisson(inclusions):
    """Each row by a coin of its own. Shuffled epochs fail the second check, a fixed size the third."""
    expected, variance = STEPS * RATE, STEPS * RATE * (1 - RATE)
    statistic = ((inclusions.sum(axis=0) - expected) ** 2 / variance).sum()
    assert stats.chi2.ppf(0.001, ROWS) < statistic < stats.chi2.ppf(0.999, ROWS)
    # From step to step: the lagged product of a fair coin has mean rate^2.
    again = (inclusions[1:] & inclusions[:-1]).mean()
    assert abs(again - RATE**2) < 4 * RATE / math.sqrt((STEPS - 1) * ROWS)
    # From row to row: the batch size is binomial.
    sizes = inclusions.sum(axis=1)
    counts = np.bincount(sizes, minlength=ROWS + 1)
    law = STEPS * stats.binom.pmf(np.arange(ROWS + 1), ROWS, RATE)
    common = law >= 5
    compared = np.append(counts[common], counts[~common].sum()), np.append(law[common], law[~common].sum())
    assert stats.chisquare(*compared).pvalue > 0.001


# --- noise -------------------------------------------------------------------------------------------------
def test_noise_is_what_the_event_says(dp_plan, rows, recorder):
    """The released gradient of a loss that is flat: normal, of standard deviation sigma * clip / batch."""
    plan = dp_plan()
    model, task = nn.Linear(3, 250), recorder(scale=0.0)
    mechanism = private(model, rows(), plan, seeded(2), task)
    assert mechanism.event is not None
    assert mechanism.event.noise_multiplier > 1
    assert epsilon([mechanism.event] * plan.rounds, 1e-5) == pytest.approx(3.0, rel=5e-3)
    released = []
    for _ in range(60):
        mechanism.gradient()
        released.append(gradient_of(model).clone())
    noise = torch.stack(released).double().numpy()
    expected = mechanism.event.noise_multiplier * CLIP / plan.training.batch_size
    assert noise.std() == pytest.approx(expected, rel=0.02)
    assert abs(noise.mean()) < 4 * expected / math.sqrt(noise.size)
    assert stats.kstest(noise.ravel() / expected, "norm").pvalue > 0.001
    # Fresh in every step, and another one for every parameter.
    assert abs(np.corrcoef(noise)[~np.eye(60, dtype=bool)]).max() < 5 / math.sqrt(noise.shape[1])


def test_an_empty_draw_releases_noise_all_the_same(monkeypatch, dp_plan, rows, recorder):
    monkeypatch.setattr(charges, "calibrate", lambda *_: 2.0)
    plan = dp_plan(training={"batch_size": 1})
    model, task = nn.Linear(3, 250), recorder()
    mechanism = private(model, rows(), plan, seeded(3), task)
    empty = []
    for _ in range(100):
        seen = len(task.drawn)
        mechanism.gradient()
        if len(task.drawn) == seen:
            empty.append(gradient_of(model).clone())
    assert len(empty) > 20  # (23 / 24) ** 24 = 0.36 of them
    noise = torch.stack(empty)
    assert torch.isfinite(noise).all()
    assert float(noise.std()) == pytest.approx(2.0 * CLIP / 1, rel=0.02)


def test_noise_cannot_be_reproduced(open_site, ticket_for, plan_with):
    """Two hospitals alike in everything, down to torch's global seed."""
    plan = plan_with(dp=True, seed=7)
    updates = []
    for folder in ("one", "two"):
        torch.manual_seed(0)
        np.random.seed(0)
        site = open_site(plan, folder=folder)
        updates.append(site.train(ticket_for(site)).vectors["update"])
    assert (updates[0] != updates[1]).all()
    # What the same noise would look like: a simulation may ask for it.
    same = [open_site(plan, folder=f"seeded-{i}", noise_seed=3) for i in range(2)]
    a, b = (site.train(ticket_for(site)).vectors["update"] for site in same)
    assert (a == b).all()


def test_nothing_but_the_given_bytes_moves_sampling_and_noise(plan_with, rows):
    released = []
    for _ in range(2):
        model = nn.Linear(3, 1)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        private(model, rows(), plan_with(dp=True), reproducible("held still")).gradient()
        released.append(gradient_of(model))
    assert torch.equal(*released)


# --- models ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.InstanceNorm1d(4, track_running_stats=True)])
@pytest.mark.parametrize("frozen", [False, True])
def test_running_statistics_are_refused(norm, frozen, plan_with, rows):
    """Opacus's validator lets a frozen one pass, and its means move in training all the same."""
    model = nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 1))
    if frozen:
        norm.eval().requires_grad_(False)
    with pytest.raises(PlanRefused, match=rf"Layer 1 \({type(norm).__name__}\) .* task.norm: layer"):
        private(model, rows(), plan_with(dp=True), seeded())


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.Identity()])
def test_layers_that_keep_nothing_pass(norm):
    refuse_running_statistics(nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 1)))


# --- patients ----------------------------------------------------------------------------------------------
@pytest.fixture
def by_patient(plan_with) -> Callable[..., StudyPlan]:
    def made(**privacy_terms: object) -> StudyPlan:
        return plan_with(
            privacy=DP | {"unit": "patient", "clip_norm": CLIP, **privacy_terms}, table={"patient_id": "patient"}
        )

    return made


def repeated(rows: Rows, times: int) -> Rows:
    """Every patient with so many rows alike, not side by side."""
    return Rows(rows.x.repeat(times, 1), rows.y.repeat(times), np.tile(rows.patients, times))


@pytest.mark.parametrize("times", [1, 2, 4, 8])
def test_a_patient_is_clipped_once_however_many_records(no_noise, by_patient, rows, times):
    """The mean of equal records is one of them; and no patient moves the sum by more than the clip."""
    plan, some = by_patient(), rows()
    torch.testing.assert_close(one_gradient(plan, repeated(some, times)), one_gradient(plan, some))
    plan, everybody = by_patient(clip_norm=0.01), repeated(some, times)
    rest = only(everybody, np.flatnonzero(everybody.patients != 3))
    moved = float((one_gradient(plan, everybody) - one_gradient(plan, rest)).norm()) * plan.training.batch_size
    assert 0.0099 < moved <= 0.01 * (1 + 1e-4)


def test_a_sum_over_a_patients_records_is_clipped_too(no_noise, by_patient, rows):
    plan, some = by_patient(per_patient="sum", clip_norm=1e6), rows()
    torch.testing.assert_close(one_gradient(plan, repeated(some, 3)), 3 * one_gradient(plan, some))
    plan, some.x[:] = by_patient(per_patient="sum"), some.x * 1e3
    torch.testing.assert_close(one_gradient(plan, repeated(some, 3)), one_gradient(plan, some))


@pytest.mark.parametrize("times", [1, 2, 4, 8])
def test_epsilon_does_not_depend_on_records_a_patient(by_patient, rows, times):
    plan, some = by_patient(), repeated(rows(), times)
    event = private(nn.Linear(3, 1), some, plan, seeded()).event
    assert event == charges.training_event(plan, 24)


def test_patients_are_drawn_whole(no_noise, by_patient, rows, recorder):
    plan = amend(by_patient(), training={"batch_size": 6})
    some, task = repeated(rows(), 3), recorder()
    some = Rows(some.x, torch.from_numpy(some.patients).float(), some.patients)
    mechanism = private(nn.Linear(3, 1), some, plan, seeded(5), task)
    assert mechanism.event
    assert mechanism.event.sample_rate == 6 / 24
    mechanism.gradient()
    task.drawn.clear()  # what the clipper tried out
    for _ in range(50):
        mechanism.gradient()
    assert task.drawn
    for drawn in task.drawn:
        _, counts = np.unique(drawn, return_counts=True)
        assert set(counts) == {3}


# --- copies ------------------------------------------------------------------------------------------------
AUGMENT = {"augment": {"copies": 4, "jitter": 0.5}}


class Louder(Tabular):
    """A task with an augmentation of its own: the second copy of a record is twice as large, the third thrice."""

    def augmentation(self, schema: Schema, terms: Augment) -> Augmentation:
        return lambda x, entropy: x * (1 + torch.arange(len(x)) % terms.copies)[:, None]


def louder(plan: StudyPlan) -> StudyPlan:
    return plan.model_copy(update={"task": Louder(**plan.task.model_dump())})


def by_copies(plan: StudyPlan, rows: Rows, clip_norm: float) -> Tensor:
    """De et al. 2022, section 3.2, a patient at a time: the mean over records and copies first, then the clip."""
    total = torch.zeros((), dtype=torch.float64)
    for patient in np.unique(rows.patients):
        own = only(rows, np.flatnonzero(rows.patients == patient))
        model = initial_model(plan)
        sum(binary(model(own.x * times), own.y) / 4 for times in (1, 2, 3, 4)).backward()
        gradient = gradient_of(model).double()
        total = total + gradient / max(1.0, float(gradient.norm()) / clip_norm)
    return (total / plan.training.batch_size).float()


@pytest.mark.parametrize("task", [{"name": "tabular"}, MLP])
@pytest.mark.parametrize("clip_norm", [1e-3, 0.5, 1e6])
def test_one_clip_covers_all_copies_of_a_patients_records(no_noise, by_patient, rows, task, clip_norm):
    plan = amend(by_patient(clip_norm=clip_norm), task=task, training=AUGMENT)
    some = Rows(rows().x, rows().y, np.arange(24) // 3)
    found = one_gradient(louder(plan), some)
    torch.testing.assert_close(found, by_copies(plan, some, clip_norm), rtol=2e-5, atol=2e-6 * clip_norm / 24 + 1e-9)


def test_no_patient_moves_the_sum_by_more_than_the_clip_however_many_copies(no_noise, by_patient, rows):
    plan, wild = amend(by_patient(), training=AUGMENT), Rows(rows().x, rows().y, np.arange(24) // 3)
    wild.x[:8] *= torch.tensor([1e2, 1e4, 1e8, 1e15, 1e19, 1e25, 1e30, 1e37])[:, None]
    with_all, moved = one_gradient(louder(plan), wild), list[float]()
    for out in range(8):
        without = one_gradient(louder(plan), only(wild, np.flatnonzero(wild.patients != out)))
        moved.append(float((with_all - without).norm()) * plan.training.batch_size)
        alone = one_gradient(plan, only(wild, np.flatnonzero(wild.patients == out)))  # with the task's own jitter
        assert float(alone.norm()) * plan.training.batch_size <= CLIP * (1 + 1e-4)
    assert 0.99 * CLIP < max(moved) <= CLIP * (1 + 1e-4)


def test_copies_cost_no_epsilon(by_patient):
    plan = by_patient()
    assert charges.charges(amend(plan, training=AUGMENT), 24) == charges.charges(plan, 24)


@pytest.mark.parametrize("unit", ["patient", "record"])
def test_copies_without_jitter_change_nothing(no_noise, by_patient, rows, unit):
    plan, some = by_patient(unit=unit), repeated(rows(), 2)
    copied = amend(plan, training={"augment": {"copies": 4, "jitter": 0.0}})
    torch.testing.assert_close(one_gradient(copied, some), one_gradient(plan, some))


def test_jitter_is_of_its_size_fresh_for_each_copy_and_on_numbers_alone(plan_with):
    features = [
        {"name": "age", "kind": "number", "range": [0, 90], "missing": "indicator", "fill": 50},
        {"name": "rhythm", "kind": "category", "categories": ["sinus", "paced"]},
        {"name": "smoker", "kind": "boolean"},
        {"name": "weight", "kind": "number", "range": [30, 250]},
    ]
    plan = plan_with(dp=True, table={"features": features}, training=AUGMENT)
    x = torch.ones(20_000, 6)
    added = (plan.task.augmentation(plan.table, plan.training.augment)(x, seeded(8)) - x).double().numpy()
    assert not added[:, 1:5].any()  # age is missing, sinus, paced, smoker
    assert (x == 1).all()  # the rows themselves stay as they were
    jitter = added[:, [0, 5]].ravel()
    assert stats.kstest(jitter / 0.5, "norm").pvalue > 0.001
    assert len(np.unique(jitter)) > 0.99 * jitter.size


def test_jitter_comes_from_the_mechanisms_bytes(no_noise, by_patient, rows):
    plan, found = amend(by_patient(), training=AUGMENT), list[Tensor]()
    for seed in (1, 1, 2):
        model = initial_model(plan)
        private(model, rows(), plan, seeded(seed)).gradient()
        found.append(gradient_of(model).clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_task_without_augmentation_is_refused_one(dp_plan, rows):
    plan = amend(dp_plan(), training=AUGMENT).model_copy(update={"task": SimpleNamespace(name="plain")})
    with pytest.raises(PlanRefused, match="has no augmentation of its own"):
        private(nn.Linear(3, 1), rows(), plan, seeded())


# --- units -------------------------------------------------------------------------------------------------
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_units_give_back_all_rows_of_whom_they_are_asked(patients, data):
    some = Rows(torch.zeros(len(patients), 1), torch.zeros(len(patients)), np.array(patients))
    units = Units.of(some, "patient")
    drawn = np.array(sorted(data.draw(st.sets(st.integers(0, len(units) - 1)))), dtype=np.int64)
    at, whose = units.rows_of(drawn)
    known = np.unique(patients)
    assert sorted(at.tolist()) == [i for i, patient in enumerate(patients) if patient in known[drawn]]
    assert [patients[i] for i in at] == known[drawn][whose].tolist()
    assert units.sizes.sum() == len(patients)


# --- a whole hospital --------------------------------------------------------------------------------------
def test_an_update_under_site_level_privacy_is_clipped_and_noised(plan_with):
    plan = plan_with(privacy=DP | {"unit": "site", "clip_norm": 2.0})
    event = charges.training_event(plan, 24)
    assert (event.sample_rate, event.steps) == (1.0, 1)
    assert epsilon([event] * plan.rounds, 1e-5) == pytest.approx(3.0, rel=5e-3)
    update = np.full(40_000, 5.0, np.float32)
    found = noisy(update, plan, event, seeded(6))
    assert float(found.mean()) == pytest.approx(2.0 / 200, abs=5 * event.noise_multiplier * 2.0 / 200)
    assert found.std() == pytest.approx(event.noise_multiplier * 2.0, rel=0.02)
    update[7] = math.nan
    assert np.isfinite(noisy(update, plan, event, seeded(6))).all()


# --- noise that hospitals share ----------------------------------------------------------------------------
@pytest.fixture
def shared_plan(plan_with) -> Callable[..., StudyPlan]:
    def made(**terms: object) -> StudyPlan:
        return plan_with(
            privacy=DP | {"mechanism": "shared", "clip_norm": CLIP, **terms},
            aggregation={"secure_sum": True},
            training={"local_steps": 1, "sample_rate": 1.0},
            cohort={"min_sites": 9},
        )

    return made


def noise_of(plan: StudyPlan, sites: int) -> NDArray[np.float64]:
    """What one hospital of so many adds to a flat update, in units of the mean's own step."""
    event = charges.training_event(plan, 24)
    ring = with_its_part(np.zeros(50_000, np.float32), plan, event, sites, seeded(7))
    step = plan.training.learning_rate * CLIP / plan.training.batch_size * 2.0**plan.fraction_bits / sites
    return ring.view(np.int32) / (event.noise_multiplier * step)


@pytest.mark.parametrize("sites", [9, 12])
def test_each_hospital_adds_its_part_of_the_quorums_noise(shared_plan, sites):
    """A third of it with nine, also where twelve came: three of them may drop out."""
    assert noise_of(shared_plan(), sites).std() == pytest.approx(1 / 3, rel=0.02)
    assert noise_of(shared_plan(colluding=5), sites).std() == pytest.approx(1 / 2, rel=0.02)


def test_the_floor_keeps_epsilon_against_all_others(shared_plan):
    plan = shared_plan(epsilon_alone=4.0)
    event = charges.training_event(plan, 24)
    own = charges.part_of(plan, event)
    assert own > event.noise_multiplier / 3
    assert epsilon([replace(event, noise_multiplier=own)] * plan.rounds, 1e-5) == pytest.approx(4.0, rel=5e-3)


def test_the_step_alone_has_no_noise(shared_plan, rows):
    """It is added where the update leaves, on the ring's own integers."""
    plan, some = shared_plan(), rows()
    assert torch.equal(one_gradient(plan, some), one_gradient(plan, some))
    torch.testing.assert_close(one_gradient(plan, some), by_definition(plan, some, CLIP), rtol=2e-5, atol=5e-7)


def test_noise_that_does_not_fit_is_refused(shared_plan):
    event = charges.training_event(shared_plan(), 24)
    coarse = amend(shared_plan(), aggregation={"bits": 16})
    with pytest.raises(PlanRefused, match="too coarse to be trusted"):
        with_its_part(np.zeros(5, np.float32), coarse, event, 9, seeded())
    loud = amend(shared_plan(), training={"learning_rate": 500.0})
    with pytest.raises(PlanRefused, match="would not fit"):
        with_its_part(np.zeros(5, np.float32), loud, event, 9, seeded())


def test_beside_a_shared_sum_nothing_is_told_of_a_step_without_noise(shared_plan):
    """The share of a step that the ring clips is exact: under a bound made for it, it tells who was drawn."""
    assert "clipped" not in tally.names(shared_plan(), 1)
    assert "clipped" in tally.names(amend(shared_plan(), privacy={"mechanism": "site"}), 1)


@pytest.mark.parametrize("clip_norm", [1e-7, 1e-44, 1e7, 1e39, 1e300])
def test_a_clip_norm_near_the_ends_of_single_precision_is_refused(plan_with, clip_norm):
    with pytest.raises(PlanRefused, match="clip_norm"):
        plan_with(privacy=DP | {"clip_norm": clip_norm})
