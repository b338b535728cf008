"""A model's shared parameters as one flat vector, in an order that both sides derive from the plan."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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


def tensors(model: nn.Module, entries: Entries) -> list[Tensor]:
    """The model's own parameters and buffers of those names; writing into them changes the model."""
    state = model.state_dict()
    return [state[name] for name, _ in entries]


def flatten(parts: Sequence[Tensor]) -> NDArray[np.float32]:
    """Tensors as one float32 vector, a copy."""
    return torch.cat([part.reshape(-1) for part in parts]).numpy() if parts else np.empty(0, dtype=np.float32)


@torch.no_grad()
def fill(parts: Sequence[Tensor], vector: NDArray[np.float32]) -> None:
    """Write a vector into the tensors that it was made of.

    Raises:
        ValueError: the vector has another length.
    """
    if vector.size != sum(part.numel() for part in parts):
        raise ValueError("the vector has another length than the model's parameters")
    # A writable copy: torch warns about the read-only bytes of a message.
    for part, values in zip(parts, split(torch.from_numpy(np.array(vector)), parts), strict=True):
        part.copy_(values)


def split(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A flat vector as tensors of these shapes."""
    parts = torch.split(vector, [part.numel() for part in like])
    return [part.view_as(shape) for part, shape in zip(parts, like, strict=True)]
