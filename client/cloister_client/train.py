"""The local loop: some steps from the coordinator's model, by whatever gradient the mechanism makes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cloister_client.privacy import Gradient
from cloister_shared.plan import Training

OPTIMIZERS: dict[str, Callable[[nn.Module, Training], torch.optim.Optimizer]] = {
    "sgd": lambda model, terms: torch.optim.SGD(
        model.parameters(), lr=terms.learning_rate, momentum=terms.momentum, foreach=False
    ),
    "adam": lambda model, terms: torch.optim.Adam(model.parameters(), lr=terms.learning_rate, foreach=False),
}


def train(
    model: nn.Module,
    gradient: Gradient,
    terms: Training,
    steps: int,
    *,
    pull: float = 0.0,
    correction: list[Tensor] | None = None,
) -> None:
    """Take ``steps`` local steps in place.

    ``pull`` is FedProx's mu: each step is drawn back to where the round began. ``correction`` is SCAFFOLD's
    c - c_i, one tensor for each parameter. Both are added after the noise; neither looks at a row.
    """
    optimizer = OPTIMIZERS[terms.optimizer](model, terms)
    parameters = list(model.parameters())
    began = [parameter.detach().clone() for parameter in parameters] if pull else []
    model.train()
    for _ in range(steps):
        gradient()
        with torch.no_grad():
            for at, parameter in enumerate(parameters):
                if parameter.grad is None:
                    continue
                if pull:
                    parameter.grad.add_(parameter - began[at], alpha=pull)
                if correction:
                    parameter.grad.add_(correction[at])
        optimizer.step()
