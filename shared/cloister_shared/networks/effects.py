"""What a treatment changes: outcome of either arm, chance of treatment, and the effect itself, from one record."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cloister_shared.networks.dense import perceptron
from cloister_shared.networks.losses import effect
from cloister_shared.outcomes.effect import OVERLAP


class Arms(nn.Module):
    """Networks side by side, each with layers of its own: ``untreated``, ``treated``, ``chance`` and maybe ``gain``.

    The chance of treatment gets a linear network: it is what decides who can be compared, and a flexible one that
    follows single patients would say that few can.
    """

    def __init__(self, inputs: int, hidden: Sequence[int], gain: bool) -> None:
        super().__init__()
        self.untreated = perceptron(inputs, hidden, 1)
        self.treated = perceptron(inputs, hidden, 1)
        self.chance = perceptron(inputs, (), 1)
        if gain:
            self.gain = perceptron(inputs, hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs [n, width] to [n, 3]: both scaled outcomes, the logit of treatment; with ``gain`` [n, 4]."""
        return torch.cat([arm(x) for arm in self.children()], dim=1)


def doubly_robust(output: Tensor, target: Tensor) -> Tensor:
    """The loss of both arms and the chance, and the squared error of the gain (Kennedy 2023, the DR-learner).

    The gain is regressed on each record's doubly robust effect, made from what the other heads say of that very record
    and held still, so that no gradient of it reaches them. Outputs [n, 4], targets [n, 2]: each record's part depends
    on no other record, and one clip covers all four heads. Kennedy fits the first three on other patients than the
    gain; here all are moved by one stream of samples, and what guards against following single patients is the noise,
    or with none the size of the network.
    """
    said, treated = target[:, 0], target[:, 1]
    without, given = output[:, 0].detach(), output[:, 1].detach()
    chance = torch.sigmoid(output[:, 2].detach()).clamp(*OVERLAP)
    robust = given - without + treated * (said - given) / chance - (1 - treated) * (said - without) / (1 - chance)
    return effect(output[:, :3], target) + (output[:, 3] - robust).square().mean() / 2
