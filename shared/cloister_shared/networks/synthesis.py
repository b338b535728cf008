"""Networks that learn how a table's columns go together, and draw rows of their own.

Every column becomes one of a few values (a number the bin that it lies in), so that all kinds are learned alike: by
the log of the chance of each record's own values. It is a sum over one record, and so one clip bounds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from struct import pack

import torch
from torch import Tensor, nn
from torch.nn import functional

from cloister_shared.networks.losses import Loss


@dataclass(frozen=True)
class Part:
    """One feature, or whether it was missing: inputs ``start`` to ``start + columns``, as one of ``size`` values."""

    start: int
    columns: int
    size: int
    edges: tuple[float, ...] = ()
    """Between a number's bins, in inputs."""
    centres: tuple[float, ...] = ()
    """Of its bins."""


class Table(nn.Module):
    """What both networks share: inputs to values and back. Outputs: the expected inputs, the logits of all values."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.sizes = [part.size for part in parts]
        self.values = sum(self.sizes)

    def output(self, logits: Tensor, *more: Tensor) -> Tensor:
        """Shape [n, inputs + values + …]."""
        expected: list[Tensor] = []
        for part, own in zip(self.parts, apart(logits, self.sizes), strict=True):
            chance = own.softmax(dim=1)
            if part.centres:
                expected.append(chance @ torch.tensor(part.centres, device=chance.device)[:, None])
            else:
                expected.append(chance if part.columns > 1 else chance[:, 1:])
        return torch.cat([*expected, logits, *more], dim=1)


class Chain(Table):
    """Each column from those before it, by a multinomial logistic regression: every pair of columns has its weights.

    The likelihood is exact and each part of it convex, which training with much noise likes.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__(parts)
        before = accumulate(self.sizes, initial=1)
        self.heads = nn.ModuleList(
            nn.Linear(known, size, bias=False) for known, size in zip(before, self.sizes, strict=False)
        )
        for head in self.heads.parameters():
            nn.init.zeros_(head)

    def forward(self, x: Tensor) -> Tensor:
        """Shape [n, inputs] to [n, inputs + values]."""
        known = torch.cat([x.new_ones(len(x), 1), one_hot(self.parts, values_of(self.parts, x))], dim=1)
        ends = accumulate(self.sizes[:-1], initial=1)
        logits = [head(known[:, :end]) for head, end in zip(self.heads, ends, strict=True)]
        return self.output(torch.cat(logits, dim=1))

    @torch.no_grad()
    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """So many rows of values, int64 [count, parts]."""
        known, drawn = torch.ones(count, 1), list[Tensor]()
        for head, size in zip(self.heads, self.sizes, strict=True):
            drawn.append(_drawn(head(known), generator))
            known = torch.cat([known, functional.one_hot(drawn[-1], size).float()], dim=1)
        return torch.stack(drawn, dim=1)


class Autoencoder(Table):
    """A variational autoencoder (Kingma and Welling 2014) of one hidden layer on each side.

    Its noise is a function of the record and of the weights of the moment alone. What a generator would give in the
    order of a batch would change for everybody else where one record is left out, which no clip bounds.
    """

    def __init__(self, parts: Sequence[Part], latent: int, hidden: int) -> None:
        super().__init__(parts)
        self.latent = latent
        self.into = nn.Linear(self.values, hidden)
        self.code = nn.Linear(hidden, 2 * latent)
        self.out = nn.Linear(latent, hidden)
        self.head = nn.Linear(hidden, self.values)

    def forward(self, x: Tensor) -> Tensor:
        """Shape [n, inputs] to [n, inputs + values + 2 * latent]; the last are mean and log-variance of the code."""
        known = one_hot(self.parts, values_of(self.parts, x))
        mean, spread = apart(self.code(functional.relu(self.into(known))), [self.latent, self.latent])
        spread = spread.clamp(-8, 4)
        code = mean + (spread / 2).exp() * self._noise(known) if self.training else mean
        return self.output(self._logits(code), mean, spread)

    def _logits(self, code: Tensor) -> Tensor:
        return self.head(functional.relu(self.out(code)))

    @torch.no_grad()
    def _noise(self, known: Tensor) -> Tensor:
        """Standard normal numbers, [n, latent]: another draw for each record's values and each state of the weights."""
        moment = float(self.into.weight.detach().double().abs().sum())
        chance = torch.Generator().manual_seed(int.from_bytes(pack("<d", moment)) >> 1)
        directions = torch.randn(self.values, 2 * self.latent, dtype=torch.float64, generator=chance)
        even = (known.double() @ directions.to(known.device) * 1e4).remainder(1.0)
        radius, angle = apart(even, [self.latent, self.latent])
        normal = (-2 * radius.clamp(min=1e-12).log()).sqrt() * (2 * torch.pi * angle).cos()  # Box and Muller 1958
        return normal.to(known.dtype)

    @torch.no_grad()
    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """So many rows of values, int64 [count, parts]."""
        logits = self._logits(torch.randn(count, self.latent, generator=generator))
        return torch.stack([_drawn(own, generator) for own in apart(logits, self.sizes)], dim=1)


def apart(side_by_side: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Columns [n, sum of sizes] as one tensor for each size."""
    ends = accumulate(sizes, initial=0)
    return [side_by_side[:, start:end] for start, end in pairwise(ends)]


def values_of(parts: Sequence[Part], x: Tensor) -> Tensor:
    """Which value each part of these inputs has, int64 [n, parts]."""
    found: list[Tensor] = []
    for part in parts:
        own = x[:, part.start : part.start + part.columns]
        if part.centres:
            found.append(torch.bucketize(own[:, 0].contiguous(), torch.tensor(part.edges, device=x.device)))
        else:
            found.append(own.argmax(dim=1) if part.columns > 1 else (own[:, 0] > 0.5).long())
    return torch.stack(found, dim=1)


def one_hot(parts: Sequence[Part], values: Tensor) -> Tensor:
    """Shape [n, parts] to [n, values]."""
    each = [functional.one_hot(values[:, at], part.size) for at, part in enumerate(parts)]
    return torch.cat(each, dim=1).float()


def likelihood(parts: Sequence[Part], latent: int = 0) -> Loss:
    """Minus the log of the chance of each record's values; with ``latent``, an autoencoder's bound of it."""
    sizes = [part.size for part in parts]
    inputs, values = sum(part.columns for part in parts), sum(sizes)
    ends = list(accumulate([inputs, values, latent, latent] if latent else [inputs, values]))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        logits, *code = (output[:, start:end] for start, end in pairwise(ends))
        own = values_of(parts, target[:, :inputs])
        each = [
            functional.cross_entropy(said, own[:, at], reduction="none") for at, said in enumerate(apart(logits, sizes))
        ]
        cost = torch.stack(each).sum(dim=0)
        if code:
            mean, spread = code
            cost = cost + (mean.square() + spread.exp() - 1 - spread).sum(dim=1) / 2
        return cost.mean()

    return loss


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
