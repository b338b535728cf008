"""A network that passes messages along the bonds of a molecule's graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cloister_shared.schema import ATOM

BONDS = (1.0, 2.0, 3.0, 1.5)
"""Orders of a bond: single, double, triple, aromatic."""


class MessagePassing(nn.Module):
    """Gilmer et al. 2017, with one linear map for each kind of bond; [n, atoms * (32 + atoms)] to [n, outputs].

    Each atom's state is added to by what its neighbours say along each kind of bond. The molecule is the sum and the
    largest of its atoms' states. Every layer sees the molecules as its first dimension, so that one can be clipped.
    """

    def __init__(self, atoms: int, width: int, steps: int, outputs: int) -> None:
        super().__init__()
        self.atoms = atoms
        self.enter = nn.Linear(ATOM, width)
        self.own = nn.ModuleList(nn.Linear(width, width) for _ in range(steps))
        self.heard = nn.ModuleList(nn.Linear(width, len(BONDS) * width, bias=False) for _ in range(steps))
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(steps))
        self.join = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Places without an atom say and hear nothing."""
        graph = x.reshape(len(x), self.atoms, ATOM + self.atoms)
        features, orders = graph[..., :ATOM], graph[..., ATOM:]
        there = features[..., :1]
        bonds = torch.stack([(orders == order).to(x.dtype) for order in BONDS], dim=1)  # [n, kinds, atoms, atoms]
        state = functional.relu(self.enter(features)) * there
        for own, heard, norm in zip(self.own, self.heard, self.norm, strict=True):
            said = heard(state).unflatten(2, (len(BONDS), -1)).transpose(1, 2)  # [n, kinds, atoms, width]
            state = state + functional.relu(norm(own(state) + (bonds @ said).sum(dim=1))) * there
        whole = torch.cat([state.sum(dim=1) / self.atoms**0.5, (state * there).amax(dim=1)], dim=1)
        return self.head(functional.relu(self.join(whole)))
