"""Time to an event: metrics against small cases done by hand, and the losses against what they stand for."""

import numpy as np
import pytest
import torch

from cloister_client.encoders.outcomes import in_periods
from cloister_shared.networks import cox, losses
from cloister_shared.outcomes import survival

CUTS = (10.0, 20.0, 30.0)
ONE = np.ones((1, 5))


def truth(times: list[float], came: list[float]) -> np.ndarray:
    return in_periods(np.array(times), np.array(came), CUTS)


def test_a_time_on_a_cut_is_of_the_period_that_it_ends():
    found = truth([10.0, 10.0, 10.1, 30.0, 35.0, 35.0], [1, 0, 1, 1, 1, 0])
    assert found[:, 0].tolist() == [0, 1, 1, 2, 3, 3]  # outlived one period, if lost at its end
    assert found[:, 1].tolist() == [1, 0, 1, 1, 0, 0]  # after the last cut nobody was awaited
    assert found[:, 2].max() == 30.0


def test_c_index_by_hand():
    """Comparable: (1, 2), (1, 3), (1, 4), (1, 5), (3, 4), (3, 5); patient 2 was lost before anyone after her."""
    y = truth([5, 8, 12, 25, 28], [1, 0, 1, 0, 1])
    outlives = np.array([0.2, 0.9, 0.5, 0.4, 0.5])[:, None] * np.ones(3)
    # (1, *) all four right; (3, 4) wrong; (3, 5) tied.
    assert survival.c_index(y, outlives, ONE)[0] == pytest.approx(4.5 / 6)


def test_equal_times_are_compared_if_one_was_lost():
    y = truth([12, 12, 12], [1, 1, 0])
    outlives = np.array([0.1, 0.3, 0.2])[:, None] * np.ones(3)
    assert survival.c_index(y, outlives, np.ones((1, 3)))[0] == pytest.approx(1 / 2)  # (1, 3) right, (2, 3) wrong


def test_weights_are_patients_drawn_again():
    y = truth([5, 8, 12, 25, 28], [1, 0, 1, 0, 1])
    p = np.array([0.2, 0.9, 0.5, 0.4, 0.5])[:, None] * np.ones(3)
    weights = np.array([[2.0, 0.0, 1.0, 1.0, 1.0]])
    drawn = [0, 0, 2, 3, 4]
    assert survival.c_index(y, p, weights) == pytest.approx(survival.c_index(y[drawn], p[drawn], ONE))


def test_many_patients_are_compared_some_at_a_time(monkeypatch):
    draw = np.random.default_rng(0)
    y = truth(list(draw.uniform(1, 35, 40)), list((draw.random(40) < 0.6).astype(float)))
    p, weights = draw.random((40, 3)), draw.integers(0, 3, (2, 40)).astype(float)
    whole = survival.c_index(y, p, weights)
    monkeypatch.setattr(survival, "ROWS", 7)
    assert survival.c_index(y, p, weights) == pytest.approx(whole)


def test_who_is_lost_is_weighed_through_those_who_are_not():
    """Five patients; one is lost at 8, when four were there, and one at 25, when one was there beside."""
    y = truth([5, 8, 12, 25, 28], [1, 0, 1, 0, 1])
    # Not lost before 10: 3/4 (who had the event at 5 is no longer there); before 20: as before; before 30: 3/4 * 1/2.
    assert survival.awaited(y, np.array([5.0, 8.0, 10, 20, 30])) == pytest.approx([1, 1, 0.75, 0.75, 0.375])
    half = np.full((5, 3), 0.5)
    weighed = survival.brier(y, half, np.array(CUTS)) / 0.25
    assert weighed == pytest.approx(
        np.array(
            [[1, 1, 1], [0, 0, 0], [4 / 3, 4 / 3, 4 / 3], [4 / 3, 4 / 3, 0], [4 / 3, 4 / 3, 8 / 3]],
        )
    )
    assert weighed.sum(axis=0)[:2] == pytest.approx([5, 5])  # the lost one's weight went to the others


def test_losses_at_the_time_of_an_event_come_after_it():
    y = truth([8, 8, 8, 25], [1, 1, 0, 1])
    assert survival.awaited(y, np.array([8.0, 9.0])) == pytest.approx([1, 0.5])  # of two who were there, not of four


def test_the_integrated_score_is_the_area_between_the_first_end_and_the_last():
    y = truth([5, 12, 25, 35], [1, 1, 1, 0])
    certain = np.array([[1.0, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]])  # errors of 1, 2 and 3 of four patients
    found = survival.metrics(CUTS)["integrated_brier"](y, certain, np.ones((1, 4)))
    assert found[0] == pytest.approx(((0.25 + 0.5) / 2 + (0.5 + 0.75) / 2) / 2)


def test_an_end_to_which_nobody_was_awaited_is_not_judged():
    y = truth([5, 8, 12, 15, 19], [1, 0, 1, 1, 0])
    found = survival.metrics(CUTS)
    assert np.isnan(found["brier_at_end"](y, np.full((5, 3), 0.5), ONE)[0])


def test_the_loss_is_minus_the_log_of_the_chance_of_what_was_seen():
    logits = torch.tensor([[0.3, -1.0, 0.4], [0.3, -1.0, 0.4], [2.0, 0.0, -2.0]])
    hazards = torch.sigmoid(logits)
    y = torch.tensor([[1.0, 1.0, 12.0], [2.0, 0.0, 25.0], [3.0, 0.0, 30.0]])
    chances = torch.stack(
        [
            (1 - hazards[0, 0]) * hazards[0, 1],
            (1 - hazards[1, 0]) * (1 - hazards[1, 1]),
            (1 - hazards[2]).prod(),
        ]
    )
    assert losses.survival(logits, y) == pytest.approx(-chances.log().mean())


def test_partial_likelihood_by_hand():
    """Breslow: whoever has the same time is at risk for each of them."""
    risk = torch.tensor([0.5, -0.2, 0.1, 0.9])
    y = torch.tensor([[0.0, 1, 5], [0, 1, 5], [1, 0, 12], [2, 1, 25]])
    output = torch.cat([torch.zeros(4, 3), risk[:, None]], dim=1)
    whole, late = risk.exp().sum().log(), risk[3]
    partial = ((whole - risk[0]) + (whole - risk[1]) + (late - risk[3])) / 3
    assert cox.loss(output, y) - losses.survival(output[:, :3], y) == pytest.approx(partial)


def test_one_patient_moves_what_coxs_loss_asks_of_another():
    torch.manual_seed(0)
    net, x = cox.ProportionalHazards(2, (), 3), torch.randn(4, 2)
    y = torch.tensor([[0.0, 1, 5], [0, 1, 6], [1, 1, 12], [2, 1, 25]])
    alone = torch.stack([cox.loss(net(x[i : i + 1]), y[i : i + 1]) for i in range(4)]).mean()
    assert cox.loss(net(x), y).item() != pytest.approx(alone.item())


def test_a_curve_of_proportional_hazards_is_one():
    net, x = cox.ProportionalHazards(2, (), 3), torch.randn(5, 2)
    output = net(x).detach()
    cumulated = (net.baseline + net.risk(x)).exp().cumsum(1).detach()
    _, outlives = survival.seen(3)(output.numpy(), np.zeros((5, 3), np.float32))
    assert outlives == pytest.approx(torch.exp(-cumulated).numpy(), abs=1e-5)
