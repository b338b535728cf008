"""A network's output and gradient; Linear layers with ReLU between them need no autograd.

On a small hospital's batch autograd's bookkeeping is most of the work. What such a network computes is a few matrix
products, and numpy does them on the very same weights. Any other network is left to torch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cloister_shared.tasks.zoo import Task

Values = NDArray[np.float32]
Weights = list[tuple[Values, Values]]
"""Weight and bias of each Linear layer: views of the parameters, so what changes these changes those."""

_QUIET = np.errstate(over="ignore", invalid="ignore")  # as torch: what is not finite is refused where it arrives


def output(model: nn.Module, x: Tensor) -> Tensor:
    """What the model says of these rows when it is not in training."""
    if weights := _dense(model):
        return torch.from_numpy(_forward(weights, x.numpy())[-1])
    model.eval()
    with torch.no_grad():
        return model(x)


def backward_of(model: nn.Module, task: Task) -> Callable[[Tensor, Tensor], None]:
    """What leaves the gradient of the mean loss over given rows in each parameter's ``grad``."""
    weights, parameters = _dense(model), list(model.parameters())

    @_QUIET
    def by_hand(x: Tensor, y: Tensor) -> None:
        *incoming, said = _forward(weights, x.numpy())
        slope = task.slope(said, y.numpy())
        gradients: list[Values] = []  # from the last to the first
        for (weight, _), came in zip(reversed(weights), reversed(incoming), strict=True):
            gradients += [slope.sum(axis=0), slope.T @ came]
            if came is not incoming[0]:
                slope = np.where(came <= 0, 0, slope @ weight)
        for parameter, gradient in zip(reversed(parameters), gradients, strict=True):
            parameter.grad = torch.from_numpy(gradient)

    def by_autograd(x: Tensor, y: Tensor) -> None:
        model.train()
        model.zero_grad(set_to_none=True)
        task.loss(model(x), y).backward()

    return by_hand if weights else by_autograd


def _dense(model: nn.Module) -> Weights:
    """The weights of a network that is Linear, ReLU, Linear, …, Linear; none of another one."""
    layers = list(model) if type(model) is nn.Sequential else []
    if [type(layer) for layer in layers] != [nn.Linear, *[nn.ReLU, nn.Linear] * (len(layers) // 2)]:
        return []
    parameters = [parameter.detach().numpy() for parameter in model.parameters()]
    if len(parameters) != len(layers) + 1:
        return []  # a bias is missing, or a layer stands twice
    return list(zip(parameters[::2], parameters[1::2], strict=True))


@_QUIET
def _forward(weights: Weights, x: Values) -> list[Values]:
    """What comes into each layer, and at the end the output."""
    values = [x]
    for weight, bias in weights:
        came = values[-1]
        if came is not x:
            came = values[-1] = np.maximum(came, 0)
        values.append(came @ weight.T + bias)
    return values
