"""Strategies by hand: one or two steps worked out on paper, and algebra that must hold for any update."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister_server.strategies import (
    ROBUST_RULES,
    STRATEGIES,
    State,
    Vector,
    averaged,
    corrected,
    fedadam_without_noise,
    update_variance,
)
from cloister_shared import plan as terms

MODEL = np.array([1.0, -2.0, 0.5], dtype=np.float32)
UPDATE = np.array([0.1, 0.2, -0.4], dtype=np.float32)


def steps(name: str, of: object, count: int = 2) -> tuple[Vector, State]:
    model, state = MODEL.copy(), State()
    for _ in range(count):
        model, state = STRATEGIES[name](model, UPDATE.copy(), state, of)
    return model, state


def test_fedavg_adds_the_mean_update():
    model, _ = steps("fedavg", terms.FedAvg(name="fedavg", server_learning_rate=0.5), 1)
    assert model == pytest.approx([1.05, -1.9, 0.3])


def test_fedavgm_keeps_what_it_had_times_momentum():
    model, state = steps("fedavgm", terms.FedAvgM(name="fedavgm", server_learning_rate=1.0, momentum=0.5))
    assert state["momentum"] == pytest.approx(1.5 * UPDATE)
    assert model == pytest.approx(MODEL + UPDATE + 1.5 * UPDATE)


def test_fedadam_two_steps_on_paper():
    # m1 = .1 d, v1 = .001 d^2; m2 = .19 d, v2 = .001999 d^2; no bias correction (Reddi et al. 2021)
    model, state = steps("fedadam", terms.FedAdam(name="fedadam", server_learning_rate=0.01, tau=1e-8))
    sign = np.sign(UPDATE)
    assert state["first"] == pytest.approx(0.19 * UPDATE, rel=1e-5)
    assert state["second"] == pytest.approx(0.001999 * UPDATE**2, rel=1e-3)
    expected = MODEL + 0.01 * sign * (0.1 / np.sqrt(0.001) + 0.19 / np.sqrt(0.001999))
    assert model == pytest.approx(expected, rel=1e-4)


def test_fedyogi_moves_its_second_moment_by_the_sign():
    # from v = 0: v1 = .001 d^2 (sign of -d^2 is -1); then v1 < d^2, so again + .001 d^2
    _, state = steps("fedyogi", terms.FedYogi(name="fedyogi"))
    assert state["second"] == pytest.approx(0.002 * UPDATE**2, rel=1e-3)
    # and where the update dies away it falls by no more than (1 - b2) d^2, unlike Adam's share of v
    _, after = STRATEGIES["fedyogi"](MODEL, 0.001 * UPDATE, state, terms.FedYogi(name="fedyogi"))
    assert after["second"] == pytest.approx(state["second"] - 0.001 * (0.001 * UPDATE) ** 2, rel=1e-6)


def test_fedadagrad_adds_up_squares():
    model, state = steps("fedadagrad", terms.FedAdagrad(name="fedadagrad", beta1=0.0, server_learning_rate=0.1))
    assert state["second"] == pytest.approx(2 * UPDATE**2, rel=1e-5)
    assert model == pytest.approx(MODEL + 0.1 * np.sign(UPDATE) * (1 + 1 / np.sqrt(2)), rel=1e-4)


UPDATES = st.lists(st.lists(st.floats(-10, 10, width=32), min_size=4, max_size=4), min_size=5, max_size=9).map(
    lambda rows: [np.array(row, dtype=np.float32) for row in rows]
)


@given(UPDATES, st.randoms())
def test_robust_rules_do_not_depend_on_the_order(updates, random):
    for name, of in (
        ("median", terms.Median(name="median")),
        ("trimmed-mean", terms.TrimmedMean(name="trimmed-mean", trim=2)),
    ):
        shuffled = random.sample(updates, len(updates))
        assert ROBUST_RULES[name](shuffled, of) == pytest.approx(ROBUST_RULES[name](updates, of), abs=1e-5)


@given(UPDATES)
def test_one_hostile_hospital_cannot_leave_the_honest_range(updates):
    honest = np.stack(updates)
    hostile = [*updates, np.full(4, 1e6, dtype=np.float32)]
    for name, of in (
        ("median", terms.Median(name="median")),
        ("trimmed-mean", terms.TrimmedMean(name="trimmed-mean", trim=1)),
    ):
        out = ROBUST_RULES[name](hostile, of)
        assert (out <= honest.max(axis=0) + 1e-4).all()
        assert (out >= honest.min(axis=0) - 1e-4).all()


def test_krum_takes_one_of_the_crowd():
    crowd = [np.array([1.0, 1.0], dtype=np.float32) + np.float32(0.01 * i) for i in range(4)]
    far = np.array([50.0, -50.0], dtype=np.float32)
    out = ROBUST_RULES["krum"]([far, *crowd], terms.Krum(name="krum", hostile=1))
    assert any(np.array_equal(out, one) for one in crowd)


# --- DP-AdamBC -------------------------------------------------------------------------------------------------
CORRECTED = terms.FedAdam(name="fedadam", server_learning_rate=0.01, tau=1e-3, correct_noise=True)


def test_without_noise_it_is_adam_of_kingma_and_ba():
    torch = pytest.importorskip("torch")
    weights = torch.from_numpy(MODEL.copy()).requires_grad_()
    adam = torch.optim.Adam([weights], lr=0.01, betas=(0.9, 0.999), eps=0.0)
    model, state = MODEL.copy(), State()
    for scale in (1.0, -0.5, 2.0, 0.3):
        weights.grad = torch.from_numpy(-scale * UPDATE)  # an update goes downhill, a gradient uphill
        adam.step()
        model, state = fedadam_without_noise(model, np.float32(scale) * UPDATE, state, CORRECTED, 0.0)
    assert model == pytest.approx(weights.detach().numpy(), rel=1e-4)


def test_the_variance_of_the_noise_is_taken_out_and_tau_is_the_least_that_is_left():
    second = np.array([4.0, 1.0, 0.5], dtype=np.float32)
    assert corrected(second, 0.75, tau=0.1) == pytest.approx([3.25, 0.25, 0.01])


def test_a_weak_signal_in_strong_noise_is_found_again():
    """Plain Adam's steps are as long as the noise allows; without the noise's part they are the signal's."""
    rng, signal, spread = np.random.default_rng(0), np.float32(0.3), 2.0
    model, state = np.zeros(4000, dtype=np.float32), State()
    for _ in range(2000):
        update = signal + rng.normal(0, spread, 4000).astype(np.float32)
        model, state = fedadam_without_noise(model, update, state, CORRECTED, spread**2)
    count = float(state["count"][1])
    assert np.mean(state["second"]) / count == pytest.approx(spread**2 + signal**2, rel=0.01)
    assert np.mean(corrected(state["second"] / np.float32(count), spread**2, 1e-3)) == pytest.approx(0.09, rel=0.4)


def test_the_variance_in_the_mean_update_is_that_of_noise_that_was_drawn():
    rng, spread, rate, batch, hospitals = np.random.default_rng(1), 3.0, 0.7, 40, 5
    of_each = rng.normal(0, spread / np.sqrt(hospitals), (hospitals, 50_000))
    mean_update = (-rate * of_each / batch).mean(axis=0)
    assert np.var(mean_update) == pytest.approx(update_variance(spread, rate, batch, hospitals), rel=0.02)


# --- the average of the models -----------------------------------------------------------------------------------
@given(UPDATES, st.floats(0.05, 0.99))
def test_the_average_is_the_weighted_mean_of_all_rounds(models, decay):
    average = None
    for number, model in enumerate(models, 1):
        average = averaged(average, model, number, decay)
    weights = decay ** np.arange(len(models))[::-1]
    assert average == pytest.approx(np.average(np.stack(models), axis=0, weights=weights), abs=1e-4)


def test_the_average_of_one_round_is_its_model_and_no_view_of_it():
    model = MODEL.copy()
    average = averaged(None, model, 1, 0.9)
    model += 1
    assert average == pytest.approx(MODEL)
