"""cloister_client.train and privacy.plain against a textbook loop, and by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from cloister_client.network import Network
from cloister_client.privacy import Mechanism, plain
from cloister_client.train import train
from cloister_shared.layout import initial_model
from cloister_shared.objective import objective_of


def textbook(x, y, w, b, *, batches, learning_rate, momentum=0.0):
    """Logistic regression by gradient descent, in NumPy and double precision."""
    parameters = np.append(w, b)
    velocity = np.zeros_like(parameters)
    inputs = np.column_stack([x, np.ones(len(x))])
    for batch in batches:
        risk = 1 / (1 + np.exp(-inputs[batch] @ parameters))
        gradient = inputs[batch].T @ (risk - y[batch]) / len(batch)
        velocity = momentum * velocity + gradient
        parameters = parameters - learning_rate * velocity
    return parameters


def batches_of(rows, size, steps, seed):
    """Shuffled epochs: each is dealt out to its end before the next is shuffled."""
    generator, dealt = torch.Generator().manual_seed(seed), []
    while len(dealt) < steps:
        dealt += torch.randperm(rows, generator=generator).split(size)
    return [batch.numpy() for batch in dealt[:steps]]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("size", [24, 7])
def test_plain_sgd_is_the_textbooks(plan_with, rows, momentum, size):
    plan = plan_with(training={"momentum": momentum, "batch_size": size})
    some, model = rows(), initial_model(plan)
    w, b = (parameter.detach().double().numpy().ravel() for parameter in model.parameters())
    expected = textbook(
        some.x.double().numpy(),
        some.y.double().numpy(),
        w,
        b,
        batches=batches_of(len(some), size, 11, seed=5),
        learning_rate=plan.training.learning_rate,
        momentum=momentum,
    )
    train(plain(Network(model, objective_of(plan)), some, size, torch.Generator().manual_seed(5)), plan.training, 11)
    found = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_an_epoch_holds_each_row_once_and_goes_on_over_steps(rows, recorder):
    some, task = rows(10), recorder()
    some = type(some)(some.x, torch.arange(10).float(), some.patients)
    mechanism = plain(Network(nn.Linear(3, 1), task), some, 4, torch.Generator().manual_seed(0))
    assert mechanism.event is None
    for _ in range(6):
        mechanism.gradient()
    assert [len(drawn) for drawn in task.drawn] == [4, 4, 2] * 2
    first, second = ([row for drawn in epoch for row in drawn] for epoch in (task.drawn[:3], task.drawn[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def one_weight(at: float) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, at)
    return model


def slope(model: nn.Linear, value: float):
    """A gradient that is the same everywhere."""

    def gradient() -> None:
        model.weight.grad = torch.full((1, 1), value)

    return Mechanism([model.weight], gradient, None)


def test_proximal_pull_by_hand(plan_with):
    """From 1: to 1 - .5 * 2 = 0, to 0 - .5 * (2 - .4 * 1) = -.8, to -.8 - .5 * (2 - .4 * 1.8) = -1.44."""
    model = one_weight(1.0)
    train(slope(model, 2.0), plan_with().training, 3, pull=0.4)
    assert model.weight.item() == pytest.approx(-1.44)


def test_correction_by_hand(plan_with):
    """w2 = 1 - .5 * (2 - 3) - .5 * (2 - 3) = 2"""
    model = one_weight(1.0)
    train(slope(model, 2.0), plan_with().training, 2, correction=[torch.tensor([[-3.0]])])
    assert model.weight.item() == pytest.approx(2.0)


def test_adam_takes_steps_of_the_learning_rate(plan_with):
    """Whatever the slope: its first steps are of length learning_rate."""
    plan = plan_with(training={"optimizer": "adam", "learning_rate": 0.01})
    model = one_weight(1.0)
    train(slope(model, 123.0), plan.training, 3)
    assert model.weight.item() == pytest.approx(1 - 3 * 0.01)


def test_parameters_without_gradient_stay(plan_with):
    first, second = one_weight(1.0), one_weight(1.0)
    model = nn.Sequential(first, second)

    def gradient() -> None:
        first.weight.grad = torch.ones(1, 1)

    mechanism = Mechanism(list(model.parameters()), gradient, None)
    train(mechanism, plan_with().training, 1, pull=1.0, correction=[torch.ones(1, 1), torch.ones(1, 1)])
    assert [first.weight.item(), second.weight.item()] == [0.0, 1.0]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torchs(plan_with, rows, momentum):
    """Our step without bookkeeping against torch.optim's, over the same batches."""
    plan = plan_with(training={"momentum": momentum, "learning_rate": 0.2})
    ours, theirs = initial_model(plan), initial_model(plan)
    some = rows(40)
    train(plain(Network(ours, objective_of(plan)), some, 8, torch.Generator().manual_seed(1)), plan.training, 12)
    mechanism = plain(Network(theirs, objective_of(plan)), some, 8, torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(mechanism.parameters, lr=0.2, momentum=momentum)
    for _ in range(12):
        mechanism.gradient()
        optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-6)
