"""A model with its task: output and gradient. Linear layers with ReLU between them need no autograd.

On a small hospital's batch autograd's bookkeeping is most of the work. What such a network computes is a few matrix
products, and numpy does them on the very same weights, if the task says how its loss changes. Any other network or
task is left to torch.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cloister_shared.tasks.zoo import Sloped, Task

Values = NDArray[np.float32]

_QUIET = np.errstate(over="ignore", invalid="ignore")  # as torch: what is not finite is refused where it arrives


class Network:
    """A model whose parameters stay where they are: they may be written, not moved."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        self.model, self.task, self.parameters = model, task, list(model.parameters())
        self._slope = task.slope if isinstance(task, Sloped) and _is_dense(model) else None
        views = [parameter.detach().numpy() for parameter in self.parameters] if self._slope else []
        self._layers = list(zip(views[::2], views[1::2], strict=True))  # weight and bias of each

    def output(self, x: Tensor) -> Tensor:
        """What the model says of these rows when it is not in training."""
        if self._slope:
            return torch.from_numpy(self._forward(x.numpy())[-1])
        self.model.eval()
        with torch.no_grad():
            return self.model(x)

    def backward(self, x: Tensor, y: Tensor) -> None:
        """Leave the gradient of the mean loss over these rows in each parameter's ``grad``."""
        if self._slope:
            *incoming, said = self._forward(x.numpy())
            gradients = self._gradients(incoming, self._slope(said, y.numpy()))
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = torch.from_numpy(gradient)
            return
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        self.task.loss(self.model(x), y).backward()

    @_QUIET
    def _gradients(self, incoming: list[Values], slope: Values) -> list[Values]:
        found = list[Values]()
        for (weight, _), came in zip(reversed(self._layers), reversed(incoming), strict=True):
            found[:0] = slope.T @ came, slope.sum(axis=0)
            if came is not incoming[0]:
                slope = np.where(came <= 0, 0, slope @ weight)
        return found

    @_QUIET
    def _forward(self, x: Values) -> list[Values]:
        """What comes into each layer, and at the end the output."""
        values = [x]
        for weight, bias in self._layers:
            if values[-1] is not x:
                values[-1] = np.maximum(values[-1], 0)
            values.append(values[-1] @ weight.T + bias)
        return values


def _is_dense(model: nn.Module) -> bool:
    """Whether it is Linear, ReLU, Linear, …, Linear, each with a bias and parameters of its own."""
    layers = list(model) if type(model) is nn.Sequential else []
    alternating = [type(layer) for layer in layers] == [nn.Linear, *[nn.ReLU, nn.Linear] * (len(layers) // 2)]
    return alternating and len(list(model.parameters())) == len(layers) + 1
