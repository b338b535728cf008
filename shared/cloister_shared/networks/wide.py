"""What makes thousands of measured inputs fit for one model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from cloister_shared.networks.dense import perceptron


class Bounded(nn.Module):
    """Each input held to so many standard deviations, and a record of ordinary inputs brought to length one.

    Without it a record's gradient, and so the clip and the learning rate that suit it, would grow with the number of
    inputs, and one broken reading would be most of it.
    """

    def __init__(self, inputs: int, most: float) -> None:
        super().__init__()
        self.most, self.scale = most, inputs**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """Shape [n, inputs] to the same."""
        return x.clamp(-self.most, self.most) * self.scale


def wide(inputs: int, hidden: Sequence[int], outputs: int, most: float) -> nn.Sequential:
    """A perceptron on bounded inputs."""
    dense = perceptron(inputs, hidden, outputs)
    layers: list[tuple[str, nn.Module]] = [("bounded", Bounded(inputs, most)), *dense.named_children()]
    return nn.Sequential(OrderedDict(layers))
