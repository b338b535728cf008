"""Risk score on an EHR table: logistic regression or a multi-layer perceptron on encoded features."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from cloister_shared.noise import Entropy, gaussians
from cloister_shared.plan import StudyPlan
from cloister_shared.schema import columns

Float = TypeVar("Float", np.float32, np.float64)


GROUP = 8
"""Units that ``norm: group`` centres and scales together; plan_rules holds the widths to it."""

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


def model(plan: StudyPlan) -> nn.Module:
    """Layers ``hidden_i``, ``norm_i``, ``relu_i``, …, ``head``; one logit out. No hidden layer: logistic regression."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    width = len(columns(plan.table))
    for i, units in enumerate(plan.task.hidden):
        layers[f"hidden_{i}"] = StandardisedLinear(width, units) if plan.task.standardise else nn.Linear(width, units)
        if plan.task.norm != "none":
            layers[f"norm_{i}"] = _NORMS[plan.task.norm](units)
        layers[f"relu_{i}"] = nn.ReLU()
        width = units
    layers["head"] = nn.Linear(width, 1)
    return nn.Sequential(layers)


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean binary cross-entropy of the logits; shapes [n, 1] and [n]."""
    return functional.binary_cross_entropy_with_logits(output.squeeze(1), target)


def cost(output: NDArray[np.float32], target: NDArray[np.float32]) -> float:
    """The same in numpy."""
    logits = output[:, 0]
    return float(np.sum(np.logaddexp(0, logits) - target * logits)) / len(target)


def slope(output: NDArray[np.float32], target: NDArray[np.float32]) -> NDArray[np.float32]:
    """How the mean loss changes with each logit; shape [n, 1]."""
    return (_sigmoid(output) - target[:, None]) / np.float32(len(target))


def risk(output: Tensor) -> NDArray[np.float64]:
    """Predicted probabilities of the positive outcome, shape [n]."""
    return _sigmoid(output.numpy()[:, 0].astype(np.float64))


def augmentation(plan: StudyPlan) -> Callable[[Tensor, Entropy], Tensor]:
    """Gaussian jitter on the number inputs, shapes [n, inputs]; what is 0 or 1 by its meaning stays as it is."""
    everything, terms = columns(plan.table), plan.training.augment
    at = [i for i, column in enumerate(everything) if column.kind == "number" and not column.absent]
    jitter = terms.jitter if terms else 0.0

    def jittered(x: Tensor, entropy: Entropy) -> Tensor:
        changed = x.clone()
        if jitter and at:
            noise = gaussians(entropy, len(x) * len(at)).reshape(len(x), len(at))
            changed[:, at] += torch.from_numpy((jitter * noise).astype(np.float32))
        return changed

    return jittered


def _sigmoid(logits: NDArray[Float]) -> NDArray[Float]:
    return np.exp(-np.logaddexp(0, -logits))
