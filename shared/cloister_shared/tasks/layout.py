"""A model's shared parameters as one flat vector, in an order that both sides derive from the plan."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cloister_shared.plan import StudyPlan
from cloister_shared.tasks.zoo import task_of


@dataclass(frozen=True)
class Layout:
    """Names and sizes of what is sent (``shared``) and of what stays at the hospital (``local``)."""

    shared: tuple[tuple[str, int], ...]
    local: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        """Parameters in the vector that travels."""
        return sum(size for _, size in self.shared)

    @cached_property
    def digest(self) -> str:
        """Names the order of parameters; two sides with another order must not add up their vectors."""
        return hashlib.sha256(repr(self.shared).encode()).hexdigest()[:16]


def layout_of(plan: StudyPlan, model: nn.Module) -> Layout:
    """Every floating-point parameter and buffer, split by the plan's ``local_layers``."""
    local = plan.personalisation.local_layers
    entries = [(name, value.numel()) for name, value in model.state_dict().items() if value.is_floating_point()]
    return Layout(
        shared=tuple(entry for entry in entries if not entry[0].startswith(local)) if local else tuple(entries),
        local=tuple(entry for entry in entries if entry[0].startswith(local)) if local else (),
    )


def initial_model(plan: StudyPlan) -> nn.Module:
    """The plan's untrained model: the same weights for the same seed, wherever it is made."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        return task_of(plan).model(plan)


def flatten(model: nn.Module, entries: tuple[tuple[str, int], ...]) -> NDArray[np.float32]:
    """Those parameters as one float32 vector, a copy."""
    state = model.state_dict()
    if not entries:
        return np.empty(0, dtype=np.float32)
    return torch.cat([state[name].detach().reshape(-1) for name, _ in entries]).numpy()


@torch.no_grad()
def fill(model: nn.Module, entries: tuple[tuple[str, int], ...], vector: NDArray[np.float32]) -> None:
    """Write a vector back into the model.

    Raises:
        ValueError: the vector has another length.
    """
    if vector.size != sum(size for _, size in entries):
        raise ValueError("the vector has another length than the model's parameters")
    state = model.state_dict()
    # A writable copy: torch warns about the read-only bytes of a message.
    for (name, _), part in zip(entries, split(torch.from_numpy(np.array(vector)), entries), strict=True):
        state[name].copy_(part.view_as(state[name]))


def split(vector: Tensor, entries: tuple[tuple[str, int], ...]) -> Iterator[Tensor]:
    """The parts of a flat vector, one for each entry."""
    return iter(torch.split(vector, [size for _, size in entries]))
