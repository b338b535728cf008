"""cloister_client.network against torch's autograd."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cloister_client.network import Network
from cloister_shared.networks.losses import binary
from cloister_shared.objective import Objective
from cloister_shared.outcomes.outcome import Outcome, outcome_of
from cloister_shared.schema import Schema

BINARY: Outcome = outcome_of(
    Schema.model_validate_json(
        '{"features": [{"name": "a", "kind": "boolean"}], "target": {"name": "b", "positive": 1, "negative": 0}}'
    )
)
assert BINARY.dense
DENSE = BINARY.dense
OBJECTIVE = Objective(binary, BINARY)

TIED = nn.Linear(3, 3)
OTHERS = {
    "one layer": nn.Linear(3, 1),
    "norm": nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 1)),
    "batch norm": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1)),
    "dropout": nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 1)),
    "another activation": nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)),
    "ReLU last": nn.Sequential(nn.Linear(3, 1), nn.ReLU()),
    "no bias": nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 1, bias=False)),
    "one layer twice": nn.Sequential(TIED, nn.ReLU(), TIED, nn.ReLU(), nn.Linear(3, 1)),
}
"""Networks that are not Linear with ReLU between."""


def dense(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
    for before, after in pairwise(widths[1:]):
        layers += [nn.ReLU(), nn.Linear(before, after)]
    return nn.Sequential(*layers)


def drawn(rows: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    return x, (torch.rand(rows, generator=generator) > 0.5).float()


def ours(model: nn.Module, x: Tensor, y: Tensor, objective: Objective = OBJECTIVE) -> list[Tensor]:
    torch.manual_seed(1)  # for dropout
    return gradient_of(Network(model, objective), x, y)


def gradient_of(network: Network, x: Tensor, y: Tensor) -> list[Tensor]:
    """One tensor for each of the model's parameters."""
    network.backward(x.numpy(), y.numpy())
    whole = torch.cat([parameter.grad.flatten() for parameter in network.parameters if parameter.grad is not None])
    like = list(network.model.parameters())
    parts = whole.split([parameter.numel() for parameter in like])
    return [part.view_as(parameter) for part, parameter in zip(parts, like, strict=True)]


def autograds(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    model.train()
    return list(torch.autograd.grad(binary(model(x), y), list(model.parameters())))


def judged(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(x)


@given(
    hidden=st.lists(st.integers(1, 9), max_size=3),
    width=st.integers(1, 6),
    rows=st.integers(1, 12),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1.0, 30.0, 1000.0]),  # the largest make logits that a naive sigmoid overflows on
)
@settings(deadline=None)
def test_output_and_gradient_are_autograds(hidden, width, rows, seed, scale):
    torch.manual_seed(seed)
    model = dense([width, *hidden, 1])
    x, y = drawn(rows, width, seed)
    torch.testing.assert_close(
        Network(model, OBJECTIVE).output(scale * x), judged(model, scale * x), rtol=1e-4, atol=1e-5 * scale
    )
    torch.testing.assert_close(ours(model, scale * x, y), autograds(model, scale * x, y), rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_network_is_torchs(name):
    model, (x, y) = OTHERS[name], drawn(8, 3, seed=2)
    torch.testing.assert_close(ours(model, x, y), autograds(model, x, y), rtol=0, atol=0)
    model.train()
    assert torch.equal(Network(model, OBJECTIVE).output(x), judged(model, x))


def test_a_task_without_slope_is_torchs():
    objective = Objective(binary, replace(BINARY, dense=None))
    model, (x, y) = dense([3, 4, 1]), drawn(8, 3, seed=2)
    torch.testing.assert_close(ours(model, x, y, objective), autograds(model, x, y), rtol=0, atol=0)
    assert torch.equal(Network(model, objective).output(x), judged(model, x))


@pytest.mark.parametrize("frozen", [0, 2])
def test_layers_that_stand_still_are_left_to_torch(frozen):
    model, (x, y) = dense([3, 4, 1]), drawn(8, 3, seed=2)
    model[frozen].requires_grad_(False)
    trained = [part for part in model.parameters() if part.requires_grad]
    network = Network(model, OBJECTIVE)
    assert list(network.parameters) == trained
    network.backward(x.numpy(), y.numpy())
    expected = torch.autograd.grad(binary(model(x), y), trained)
    for part, gradient in zip(network.parameters, expected, strict=True):
        torch.testing.assert_close(part.grad, gradient)
    assert torch.equal(network.output(x), judged(model, x))


def test_weights_that_change_are_seen():
    model, (x, y) = dense([3, 4, 1]), drawn(8, 3, seed=2)
    network = Network(model, OBJECTIVE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    torch.testing.assert_close(gradient_of(network, x, y), autograds(model, x, y))


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_an_odd_row_spoils_the_gradient_as_it_does_autograds(odd):
    model, (x, y) = dense([3, 4, 1]), drawn(8, 3, seed=2)
    x[5, 1] = odd
    for mine, theirs in zip(ours(model, x, y), autograds(model, x, y), strict=True):
        assert mine.isfinite().all() == theirs.isfinite().all()


def test_slope_is_the_losss_derivative():
    said = torch.linspace(-200, 200, 41).unsqueeze(1).requires_grad_()
    target = (torch.arange(41) % 2).float()
    (theirs,) = torch.autograd.grad(binary(said, target), said)
    found = DENSE.slope(said.detach().numpy(), target.numpy())
    torch.testing.assert_close(torch.from_numpy(found), theirs)


def test_cost_is_the_loss():
    said = torch.linspace(-200, 200, 41).unsqueeze(1)
    target = (torch.arange(41) % 2).float()
    assert DENSE.cost(said.numpy(), target.numpy()) == pytest.approx(float(binary(said, target)), rel=1e-6)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_an_odd_output_has_no_finite_loss(odd):
    said, target = torch.tensor([[0.0], [odd]]), torch.tensor([0.0, 0.0 if odd > 0 else 1.0])
    network = Network(dense([3, 4, 1]), OBJECTIVE)
    assert not math.isfinite(network.loss(said, target.numpy()))
    assert not math.isfinite(float(binary(said, target)))
