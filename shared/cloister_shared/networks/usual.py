"""Networks that learn what is usual of a series, and from how far off on it is an alarm.

Outputs are [n, width + 1]: what each input should have been (0 for masks, which nobody predicts), and last the
logarithm of the error from which on a record raises an alarm.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from cloister_shared.networks.dense import perceptron
from cloister_shared.networks.losses import Loss, itself
from cloister_shared.networks.sequences import Grid, carried_forward

PACE = 5.0
"""How much faster the threshold goes than a weight, by the same step and for the same part in a clip: errors of
series differ by powers of ten, and where they lie nobody knows before."""

TINY = 1e-6
"""An error below this counts as this, so that it has a logarithm."""


class UsualNetwork(nn.Module):
    """What is ``expected`` of the values, and the ``threshold``, a single number that every record is given."""

    def __init__(self, grid: Grid, expected: nn.Module) -> None:
        super().__init__()
        self.grid, self.expected = grid, expected
        self.threshold = nn.Embedding(1, 1)  # a lookup, since each record's part of its gradient is known
        nn.init.zeros_(self.threshold.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Shape [n, width] to [n, width + 1]."""
        _, values, taken = self.grid.parted(x)
        expected = self.expected(values, taken)
        whole = torch.cat([expected, torch.zeros_like(expected)], dim=2).flatten(1)
        return torch.cat([whole, PACE * self.threshold(x.new_zeros(len(x), dtype=torch.int64))], dim=1)


class Autoencoder(nn.Module):
    """All values through few units and back (Sakurada and Yairi 2014)."""

    def __init__(self, grid: Grid, units: int) -> None:
        super().__init__()
        self.grid = grid
        self.encoder = perceptron(2 * grid.steps * grid.channels, (4 * units,), units)
        self.decoder = perceptron(units, (4 * units,), grid.steps * grid.channels)

    def forward(self, values: Tensor, taken: Tensor) -> Tensor:
        """Both [n, steps, channels]; what the values were."""
        code = self.encoder(torch.cat([values, taken], dim=2).flatten(1))
        return self.decoder(code.relu()).unflatten(1, (self.grid.steps, self.grid.channels))


class Forecaster(nn.Module):
    """Each step's values from the steps before it; of the first what is usual at all."""

    def __init__(self, grid: Grid, units: int) -> None:
        super().__init__()
        self.encoder = nn.GRU(3 * grid.channels, units, batch_first=True)
        self.head = nn.Linear(units + grid.channels, grid.channels)

    def forward(self, values: Tensor, taken: Tensor) -> Tensor:
        """Both [n, steps, channels]; what the values should be."""
        carried, since = carried_forward(values, taken)
        said, _ = self.encoder(torch.cat([carried, taken, since], dim=2))
        known = torch.cat([said, carried], dim=2)[:, :-1]  # the last value is the best first guess of the next
        return self.head(functional.pad(known, (0, 0, 1, 0)))


def usual(grid: Grid, model: Literal["autoencoder", "forecast"], units: int) -> UsualNetwork:
    """The network of that name."""
    return UsualNetwork(grid, Autoencoder(grid, units) if model == "autoencoder" else Forecaster(grid, units))


def loss_with_alarm(share: float) -> Loss:
    """Mean squared error, and for the threshold the pinball loss (Koenker and Bassett 1978) of its logarithm.

    The latter's least value is where ``share`` of the errors lie above the threshold. It moves the threshold alone and
    is a mean over records like any loss, so that alarms are calibrated by the same rounds, clips and sums.
    """

    def loss(output: Tensor, target: Tensor) -> Tensor:
        said, threshold = output[:, :-1], output[:, -1]
        known = ~target[:, :-1].isnan()
        squares = (said - target[:, :-1].nan_to_num()).square() * known
        error = squares.sum(dim=1) / known.sum(dim=1).clamp(min=1)
        above = error.detach().clamp(min=TINY).log() - threshold
        return itself(said, target) + torch.maximum((1 - share) * above, -share * above).mean() / PACE

    return loss
