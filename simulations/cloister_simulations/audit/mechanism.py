"""The mechanism under audit, and four bugs to plant in it, each of which has been met in a real system.

Everything that knows how ``cloister_client.privacy`` is called stands in ``real`` and ``allowing_statistics``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum

import numpy as np
import torch
from scipy.optimize import brentq
from torch import nn

from cloister_client import privacy
from cloister_client.dataset import Rows
from cloister_client.privacy import Mechanism
from cloister_shared.budget import Event, pld_epsilon
from cloister_shared.charges import promise, training_event
from cloister_shared.noise import Entropy, reproducible
from cloister_shared.objective import objective_of
from cloister_shared.plan import StudyPlan

Build = Callable[[nn.Module, Rows, StudyPlan, Event, Entropy], Mechanism]
"""Makes the gradient of a model on some rows. The event is what the run claims to be."""


class Plant(StrEnum):
    """A bug to plant."""

    NOISE = "noise"
    TWICE = "twice"
    SHUFFLED = "shuffled"
    BATCHNORM = "batchnorm"


def claim(plan: StudyPlan, rows: int) -> Event:
    """A run whose epsilon is the plan's and no less, all of its steps in one event.

    Its noise is priced by privacy loss distributions, which are exact. The platform itself prices by Rényi DP, which
    holds for studies chosen one after another and asks for some 9 % more noise; the bound on a mechanism that is
    safer than it says would tell less of its bugs.
    """
    epsilon, delta = promise(plan)
    wide = training_event(plan, rows)
    whole = replace(wide, steps=wide.steps * plan.rounds)

    def over(noise_multiplier: float) -> float:
        return pld_epsilon([replace(whole, noise_multiplier=noise_multiplier)], delta) - epsilon

    most = whole.noise_multiplier
    found = float(brentq(over, 0.8 * most, most, rtol=1e-4))
    while over(found) > 0:
        found *= 1.0001
    return replace(whole, noise_multiplier=found)


def real(model: nn.Module, rows: Rows, plan: StudyPlan, event: Event, entropy: Entropy) -> Mechanism:
    """The client's own DP-SGD.

    Raises:
        PlanRefused: the model keeps statistics of raw rows.
    """
    return privacy.dp_sgd(model, objective_of(plan), rows, plan, event, entropy)


@contextmanager
def allowing_statistics() -> Generator[None, None, None]:
    """The client with its refusal of BatchNorm and the like switched off."""
    with _in_place_of("refuse_running_statistics", lambda model: None):
        yield


@contextmanager
def _in_place_of(name: str, other: Callable[..., object]) -> Generator[None, None, None]:
    own = getattr(privacy, name)
    setattr(privacy, name, other)
    try:
        yield
    finally:
        setattr(privacy, name, own)


# --- bugs --------------------------------------------------------------------------------------------------
def less_noise(model: nn.Module, rows: Rows, plan: StudyPlan, event: Event, entropy: Entropy) -> Mechanism:
    """Noise divided by 1.1: an accountant or a generator that is off by a tenth."""
    return real(model, rows, plan, replace(event, noise_multiplier=event.noise_multiplier / 1.1), entropy)


def counted_twice(model: nn.Module, rows: Rows, plan: StudyPlan, event: Event, entropy: Entropy) -> Mechanism:
    """Each clipped gradient is summed twice before the noise is added, as where batches are split and merged wrongly.

    The second sum is the real mechanism's too: same draws, same model, next to no noise.
    """
    seed, twin = entropy(16).hex(), copy.deepcopy(model)
    first = real(model, rows, plan, event, reproducible(seed))
    silent = replace(event, noise_multiplier=event.noise_multiplier * 1e-4)
    second = real(twin, rows, plan, silent, reproducible(seed))

    def gradient() -> None:
        twin.load_state_dict(model.state_dict())
        first.gradient()
        second.gradient()
        for one, other in zip(first.parameters, second.parameters, strict=True):
            if one.grad is not None and other.grad is not None:
                one.grad += other.grad

    return Mechanism(first.parameters, gradient, event)


def shuffled(model: nn.Module, rows: Rows, plan: StudyPlan, event: Event, entropy: Entropy) -> Mechanism:
    """Fixed batches dealt out from shuffled epochs, accounted as Poisson: what an ordinary data loader does.

    The real mechanism is given one batch at a time, of which it takes every row. An epoch's last batch may be
    short; then a row without finite gradient, which the mechanism silences, takes the free place.
    """
    generator = np.random.default_rng(list(entropy(16)))
    size = plan.training.batch_size
    dealt = Rows(torch.zeros(size, rows.x.shape[1]), torch.zeros(size), np.arange(size))
    inner = real(model, dealt, plan, replace(event, sample_rate=1.0), entropy)
    order = np.empty(0, dtype=np.int64)

    def gradient() -> None:
        nonlocal order
        if not len(order):
            order = generator.permutation(len(rows))
        batch, order = order[:size], order[size:]
        dealt.x[: len(batch)], dealt.y[: len(batch)] = rows.x[batch], rows.y[batch]
        dealt.x[len(batch) :] = torch.nan
        inner.gradient()

    return Mechanism(inner.parameters, gradient, event)


def leaking(model: nn.Module, rows: Rows, plan: StudyPlan, event: Event, entropy: Entropy) -> Mechanism:
    """BatchNorm let pass: its running mean is of raw rows, and leaves with the model."""
    with allowing_statistics():
        return real(model, rows, plan, event, entropy)


MECHANISMS: dict[Plant | None, Build] = {
    None: real,
    Plant.NOISE: less_noise,
    Plant.TWICE: counted_twice,
    Plant.SHUFFLED: shuffled,
    Plant.BATCHNORM: leaking,
}
