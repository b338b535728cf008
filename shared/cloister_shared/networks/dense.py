"""Dense layers one after the other."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

GROUP = 8
"""Units that one group holds."""

_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "group": lambda units: nn.GroupNorm(units // GROUP, units),
    "batch": nn.BatchNorm1d,
}


class StandardisedLinear(nn.Linear):
    """A linear layer whose units' incoming weights are centred and brought to length one before use.

    Qiao et al. 2019, scaled by the number of inputs as Brock et al. 2021 do, so that inputs of variance one give
    outputs of variance one. The parameters, and so what is sent and clipped, are the weights as they were.
    """

    def forward(self, input: Tensor) -> Tensor:  # torch's own name for it
        """Shape [n, inputs] to [n, units]."""
        centred = self.weight - self.weight.mean(dim=1, keepdim=True)
        length = centred.square().sum(dim=1, keepdim=True)
        return functional.linear(input, centred * torch.rsqrt(length.clamp(min=1e-6)), self.bias)


def perceptron(
    inputs: int, hidden: Sequence[int], outputs: int, norm: str = "none", standardise: bool = False
) -> nn.Sequential:
    """Layers ``hidden_i``, ``norm_i``, ``relu_i``, …, ``head``. No hidden layer: linear regression."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, units in enumerate(hidden):
        layers[f"hidden_{i}"] = StandardisedLinear(inputs, units) if standardise else nn.Linear(inputs, units)
        if norm != "none":
            layers[f"norm_{i}"] = _NORMS[norm](units)
        layers[f"relu_{i}"] = nn.ReLU()
        inputs = units
    layers["head"] = nn.Linear(inputs, outputs)
    return nn.Sequential(layers)
