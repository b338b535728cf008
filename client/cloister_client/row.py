"""Book-keeping of a model that is a row of torch's own layers, one after the other.

On a small hospital's batch autograd takes longer to keep its own books than to multiply. A row's first Linear layers
with ReLU between them need none: what was asked of one follows from what was asked of the next. The rest goes by the
tape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from cloister_client.bookkeeping import Forward, Tape, steps
from cloister_client.norms import Outer, Use

Places = tuple[tuple[int, torch.Size], ...]


@dataclass(frozen=True)
class Hidden:
    """A trained Linear layer with ReLU after it, and then another one, whose weight is ``after``."""

    weight: Tensor
    bias: Tensor | None
    after: Tensor
    weights: Places
    biases: Places


class Row:
    """The passes of such a model; none of its layers' trained parameters is used elsewhere."""

    def __init__(self, model: nn.Module, tape: Tape, forwards: Mapping[nn.Module, Forward]) -> None:
        self._tape, layers = tape, list(model.children())
        self._hidden = list(_hidden(layers, tape))
        self._rest: list[Forward] = [forwards.get(layer, layer) for layer in layers[2 * len(self._hidden) :]]

    def uses(self, x: Tensor, objective: Callable[[Tensor], Tensor]) -> list[Use]:
        """What the objective, a number made from the model's output, asks of the trained parameters."""
        values = [x]
        for layer in self._hidden:
            values.append(functional.linear(values[-1], layer.weight, layer.bias).relu_())
        said = values[-1]
        self._tape.start(x.shape[0])
        with torch.enable_grad():
            for step in self._rest:
                said = step(said)
            value = objective(said)
        uses = self._tape.uses(value)
        return [*uses, *self._before(uses[0], values)] if self._hidden and uses else uses

    def _before(self, use: Use, values: list[Tensor]) -> Iterator[Use]:
        """Uses of the hidden layers, from ``use`` of the layer after them back to the first. Gives ``values`` away."""
        assert isinstance(use, Outer)
        asked = use.asked
        for layer in reversed(self._hidden):
            asked = torch.ops.aten.threshold_backward(asked @ layer.after, steps(values.pop()), 0)
            yield Outer(steps(values[-1]), asked, layer.weights, layer.biases)


def is_row(model: nn.Module) -> bool:
    """Whether it is torch's own layers one after the other, so that no pass uses a parameter otherwise than another."""
    own = "torch.nn.modules."
    return (
        type(model) is nn.Sequential
        and not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())
        and all(type(layer).__module__.startswith(own) and next(layer.children(), None) is None for layer in model)
        and not any("forward" in vars(layer) for layer in model)
    )


def _hidden(layers: Sequence[nn.Module], tape: Tape) -> Iterator[Hidden]:
    for linear, relu, after in zip(layers[::2], layers[1::2], layers[2::2], strict=False):
        if type(linear) is not nn.Linear or type(relu) is not nn.ReLU or type(after) is not nn.Linear:
            return
        weights = tape.at(linear.weight)
        if not (weights and tape.at(after.weight)):
            return
        yield Hidden(linear.weight, linear.bias, after.weight, weights, tape.at(linear.bias))
