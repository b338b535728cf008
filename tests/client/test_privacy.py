"""cloister_client.privacy: every gradient that leaves is clipped, sampled and noised as its price says."""

import math
import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from cloister_client import privacy
from cloister_client.dataset import Rows
from cloister_client.privacy import (
    Entropy,
    dp_sgd,
    gaussians,
    noisy_statistics,
    refuse_running_statistics,
    reproducible,
    uniforms,
)
from cloister_shared.budget import epsilon
from cloister_shared.errors import PlanRefused
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend
from cloister_shared.tasks import tabular
from cloister_shared.tasks.layout import initial_model
from cloister_shared.tasks.zoo import Task

CLIP = 0.7
MLP = {"name": "tabular", "model": "mlp", "hidden": [5], "norm": "layer"}


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch):
    """Noise so small that a gradient can be compared with its definition."""
    monkeypatch.setattr(privacy, "calibrate", lambda *_: 1e-12)


@pytest.fixture
def dp_plan(plan_with) -> Callable[..., StudyPlan]:
    def made(**changes: object) -> StudyPlan:
        plan = plan_with(dp=True, **changes)
        return amend(plan, privacy={"clip_norm": CLIP})

    return made


def seeded(seed: int = 0) -> Entropy:
    return reproducible(str(seed))


def gradient_of(model: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def one_gradient(plan: StudyPlan, rows: Rows, task: Task = tabular) -> Tensor:
    model = initial_model(plan)
    dp_sgd(model, task, rows, plan, seeded()).gradient()
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
@pytest.mark.parametrize("task", [{"name": "tabular"}, MLP, {**MLP, "hidden": [6, 4], "norm": "none"}])
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


# --- sampling ----------------------------------------------------------------------------------------------
STEPS, ROWS, RATE = 2000, 40, 0.2


@pytest.fixture
def inclusions(no_noise, dp_plan, rows, recorder) -> NDArray[np.bool_]:
    """Which rows entered which step, [steps, rows], as the loss saw them."""
    plan = dp_plan(training={"batch_size": round(ROWS * RATE)})
    some, task = rows(ROWS), recorder()
    some = Rows(some.x, torch.arange(ROWS).float(), some.patients)
    mechanism = dp_sgd(nn.Linear(3, 1), task, some, plan, seeded(1))
    assert mechanism.event is not None
    assert mechanism.event.sample_rate == RATE
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
    mechanism = dp_sgd(model, task, rows(), plan, seeded(2))
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
    monkeypatch.setattr(privacy, "calibrate", lambda *_: 2.0)
    plan = dp_plan(training={"batch_size": 1})
    model, task = nn.Linear(3, 250), recorder()
    mechanism = dp_sgd(model, task, rows(), plan, seeded(3))
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
        dp_sgd(model, tabular, rows(), plan_with(dp=True), reproducible("held still")).gradient()
        released.append(gradient_of(model))
    assert torch.equal(*released)


def test_gaussians_are_standard_normal():
    drawn = gaussians(os.urandom, 200_001)
    assert len(drawn) == 200_001
    assert stats.kstest(drawn, "norm").pvalue > 1e-4
    assert abs(stats.kurtosis(drawn)) < 0.1
    assert 0 <= uniforms(os.urandom, 1000).min() < uniforms(os.urandom, 1000).max() < 1


# --- models ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.InstanceNorm1d(4, track_running_stats=True)])
@pytest.mark.parametrize("frozen", [False, True])
def test_running_statistics_are_refused(norm, frozen, plan_with, rows):
    """Opacus's validator lets a frozen one pass, and its means move in training all the same."""
    model = nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 1))
    if frozen:
        norm.eval().requires_grad_(False)
    with pytest.raises(PlanRefused, match=rf"Layer 1 \({type(norm).__name__}\) .* task.norm: layer"):
        dp_sgd(model, tabular, rows(), plan_with(dp=True), seeded())


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.Identity()])
def test_layers_that_keep_nothing_pass(norm):
    refuse_running_statistics(nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 1)))


# --- statistics for normalisation --------------------------------------------------------------------------
FEDERATED = {"method": "federated"}
wild = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(wild, wild, wild), min_size=1, max_size=6))
def test_one_row_moves_the_sums_by_at_most_their_sensitivity(plan_with, some):
    plan = plan_with(normalisation=FEDERATED)
    x = torch.tensor(some)
    y = torch.zeros(len(x))
    with_all = noisy_statistics(Rows(x, y, np.arange(len(x))), [0, 1, 2], plan, seeded())
    without = noisy_statistics(Rows(x[1:], y[1:], np.arange(len(x) - 1)), [0, 1, 2], plan, seeded())
    assert float((with_all - without).norm()) <= math.sqrt(3 * 3) * (1 + 1e-9)


def test_the_sensitivity_is_reached(plan_with):
    rows = Rows(torch.tensor([[2.0, -2.0, 2.0]]), torch.zeros(1), np.arange(1))
    nobody = Rows(torch.zeros(0, 3), torch.zeros(0), np.arange(0))
    plan = plan_with(normalisation=FEDERATED)
    moved = noisy_statistics(rows, [0, 1, 2], plan, seeded()) - noisy_statistics(nobody, [0, 1, 2], plan, seeded())
    assert float(moved.norm()) == pytest.approx(math.sqrt(9))


def test_exact_sums_are_count_sum_and_squares_on_the_range(plan_with, rows):
    some = rows(11)
    scaled = (some.x.numpy().astype(float) / 2).clip(-1, 1)
    expected = [np.full(3, 11.0), scaled.sum(0), (scaled**2).sum(0)]
    found = noisy_statistics(some, [0, 1, 2], plan_with(normalisation=FEDERATED), seeded())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_noise_of_the_sums_is_what_their_event_says(plan_with, rows):
    plan, generator = plan_with(dp=True, normalisation={**FEDERATED, "epsilon_share": 0.2}), seeded(4)
    event = privacy.statistics_event(plan)
    assert event is not None
    assert (event.sample_rate, event.steps, event.purpose) == (1.0, 1, "statistics")
    assert epsilon([event], 1e-5) == pytest.approx(0.2 * 3.0, rel=5e-3)
    exact = noisy_statistics(rows(), [0, 1, 2], plan_with(normalisation=FEDERATED), generator)
    noise = torch.stack([noisy_statistics(rows(), [0, 1, 2], plan, generator) - exact for _ in range(2000)])
    assert float(noise.std()) == pytest.approx(event.noise_multiplier * math.sqrt(9), rel=0.02)


def test_statistics_and_training_share_one_epsilon(plan_with):
    plan = plan_with(dp=True, normalisation=FEDERATED)
    statistics = privacy.statistics_event(plan)
    assert statistics is not None
    training = privacy.training_event(plan, 24)
    assert training.sample_rate == 1.0
    together = epsilon([statistics, *[training] * plan.rounds], 1e-5)
    assert 0.995 * 3.0 < together <= 3.0
    assert training.noise_multiplier > privacy.training_event(plan_with(dp=True), 24).noise_multiplier
