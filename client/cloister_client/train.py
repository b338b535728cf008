"""The local loop: some steps from the coordinator's model, by whatever gradient the mechanism makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cloister_client.privacy import Mechanism
from cloister_shared.plan import Training

Step = Callable[[], None]


def sgd(parameters: Sequence[Tensor], terms: Training) -> Step:
    """What torch.optim.SGD computes, without its bookkeeping, which takes longer than a small model's step."""
    values = [parameter.detach() for parameter in parameters]  # the same memory, which autograd does not watch
    velocity: dict[int, Tensor] = {}

    def step() -> None:
        for at, parameter in enumerate(parameters):
            if (move := parameter.grad) is None:
                continue
            if terms.momentum:
                move = velocity[at] = terms.momentum * velocity.get(at, 0.0) + move
            values[at].sub_(move, alpha=terms.learning_rate)

    return step


def adam(parameters: Sequence[Tensor], terms: Training) -> Step:
    """Kingma and Ba 2015, by torch.optim."""
    return torch.optim.Adam(parameters, lr=terms.learning_rate).step


OPTIMIZERS: dict[str, Callable[[Sequence[Tensor], Training], Step]] = {"sgd": sgd, "adam": adam}


def train(
    mechanism: Mechanism,
    terms: Training,
    steps: int,
    *,
    pull: float = 0.0,
    towards: Sequence[Tensor] | None = None,
    correction: list[Tensor] | None = None,
) -> None:
    """Take ``steps`` local steps in place.

    ``pull`` is FedProx's mu: each step is drawn back to where the round began, or ``towards`` other values that are
    shaped like the mechanism's parameters. ``correction`` is SCAFFOLD's
    c - c_i, one tensor for each of the mechanism's parameters. Both are added after the noise; neither looks at a row.
    """
    parameters = mechanism.parameters
    step = OPTIMIZERS[terms.optimizer](parameters, terms)
    began = towards or ([parameter.detach().clone() for parameter in parameters] if pull else [])
    for _ in range(steps):
        mechanism.gradient()
        for at, parameter in enumerate(parameters if pull or correction else ()):
            if parameter.grad is None:
                continue
            if pull:
                parameter.grad.add_(parameter.detach() - began[at], alpha=pull)
            if correction:
                parameter.grad.add_(correction[at])
        step()
