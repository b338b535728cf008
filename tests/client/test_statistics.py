"""cloister_client.statistics: sums and counts that no unit moves by more than their noise is scaled to."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_client import statistics
from cloister_client.dataset import Rows
from cloister_client.statistics import noisy_risks, noisy_statistics
from cloister_shared import charges, tally
from cloister_shared.budget import epsilon
from cloister_shared.noise import reproducible
from cloister_shared.plan import StudyPlan

FEDERATED = {"method": "federated"}
BOTH = {"normalisation": FEDERATED, "statistics": {"histograms": 5}}
PATIENTS = {"privacy": {"mechanism": "site", "unit": "patient", "epsilon": 3.0, "delta": 1e-5, "clip_norm": 1.0}}
wild = st.floats(-1e6, 1e6, width=32)


def said(rows: Rows, plan: StudyPlan, seed: str = "s") -> np.ndarray:
    found = noisy_statistics(rows, plan, reproducible(seed))
    assert tuple(found) == tally.statistics(plan)
    return np.array(list(found.values()))


def table(values: list[tuple[float, float, float]], patients: list[int] | None = None) -> Rows:
    x = torch.tensor(values, dtype=torch.float32).reshape(-1, 3)
    return Rows(x, torch.zeros(len(x)), np.array(range(len(x)) if patients is None else patients, dtype=np.int64))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(wild, wild, wild), min_size=1, max_size=6), st.booleans())
def test_one_row_moves_them_by_at_most_their_sensitivity(plan_with, some, histograms):
    plan = plan_with(**(BOTH if histograms else {"normalisation": FEDERATED}))
    moved = np.linalg.norm(said(table(some), plan) - said(table(some[1:]), plan))
    assert moved <= math.sqrt(3 * 3 + 4 * histograms) * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(wild, wild, wild), min_size=1, max_size=6))
def test_nor_does_one_patient_with_many_rows(plan_with, some):
    plan = plan_with(table={"patient_id": "patient"}, **BOTH, **PATIENTS)
    others = [(0.5, 0.5, 0.5)] * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "statistics_event", lambda plan: None)  # exact, where there would be noise
        with_all = said(table(some + others, [0] * len(some) + [1, 2]), plan)
        moved = np.linalg.norm(with_all - said(table(others, [1, 2]), plan))
    assert moved <= math.sqrt(3 * 3 + 4) * (1 + 1e-5)


def test_the_sensitivity_is_reached(plan_with):
    plan = plan_with(**BOTH)
    moved = said(table([(2.0, -2.0, 2.0)]), plan) - said(table([]), plan)
    assert np.linalg.norm(moved) == pytest.approx(math.sqrt(13))


def test_exact_sums_are_count_sum_and_squares_on_the_range(plan_with, rows):
    some = rows(11)
    scaled = (some.x.numpy().astype(float) / 2).clip(-1, 1)
    expected = np.concatenate([np.full(3, 11.0), scaled.sum(0), (scaled**2).sum(0)])
    np.testing.assert_allclose(said(some, plan_with(normalisation=FEDERATED)), expected, rtol=1e-12)


def test_histograms_count_every_row_once_a_feature(plan_with, rows):
    some = rows(40)
    plan = plan_with(statistics={"histograms": 4})
    found = noisy_statistics(some, plan, reproducible("s"))
    for name in "abc":
        column = some.x[:, "abc".index(name)].clamp(-2, 2).numpy()
        counts = [found[tally.cell(name, str(at))] for at in range(4)]
        assert counts == np.histogram(column, 4, (-2, 2))[0].tolist()
    assert found[tally.cell("outcome", "yes")] == float(some.y.sum())
    assert found[tally.cell("outcome", "no")] == float((1 - some.y).sum())


@pytest.mark.parametrize("histograms", [None, 5])
def test_noise_is_what_the_event_says(plan_with, rows, histograms):
    share = {"statistics": {"epsilon_share": 0.2, "histograms": histograms}}
    plan = plan_with(dp=True, normalisation=FEDERATED, **share)
    event = charges.statistics_event(plan)
    assert event is not None
    assert (event.sample_rate, event.steps, event.purpose) == (1.0, 1, "statistics")
    assert epsilon([event], 1e-5) == pytest.approx(0.2 * 3.0, rel=5e-3)
    exact = said(rows(), plan_with(normalisation=FEDERATED, statistics={"histograms": histograms}))
    noise = np.stack([said(rows(), plan, f"{i}") - exact for i in range(500)])
    sensitivity = math.sqrt(9 + (4 if histograms else 0))
    assert noise.std() == pytest.approx(event.noise_multiplier * sensitivity, rel=0.03)
    steps = said(rows(), plan) * 2**20
    assert (steps == np.rint(steps)).all()  # on the grid: no low bits that tell


def test_risks_count_held_out_patients_by_outcome(plan_with, rows):
    plan = plan_with(dp=True, evaluation={"epsilon_share": 0.3})
    event = charges.evaluation_event(plan)
    assert event is not None
    assert epsilon([event], 1e-5) == pytest.approx(0.9, rel=5e-3)
    some, risks = rows(30), np.linspace(0, 1, 30)
    found = np.mean(
        [list(noisy_risks(some, risks, plan, event, reproducible(f"{i}")).values()) for i in range(400)], axis=0
    )
    ill = np.histogram(risks[some.y.numpy() == 1], tally.RISK_BINS, (0, 1))[0]
    well = np.histogram(risks[some.y.numpy() == 0], tally.RISK_BINS, (0, 1))[0]
    np.testing.assert_allclose(found, np.concatenate([ill, well]), atol=5 * event.noise_multiplier / 20)


def test_statistics_evaluation_and_training_share_one_epsilon(plan_with):
    plan = plan_with(dp=True, normalisation=FEDERATED, evaluation={"epsilon_share": 0.2})
    together = epsilon(charges.charges(plan, 24), 1e-5)
    assert 0.995 * 3.0 < together <= 3.0
    alone = charges.training_event(plan_with(dp=True), 24).noise_multiplier
    assert charges.training_event(plan, 24).noise_multiplier > alone
