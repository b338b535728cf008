"""What a treatment changes: metrics and losses by hand, and against a truth that is known."""

import numpy as np
import pytest
import torch

from cloister_shared.networks import effects, losses
from cloister_shared.outcomes import effect

METRICS = effect.metrics(larger_is_better=True)


def drawn(n: int, confounded: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth, a prediction that knows everything, and each patient's effect 1 + x."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=n)
    chance = 1 / (1 + np.exp(-confounded * x))
    treated = (draw.random(n) < chance).astype(float)
    y = np.stack([2 * x + treated * (1 + x) + 0.5 * draw.normal(size=n), treated], axis=1)
    return y, np.stack([2 * x, 3 * x + 1, chance, 1 + x], axis=1), 1 + x


def value(name: str, y: np.ndarray, p: np.ndarray) -> float:
    return float(METRICS[name](y, p, np.ones((1, len(y))))[0])


@pytest.mark.parametrize("wrong", ["outcomes", "chance"])
def test_either_half_may_be_wrong(wrong):
    """Doubly robust: with the outcomes' model or with the chance's, and the plain difference with neither."""
    y, p, gain = drawn(20_000, 1.0)
    plain = y[y[:, 1] == 1, 0].mean() - y[y[:, 1] == 0, 0].mean()
    assert abs(plain - gain.mean()) > 0.8
    p[:, slice(0, 2) if wrong == "outcomes" else 2] = 0.0 if wrong == "outcomes" else 0.5
    assert value("mean_effect", y, p) == pytest.approx(gain.mean(), abs=0.1)


def test_the_value_of_treating_whom_it_helps():
    y, p, gain = drawn(20_000, 0.0)
    assert value("policy_value", y, p) == pytest.approx(np.maximum(gain, 0).mean() + (p[:, 0]).mean(), abs=0.05)
    everybody = p.copy()
    everybody[:, 3] = 1
    assert value("policy_value", y, everybody) == pytest.approx((p[:, 0] + gain).mean(), abs=0.05)


def test_where_less_is_better_the_policy_turns():
    y, p, gain = drawn(20_000, 0.0)
    found = effect.metrics(larger_is_better=False)["policy_value"](y, p, np.ones((1, len(y))))[0]
    assert found == pytest.approx((p[:, 0] + np.minimum(gain, 0)).mean(), abs=0.05)


def test_the_uplift_curve_ends_at_the_mean_effect_and_lies_above_the_line():
    y, p, gain = drawn(20_000, 0.0)
    curve = effect.uplift_curve(y, p, larger_is_better=True)
    assert curve[0] == (0.0, 0.0)
    assert curve[-1][0] == 1.0
    assert curve[-1][1] == pytest.approx(gain.mean(), abs=0.05)
    assert all(gained > share * curve[-1][1] for share, gained in curve[1:-1])
    # For an effect of 1 + x of which x is known, the area is that of a normal's Lorenz curve: 1 / (2 sqrt(pi)).
    assert value("uplift", y, p) == pytest.approx(1 / (2 * np.sqrt(np.pi)), abs=0.02)
    assert value("uplift", y, p[:, [0, 1, 2, 2]]) == pytest.approx(0, abs=0.02)


def test_nothing_is_said_of_an_effect_where_too_few_can_be_compared():
    y, p, _ = drawn(2000, 6.0)
    assert value("overlap", y, p) < effect.LEAST_OVERLAP
    assert np.isnan([value(name, y, p) for name in ("policy_value", "uplift", "mean_effect")]).all()


def test_outputs_are_read_in_the_outcomes_unit():
    read = effect.seen(10.0, 25.0)
    output, y = np.array([[0.0, 0.2, 0.0]], np.float32), np.array([[-0.4, 1.0]], np.float32)
    truth, said = read(output, y)
    assert truth == pytest.approx(np.array([[0.0, 1.0]]))
    assert said == pytest.approx(np.array([[10.0, 15.0, 0.5, 5.0]]))
    of_its_own = np.array([[0.0, 0.2, 0.0, -0.1]], np.float32)
    assert read(of_its_own, y)[1][0, 3] == pytest.approx(-2.5)


def test_the_gain_is_fitted_to_the_doubly_robust_effect_and_nothing_else_moves_for_it():
    output = torch.tensor([[0.1, 0.4, 0.0, 0.0], [0.1, 0.4, 0.0, 0.0]], requires_grad=True)
    target = torch.tensor([[1.0, 1.0], [-1.0, 0.0]])
    effects.doubly_robust(output, target).backward()
    assert output.grad is not None
    of_gain = output.grad[:, 3].clone()  # (gain - robust) / n, with robust 0.3 + (1 - 0.4) / .5, and 0.3 + 1.1 / .5
    assert of_gain == pytest.approx(-torch.tensor([0.3 + 1.2, 0.3 + 2.2]) / 2)
    arms = output.detach()[:, :3].clone().requires_grad_()
    losses.effect(arms, target).backward()
    assert torch.equal(output.grad[:, :3], arms.grad)
