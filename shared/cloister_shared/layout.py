"""A model's shared parameters as one flat vector, in an order that both sides derive from the plan."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from cloister_shared.errors import WeightsBroken
from cloister_shared.plan import StudyPlan
from cloister_shared.tasks.task import Pretrained

Entries = tuple[tuple[str, int], ...]

PRETRAINED = "pretrained.safetensors"
"""Public weights, in a hospital's folder and in the coordinator's."""


@dataclass(frozen=True)
class Layout:
    """Names and sizes of what is sent (``shared``) and of what stays at the hospital (``local``).

    A frozen layer is neither: it is the same everywhere, and stays so.
    """

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
    """Every floating-point parameter and buffer that is not frozen, split by the plan's ``local_layers``."""
    local, state = plan.personalisation.local_layers, model.state_dict()
    entries = [
        (name, value.numel())
        for name, value in state.items()
        if value.is_floating_point() and not name.startswith(plan.frozen)
    ]
    return Layout(
        shared=tuple(entry for entry in entries if not entry[0].startswith(local)),
        local=tuple(entry for entry in entries if entry[0].startswith(local)),
    )


def untrained(plan: StudyPlan) -> nn.Module:
    """The plan's model with the seed's weights, wherever it is made; frozen layers ask for no gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        model = plan.task.network(plan.table)
    for name, part in model.named_parameters():
        part.requires_grad_(not name.startswith(plan.frozen))
    return model


def initial_model(plan: StudyPlan, folder: Path | None = None) -> nn.Module:
    """What training begins from: the seed's weights, or the public ones in ``folder`` if the plan names some.

    Raises:
        WeightsBroken: the file is missing, is not the one that the plan names, or does not fit the model.
    """
    model = untrained(plan)
    if terms := plan.task.pretrained:
        _load_public(model, terms, folder)
    return model


def _load_public(model: nn.Module, terms: Pretrained, folder: Path | None) -> None:
    mend = f"Put the file with SHA-256 {terms.sha256} there, as {PRETRAINED}."
    try:
        written = (folder / PRETRAINED).read_bytes() if folder else None
    except OSError:
        written = None
    if written is None:
        raise WeightsBroken(f"The plan's public weights cannot be read in {folder or 'any folder'}.", mend=mend)
    if (found := hashlib.sha256(written).hexdigest()) != terms.sha256:  # of the very bytes that are used
        raise WeightsBroken(f"{PRETRAINED} in {folder} is not what the plan names: its SHA-256 is {found}.", mend=mend)
    mend = "Have a plan approved that names weights of its own model."
    try:
        weights = load(written)
    except SafetensorError as error:
        raise WeightsBroken(f"{PRETRAINED} in {folder} is no safetensors file.", mend=mend) from error
    state = model.state_dict()
    for name, weight in weights.items():
        if name not in state or weight.shape != state[name].shape or weight.dtype != state[name].dtype:
            raise WeightsBroken(f"{PRETRAINED} has {name}, which does not fit the plan's model.", mend=mend)
        if not weight.isfinite().all():
            raise WeightsBroken(f"{PRETRAINED} has a number in {name} that is not finite.", mend=mend)
    if absent := [name for name in state if name.startswith(terms.frozen) and name not in weights]:
        raise WeightsBroken(f"{PRETRAINED} lacks {absent[0]}, which the plan freezes.", mend=mend)
    model.load_state_dict(weights, strict=False)


def trained(plan: StudyPlan, vector: NDArray[np.float32], folder: Path | None = None) -> nn.Module:
    """The model that a study's vector stands for; layers that stay at hospitals are as they began.

    Raises:
        WeightsBroken: the plan's public weights cannot be used, or the vector is of another model.
    """
    model = initial_model(plan, folder)
    layout = layout_of(plan, model)
    if vector.size != layout.size:
        raise WeightsBroken(f"The vector has {vector.size} numbers, and the plan's model {layout.size}.")
    gathered(model, layout.shared)[:] = vector
    return model.eval()


def weights_of(model: nn.Module, without: Entries = ()) -> dict[str, NDArray[np.float32]]:
    """Parameters and floating-point buffers by name, but for those named."""
    left_out = {name for name, _ in without}
    state: dict[str, Tensor] = model.state_dict()
    return {
        name: np.ascontiguousarray(value.numpy())
        for name, value in state.items()
        if value.is_floating_point() and name not in left_out
    }


def with_weights(plan: StudyPlan, weights: Mapping[str, NDArray[np.float32]]) -> nn.Module:
    """The plan's model with these weights; what they do not name is the seed's.

    Raises:
        WeightsBroken: one of them does not fit the plan's model.
    """
    model = untrained(plan)
    state: dict[str, Tensor] = model.state_dict()
    for name, weight in weights.items():
        if name not in state or weight.shape != tuple(state[name].shape) or not np.isfinite(weight).all():
            raise WeightsBroken(f"The model's file has {name}, which does not fit the plan's model.")
        state[name].copy_(torch.from_numpy(weight))
    return model.eval()


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
