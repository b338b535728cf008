"""Proportional hazards: one risk a record, and the event's chance in each period for a record of average risk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cloister_shared.networks.dense import perceptron
from cloister_shared.networks.losses import survival


class ProportionalHazards(nn.Module):
    """Outputs [n, periods + 1]: the logit of each period's hazard, and the log of the risk that all of them share.

    Of a record with log-risk r the hazard of period k is 1 - exp(-exp(a_k + r)) (Prentice and Gloeckler 1978), so that
    what is said can be judged like any survival curve. No gradient of the curve reaches r, which Cox's loss alone
    moves.
    """

    def __init__(self, inputs: int, hidden: Sequence[int], periods: int) -> None:
        super().__init__()
        self.risk = perceptron(inputs, hidden, 1)
        self.baseline = nn.Parameter(torch.full((periods,), -3.0))

    def forward(self, x: Tensor) -> Tensor:
        """Of inputs [n, width]."""
        risk = self.risk(x)
        hazard = (self.baseline + risk.detach()).clamp(-30, 3).exp()
        return torch.cat([hazard.expm1().log(), risk], dim=1)


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Cox's (1972) partial likelihood within the batch, ties as Breslow's; and the periods' likelihood for the curve.

    Whoever is still at risk is in the denominator of everyone who had the event before: NO mean over records.
    """
    risk, came, time = output[:, -1], target[:, 1], target[:, 2]
    order = torch.argsort(time, descending=True, stable=True)
    risk, came, time = risk[order], came[order], time[order]
    last = torch.searchsorted(-time, -time, right=True) - 1  # of those who have the same time
    at_risk = torch.logcumsumexp(risk, dim=0)[last]
    partial = ((at_risk - risk) * came).sum() / came.sum().clamp(min=1)
    return partial + survival(output[:, :-1], target)
