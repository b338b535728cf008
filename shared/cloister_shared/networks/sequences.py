"""Networks that read a series: measurements on a grid of steps, with a mask that says which were taken.

What a gap means is given, not learned: the last value is carried forward, beside it stand the mask and how long ago
that value was taken (Che et al. 2018). None of it has a parameter, and no record meets another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

HEADS = 4
"""Of the transformer's attention."""

SUMMARIES = 7
"""Numbers that ``summaries`` makes of one channel."""


@dataclass(frozen=True)
class Grid:
    """How a record's inputs lie: so many scalars, then steps of so many values and as many masks."""

    scalars: int
    steps: int
    channels: int

    def parted(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of [n, width] scalars [n, scalars], values and masks, both [n, steps, channels]."""
        grid: Tensor = x[:, self.scalars :].reshape(len(x), self.steps, 2 * self.channels)
        return x[:, : self.scalars], grid[..., : self.channels], grid[..., self.channels :]


class SeriesNetwork(nn.Module):
    """From [n, width] to outputs [n, outputs].

    A GRU or LSTM says its last state, a transformer the mean over its steps. ``head`` (or ``hidden`` before it) sees
    that beside the scalars and, if asked for, each channel's summaries.
    """

    def __init__(
        self,
        grid: Grid,
        outputs: int,
        model: Literal["gru", "lstm", "transformer"],
        units: int,
        depth: int = 1,
        summarise: bool = False,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.grid, self.summarise = grid, summarise
        self.encoder = encoder(model, 3 * grid.channels, grid.steps, units, depth)
        joined = units + grid.scalars + SUMMARIES * grid.channels * summarise
        self.hidden = nn.Linear(joined, hidden) if hidden else None
        self.head = nn.Linear(hidden or joined, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, hazards or whatever the loss makes of them."""
        scalars, values, taken = self.grid.parted(x)
        values = squashed(values)
        carried, since = carried_forward(values, taken)
        said = self.encoder(torch.cat([carried, taken, since], dim=2))
        parts = [said.mean(1) if isinstance(said, Tensor) else said[0][:, -1], scalars]
        if self.summarise:
            parts.append(summaries(values, taken, carried, since).flatten(1))
        joined = torch.cat(parts, dim=1)
        return self.head(joined if self.hidden is None else self.hidden(joined).relu())


def encoder(model: Literal["gru", "lstm", "transformer"], inputs: int, steps: int, units: int, depth: int) -> nn.Module:
    """From [n, steps, inputs]: a recurrent one says torch's pair, a transformer [n, steps, units]."""
    match model:
        case "gru":
            return nn.GRU(inputs, units, num_layers=depth, batch_first=True)
        case "lstm":
            return nn.LSTM(inputs, units, num_layers=depth, batch_first=True)
        case "transformer":
            return Transformer(inputs, steps, units, depth)


class Transformer(nn.Module):
    """Pre-norm attention over all steps (Xiong et al. 2020), [n, steps, inputs] to [n, steps, units]."""

    def __init__(self, inputs: int, steps: int, units: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, units)
        self.blocks = nn.ModuleList(Block(units) for _ in range(layers))
        self.norm = nn.LayerNorm(units)
        self.positions = waves(steps, units)  # no buffer: under privacy those are taken for statistics of rows

    def forward(self, x: Tensor) -> Tensor:
        """What each step is, having seen the others."""
        x = self.embed(x) + self.positions.to(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Block(nn.Module):
    """Attention and two dense layers, each added to what came in."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(units)
        self.attend = nn.MultiheadAttention(units, HEADS, batch_first=True)
        self.norm_out = nn.LayerNorm(units)
        self.widen = nn.Linear(units, 2 * units)
        self.narrow = nn.Linear(2 * units, units)

    def forward(self, x: Tensor) -> Tensor:
        """Shape [n, steps, units]."""
        seen = self.norm_in(x)
        x = x + self.attend(seen, seen, seen, need_weights=False)[0]
        return x + self.narrow(self.widen(self.norm_out(x)).relu())


# --- what needs no parameter ---------------------------------------------------------------------------------
def squashed(values: Tensor) -> Tensor:
    """Signed logarithm: what is far out counts as far, and drowns nothing else."""
    return values.sign() * values.abs().log1p()


def carried_forward(values: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
    """Of [n, steps, channels] the last value taken up to each step, 0 before the first, and how long ago it was.

    The time is log(1 + steps) over that of the whole series, so that it lies in [0, 1]; 1 where nothing was taken yet.
    """
    steps = values.shape[1]
    at = torch.arange(steps, device=values.device)[None, :, None]
    last = torch.where(taken > 0, at, -1).cummax(dim=1).values
    carried = values.gather(1, last.clamp(min=0)) * (last >= 0)
    since = (at - last).to(values.dtype).log1p() / math.log1p(steps)
    return carried, torch.where(last >= 0, since, torch.ones_like(since))


def summaries(values: Tensor, taken: Tensor, carried: Tensor, since: Tensor) -> Tensor:
    """Of each channel first, last, mean, least, most, how often taken, how long ago: [n, 7, channels]; 0 for never."""
    often = taken.sum(1)
    ever = often > 0
    first = values.gather(1, taken.argmax(dim=1, keepdim=True)).squeeze(1)
    mean = (values * taken).sum(1) / often.clamp(min=1)
    least = values.masked_fill(taken == 0, math.inf).amin(1).masked_fill(~ever, 0)
    most = values.masked_fill(taken == 0, -math.inf).amax(1).masked_fill(~ever, 0)
    count = often.log1p() / math.log1p(values.shape[1])
    return torch.stack([first * ever, carried[:, -1], mean, least, most, count, since[:, -1]], dim=1)


def waves(steps: int, units: int) -> Tensor:
    """Where a step is, [steps, units], by sines and cosines of falling frequency (Vaswani et al. 2017)."""
    at = torch.arange(steps, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, units, 2, dtype=torch.float32) * (-math.log(10_000.0) / units))
    return torch.cat([(at * rate).sin(), (at * rate).cos()], dim=1)[:, :units]
