"""A model with its task: output and gradient. Linear layers with ReLU between them need no autograd.

On a small hospital's batch autograd's bookkeeping is most of the work. What such a network computes is a few matrix
products, and numpy does them on the very same weights, if the task knows its loss without torch. Any other network or
task is left to torch.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cloister_shared.layout import gathered
from cloister_shared.objective import Objective

Values = NDArray[np.float32]

AT_ONCE = 2**22
"""Numbers of records' inputs that go through a model at a time: 83 pictures of 224 x 224, or 4,000 small tables' rows
and more. Memory, not results."""

_QUIET = np.errstate(over="ignore", invalid="ignore")  # as torch: what is not finite is refused where it arrives


class Network:
    """A model whose parameters stay where they are: they may be written, not moved."""

    def __init__(self, model: nn.Module, objective: Objective, vector: Values | None = None) -> None:
        """``vector`` is where the whole model lives, if it was ``gathered``; a dense one is, here at the latest."""
        self.model, self.objective = model, objective
        own = [part for part in model.parameters() if part.requires_grad]
        self._dense = objective.outcome.dense if _is_dense(model) else None
        self.parameters: list[Tensor] = [*own]
        """What training changes, each with its gradient in ``grad``; of a dense network one vector."""
        if self._dense:
            if vector is None:
                vector = gathered(model, tuple((name, part.numel()) for name, part in model.named_parameters()))
            whole = torch.from_numpy(vector)
            whole.grad = gradient = torch.zeros_like(whole)
            self.parameters = [whole]
            views = [part.detach().numpy() for part in own]
            slots = [gradient.as_strided(part.size(), part.stride(), part.storage_offset()).numpy() for part in own]
            self._layers = list(zip(views[::2], views[1::2], slots[::2], slots[1::2], strict=True))

    @_QUIET
    def output(self, x: Tensor) -> Tensor:
        """What the model says of these rows when it is not in training."""
        if self._dense:
            return torch.from_numpy(self._forward(x.numpy())[-1])
        self.model.eval()
        with torch.no_grad():
            parts = x.split(rows_at_once(x.shape[1]))
            return self.model(x) if len(parts) == 1 else torch.cat([self.model(part) for part in parts])

    @_QUIET
    def loss(self, output: Tensor, y: Values) -> float:
        """The mean loss of what the model said."""
        if self._dense:
            return self._dense.cost(output.numpy(), y)
        return float(self.objective.loss(output, torch.from_numpy(y)))

    @_QUIET
    def backward(self, x: Values, y: Values) -> None:
        """Leave the gradient of the mean loss over these rows in the ``grad`` of ``parameters``."""
        if self._dense:
            *incoming, said = self._forward(x)
            slope = self._dense.slope(said, y)
            for (weight, _, weights, biases), came in zip(reversed(self._layers), reversed(incoming), strict=True):
                np.matmul(slope.T, came, out=weights)
                np.add.reduce(slope, out=biases)
                if came is not x:
                    slope = slope @ weight
                    slope *= came > 0
            return
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        self.objective.loss(self.model(torch.from_numpy(x)), torch.from_numpy(y)).backward()

    def _forward(self, x: Values) -> list[Values]:
        """What comes into each layer, and at the end the output."""
        values = [x]
        for weight, bias, *_ in self._layers:
            if values[-1] is not x:
                np.maximum(values[-1], 0, out=values[-1])
            values.append(values[-1] @ weight.T)
            values[-1] += bias
        return values


def rows_at_once(width: int) -> int:
    """How many rows of so many inputs."""
    return max(1, AT_ONCE // max(1, width))


def _is_dense(model: nn.Module) -> bool:
    """Whether it is Linear, ReLU, Linear, …, Linear, each with a bias and parameters of its own, all to be trained."""
    layers = list(model) if type(model) is nn.Sequential else []
    alternating = [type(layer) for layer in layers] == [nn.Linear, *[nn.ReLU, nn.Linear] * (len(layers) // 2)]
    return alternating and sum(part.requires_grad for part in model.parameters()) == len(layers) + 1
