"""What each kind of outcome makes a network minimise: a mean over records, of which no two share anything."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of outputs and outcomes the mean over records, of which no two share anything, so that one can be clipped."""


def binary(output: Tensor, target: Tensor) -> Tensor:
    """Mean binary cross-entropy of the logits; shapes [n, 1] and [n]."""
    return functional.binary_cross_entropy_with_logits(output.squeeze(1), target)


def classes(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of the logits; shapes [n, classes] and [n], the number of each record's class."""
    return functional.cross_entropy(output, target.long())


def labels(output: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of each label's logit, summed over labels; shapes [n, labels]."""
    return functional.binary_cross_entropy_with_logits(output, target, reduction="none").sum(dim=1).mean()


def quantity(output: Tensor, target: Tensor) -> Tensor:
    """Half the mean squared error of the scaled quantity; shapes [n, 1] and [n]."""
    return (output.squeeze(1) - target).square().mean() / 2


def survival(output: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood of discrete-time hazards (Gensheimer and Narasimhan 2019); shapes [n, periods], [n, 2].

    A record's second number is whether the event came, its first the period in which it did, or, where it was not
    awaited, how many periods were outlived. Each record's part depends on no other record, as Cox's would.
    """
    period, came = target[:, 0], target[:, 1]
    each = functional.softplus(output)  # what outliving a period costs: -log(1 - hazard)
    outlived = torch.arange(output.shape[1], device=output.device) < period[:, None]
    at = period.long().clamp(max=output.shape[1] - 1)[:, None]
    event = functional.softplus(-output.gather(1, at)).squeeze(1)  # -log(hazard)
    return ((each * outlived).sum(dim=1) + came * event).mean()


def mask(output: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy and Dice loss (Milletari et al. 2016) of each record's picture; any shapes alike.

    Dice is of each record by itself: over a batch, one record would move another's part.
    """
    output, target = output.flatten(1), target.flatten(1)
    entropy = functional.binary_cross_entropy_with_logits(output, target, reduction="none").mean(dim=1)
    risk = torch.sigmoid(output)
    overlap = 2 * (risk * target).sum(dim=1) + 1
    return (entropy + 1 - overlap / (risk.sum(dim=1) + target.sum(dim=1) + 1)).mean()


def itself(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over what was measured; outputs [n, k], targets [n, k + 1]: the last number is the alarm's.

    What is NaN in the target was not measured.
    """
    inputs = target[:, :-1]
    known = ~inputs.isnan()
    squares = (output - inputs.nan_to_num()).square() * known
    return (squares.sum(dim=1) / known.sum(dim=1).clamp(min=1)).mean()


def effect(output: Tensor, target: Tensor) -> Tensor:
    """Squared error of the arm that the record was in, and cross-entropy of who was treated.

    Outputs [n, 3]: the outcome untreated and treated, both scaled, and the logit of being treated; targets [n, 2]:
    the scaled outcome and 1 for the treated.
    """
    said, treated = target[:, 0], target[:, 1]
    outcome = torch.where(treated > 0.5, output[:, 1], output[:, 0])
    propensity = functional.binary_cross_entropy_with_logits(output[:, 2], treated, reduction="none")
    return ((outcome - said).square() / 2 + propensity).mean()


LOSSES: dict[str, Loss] = {
    "binary": binary,
    "classes": classes,
    "labels": labels,
    "quantity": quantity,
    "survival": survival,
    "mask": mask,
    "itself": itself,
    "effect": effect,
}
"""By kind of outcome."""
