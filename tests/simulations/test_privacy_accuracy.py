"""The bench that trains under privacy: two ways to the clipped sum, and the mechanism that it claims."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from cloister_shared.budget import Event, epsilon

BENCHMARKS = Path(__file__).resolve().parents[2] / "simulations" / "benchmarks"


@pytest.fixture
def hospitals(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import accuracy_hospitals  # pyright: ignore[reportMissingImports]

    return accuracy_hospitals


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))


@pytest.fixture
def rows(hospitals):
    generator = torch.Generator().manual_seed(1)
    patient = torch.tensor([0, 1, 1, 2, 3, 3, 3, 4])
    x = 3 * torch.randn(8, 5, generator=generator)
    return hospitals.Rows(x, (torch.rand(8, generator=generator) < 0.5).float(), patient)


def of_patient(model: nn.Module, rows, number: int) -> torch.Tensor:
    """One patient's mean gradient, by autograd alone."""
    own = rows.patient == number
    said = functional.binary_cross_entropy_with_logits(model(rows.x[own])[:, 0], rows.y[own])
    return torch.cat([part.flatten() for part in torch.autograd.grad(said, list(model.parameters()))])


@pytest.mark.parametrize("clip_norm", [None, 0.05, 1.0, 100.0])
def test_both_sums_are_the_sum_of_each_patients_clipped_mean_gradient(hospitals, model, rows, clip_norm):
    apart = [of_patient(model, rows, number) for number in range(rows.count)]
    most = math.inf if clip_norm is None else clip_norm
    wanted = sum(one * min(1.0, most / float(one.norm())) for one in apart)
    assert hospitals.any_sum(model, rows, clip_norm) == pytest.approx(wanted, abs=1e-5)
    assert hospitals.dense_sum(model, rows, clip_norm) == pytest.approx(wanted, abs=1e-5)


def test_a_draw_holds_its_patients_rows_and_no_others(hospitals, model, rows):
    drawn = rows.of(torch.tensor([False, True, False, True, False]))
    assert torch.equal(drawn.x, rows.x[torch.tensor([1, 2, 4, 5, 6])])
    assert drawn.patient.tolist() == [0, 0, 1, 1, 1]
    afresh = hospitals.Rows(drawn.x, drawn.y, drawn.patient)
    assert drawn.count == afresh.count
    assert drawn.share == pytest.approx(afresh.share)
    assert hospitals.dense_sum(model, drawn, 0.1) == pytest.approx(hospitals.dense_sum(model, afresh, 0.1), abs=1e-6)


@pytest.mark.parametrize("clip_norm", [0.05, 100.0])
def test_copies_without_jitter_change_no_patients_part(hospitals, model, rows, clip_norm):
    copied = rows.copied(3)
    assert copied.count == rows.count
    expected = hospitals.dense_sum(model, rows, clip_norm)
    assert hospitals.dense_sum(model, copied, clip_norm) == pytest.approx(expected, abs=1e-5)


def test_jitter_is_on_numbers_alone_and_leaves_draws_and_noise_as_they_were(hospitals, model, monkeypatch):
    seen = []
    monkeypatch.setattr(hospitals, "clipped_sum", lambda _, rows, __: seen.append(rows) or np.zeros(3, np.float32))
    width = len(hospitals.columns(hospitals.study(0).table))
    some = hospitals.Rows(torch.zeros(400, width), torch.zeros(400), torch.arange(200).repeat_interleave(2))
    said = [
        hospitals._noisy(model, some, 1.0, hospitals.Terms("shared", 1.0, jitter=jitter), np.random.default_rng(3))
        for jitter in (0.0, 0.5)
    ]
    assert (said[0] == said[1]).all()
    without, having = seen
    assert torch.equal(without.patient, having.patient)
    moved = having.x.std(dim=0) > 0
    assert moved.nonzero()[:, 0].tolist() == hospitals._numbers()
    assert 0 < len(hospitals._numbers()) < width
    assert float(having.x[:, moved].std()) == pytest.approx(0.5, rel=0.1)


def test_an_empty_draw_is_a_sum_of_nothing(hospitals, model, rows):
    nothing = hospitals.clipped_sum(model, rows.of(torch.zeros(5, dtype=torch.bool)), 1.0)
    assert nothing.shape == (sum(part.numel() for part in model.parameters()),)
    assert not nothing.any()


def test_the_noise_is_what_the_accountant_asks_for_and_more_where_hospitals_collude(hospitals):
    terms = hospitals.Terms("shared", 1.0, epsilon=1.0)
    event = Event(terms.noise, terms.sample_rate, terms.rounds)
    assert epsilon([event], hospitals.DELTA) == pytest.approx(1.0, abs=2e-3)
    assert epsilon([event], hospitals.DELTA) <= 1.0
    third = hospitals.Terms("shared", 1.0, epsilon=1.0, colluding=6)
    # What the other fourteen add alone is then the whole noise.
    assert third.noise * math.sqrt(14 / 20) == pytest.approx(terms.noise)
    assert hospitals.Terms("none", 1.0).noise == 0.0


def test_clinical_constants_are_near_what_patients_have(hospitals, monkeypatch):
    monkeypatch.setattr(hospitals, "PATIENTS", 4000)
    everyone = hospitals.population.__wrapped__(7)
    assert everyone.train.x.mean(dim=0).abs().max() < 1
    assert everyone.train.x.std(dim=0).max() < 2
    assert len(torch.bincount(everyone.hospital)) == hospitals.HOSPITALS
    assert everyone.train.count == len(everyone.hospital)
    assert np.isin(everyone.test[1], (0.0, 1.0)).all()


def test_the_interval_is_students_over_paired_differences(hospitals):
    import privacy_accuracy  # pyright: ignore[reportMissingImports]

    lost, said = privacy_accuracy.difference(
        [0.85, 0.83, 0.81, 0.80, 0.79], [0.84, 0.82, 0.79, 0.79, 0.78], "points lost"
    )
    assert lost == pytest.approx(1.2)
    assert said.format(lost) == "1.20 points lost (0.64 to 1.76)"  # mean ± 2.776 * 0.4472 / sqrt(5)
