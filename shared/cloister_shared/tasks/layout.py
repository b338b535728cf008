"""A model's shared parameters as one flat vector, in an order that both sides derive from the plan."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cloister_shared.plan import StudyPlan
from cloister_shared.tasks.zoo import task_of

Entries = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Layout:
    """Names and sizes of what is sent (``shared``) and of what stays at the hospital (``local``)."""

    shared: Entries
    local: Entries

    @cached_property
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


def gathered(model: nn.Module, entries: Entries) -> NDArray[np.float32]:
    """Move the model's parameters and buffers of those names into one vector, where the model lives from then on.

    Whatever writes into the vector changes the model, and the other way round.
    """
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    parts = [state[name] for name, _ in entries]
    vector = torch.cat([part.detach().reshape(-1) for part in parts]) if parts else torch.empty(0)
    for part, place in zip(parts, torch.split(vector, [size for _, size in entries]), strict=True):
        part.data = place.view_as(part)
    return vector.numpy()
