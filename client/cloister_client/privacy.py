"""The mechanisms. Each makes the gradient of a local step AND the accounting event that this gradient costs.

``dp_sgd`` is record-level DP-SGD (Abadi et al. 2016) by Opacus: true Poisson sampling, per-record clipping,
Gaussian noise. ``plain`` is what it is compared with. Sampling and noise come from the operating system's
cryptographic generator, which has no seed to keep or to guess; only a simulation that says so may pass another.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cloister_client.dataset import Rows
from cloister_client.ledger import Cost
from cloister_client.network import Network
from cloister_shared.budget import Event, calibrate, merged
from cloister_shared.errors import PlanRefused
from cloister_shared.plan import Privacy, StudyPlan
from cloister_shared.schema import numbers
from cloister_shared.tasks.zoo import Task

Gradient = Callable[[], None]
"""Draws a batch and leaves its gradient in the ``grad`` of the mechanism's parameters."""


Entropy = Callable[[int], bytes]
"""So many unpredictable bytes; ``os.urandom`` wherever privacy is meant."""


@dataclass(frozen=True)
class Mechanism:
    """One study's local gradient and what each round of it costs (None: nothing is guaranteed)."""

    parameters: Sequence[Tensor]
    gradient: Gradient
    event: Event | None


def reproducible(seed: str) -> Entropy:
    """Bytes that anyone with the seed can draw again. VOIDS PRIVACY; for simulations that say so."""
    return np.random.default_rng(list(seed.encode())).bytes


def uniforms(entropy: Entropy, count: int) -> NDArray[np.float64]:
    """Independent uniform numbers in [0, 1), 53 bits each."""
    return (np.frombuffer(entropy(8 * count), dtype="<u8") >> np.uint64(11)).astype(np.float64) * 2.0**-53


def gaussians(entropy: Entropy, count: int) -> NDArray[np.float64]:
    """Independent standard normal numbers (Box and Muller 1958)."""
    half = (count + 1) // 2
    radius = np.sqrt(-2.0 * np.log1p(-uniforms(entropy, half)))
    angle = 2.0 * np.pi * uniforms(entropy, half)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def plain(network: Network, rows: Rows, batch_size: int, generator: torch.Generator) -> Mechanism:
    """Ordinary mini-batches over shuffled epochs; an epoch goes on where the last step left it."""
    x, y, batches = rows.x.numpy(), rows.y.numpy(), _epochs(len(rows), batch_size, generator)

    def gradient() -> None:
        batch = next(batches)
        network.backward(x[batch], y[batch])

    return Mechanism(network.parameters, gradient, None)


def _epochs(rows: int, batch_size: int, generator: torch.Generator) -> Iterator[NDArray[np.int64]]:
    while True:
        order = torch.randperm(rows, generator=generator).numpy()
        for at in range(0, rows, batch_size):
            yield order[at : at + batch_size]


def dp_sgd(model: nn.Module, task: Task, rows: Rows, plan: StudyPlan, entropy: Entropy = os.urandom) -> Mechanism:
    """DP-SGD whose noise is calibrated so that the whole run meets the plan's epsilon, never more.

    Each record enters a step with probability batch_size / rows, by a draw of its own; the sum of clipped
    gradients is divided by batch_size, whatever the draw. The number of rows is taken as public.

    Raises:
        PlanRefused: the model keeps statistics that no clip bounds, such as BatchNorm's.
        BudgetExceeded: no noise meets the target.
    """
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    # Opacus hooks every layer; that the first one's inputs want no gradient is no news.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    refuse_running_statistics(model)
    terms, batch_size = plan.privacy, plan.training.batch_size
    if terms.epsilon is None or terms.delta is None or terms.clip_norm is None:
        raise PlanRefused("DP-SGD needs epsilon, delta and clip_norm.", mend="Add them under privacy.")
    clip_norm = terms.clip_norm
    event = training_event(plan, len(rows))
    hooked = GradSampleModule(model, loss_reduction="mean")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),  # holds the parameters; the step itself is train.py's
        noise_multiplier=event.noise_multiplier,
        max_grad_norm=clip_norm,
        expected_batch_size=batch_size,
        loss_reduction="mean",
    )

    def gradient() -> None:
        drawn = torch.from_numpy(uniforms(entropy, len(rows)) < event.sample_rate)
        hooked.train()
        optimizer.zero_grad(set_to_none=True)
        if drawn.any():
            task.loss(hooked(rows.x[drawn]), rows.y[drawn]).backward()
            _silence_non_finite(optimizer.params)
        else:  # an empty draw still releases its noise, or its absence would tell
            for parameter in optimizer.params:
                parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))  # type: ignore[attr-defined]
        optimizer.clip_and_accumulate()
        _add_noise(optimizer.params, event.noise_multiplier * clip_norm, entropy)
        optimizer.scale_grad()

    return Mechanism(optimizer.params, gradient, event)


def training_event(plan: StudyPlan, rows: int) -> Event:
    """What one round costs a hospital with so many training rows, beside the statistics that came before.

    Raises:
        BudgetExceeded: no noise keeps the whole run within the plan's epsilon.
    """
    rate = min(1.0, plan.training.batch_size / rows)
    steps = plan.training.local_steps
    epsilon, delta = _target(plan.privacy)
    statistics = statistics_event(plan) if plan.normalisation.method == "federated" else None
    before = (statistics,) if statistics else ()
    return Event(calibrate(rate, plan.rounds * steps, epsilon, delta, before), rate, steps)


def plan_cost(plan: StudyPlan, rows: int) -> Cost:
    """What the whole of a private plan costs a hospital with so many training rows: what it reserves before round 1.

    Raises:
        BudgetExceeded: no noise keeps it within the plan's epsilon.
    """
    each = training_event(plan, rows)
    once = statistics_event(plan) if plan.normalisation.method == "federated" else None
    whole = [replace(each, steps=plan.rounds * each.steps), *([once] if once else [])]
    return Cost(plan.digest, plan.study, tuple(merged(whole)), *_target(plan.privacy), plan.rounds)


def statistics_event(plan: StudyPlan) -> Event | None:
    """What the hospital's noisy sums for normalisation cost, or None without DP.

    They may use ``normalisation.epsilon_share`` of epsilon on their own.
    """
    if not plan.private:
        return None
    epsilon, delta = _target(plan.privacy)
    share = plan.normalisation.epsilon_share or 0.1
    return Event(calibrate(1.0, 1, epsilon * share, delta), 1.0, 1, purpose="statistics")


def noisy_statistics(rows: Rows, at: list[int], plan: StudyPlan, entropy: Entropy = os.urandom) -> Tensor:
    """Per number feature: count, sum and sum of squares of values scaled to [-1, 1] by the plan's range.

    Shape [3, features]. One row changes it by at most sqrt(3 * features) in ℓ², which is the sensitivity that
    the Gaussian noise of ``statistics_event`` is scaled to. Without DP the sums are exact.
    """
    ranges = torch.tensor([feature.range for feature in numbers(plan.table)])
    centre, half = ranges.mean(dim=1), (ranges[:, 1] - ranges[:, 0]) / 2
    values = ((rows.x[:, at] - centre) / half).clamp(-1, 1).double()
    sums = torch.stack([torch.full((len(at),), float(len(rows))).double(), values.sum(0), (values**2).sum(0)])
    event = statistics_event(plan)
    if event is None:
        return sums
    spread = event.noise_multiplier * (3 * len(at)) ** 0.5
    return sums + spread * torch.from_numpy(gaussians(entropy, sums.numel())).view_as(sums)


def refuse_running_statistics(model: nn.Module) -> None:
    """Refuse a model with buffers that change in training, frozen or not (Opacus's validator misses frozen ones).

    Raises:
        PlanRefused: names the module.
    """
    for name, module in model.named_modules():
        if next(module.buffers(recurse=False), None) is not None:
            raise PlanRefused(
                f"Layer {name} ({type(module).__name__}) keeps statistics of raw rows, which no clip bounds.",
                mend="Use LayerNorm or GroupNorm: task.norm: layer.",
            )


def _add_noise(parameters: list[nn.Parameter], spread: float, entropy: Entropy) -> None:
    """In place of Opacus's own noise, whose generator keeps 32 bits of its seed: all its noises can be tried."""
    for parameter in parameters:
        clipped: Tensor = parameter.summed_grad  # type: ignore[attr-defined]
        noise = torch.from_numpy(spread * gaussians(entropy, clipped.numel()))
        parameter.grad = (clipped + noise.view_as(clipped)).to(parameter.dtype).view_as(parameter)


def _silence_non_finite(parameters: list[nn.Parameter]) -> None:
    """Zero a record's whole gradient where any part of it is not finite: one NaN would undo every clip."""
    finite = torch.stack(
        [torch.isfinite(p.grad_sample.flatten(1)).all(dim=1) for p in parameters]  # type: ignore[attr-defined]
    ).all(dim=0)
    if not finite.all():
        for parameter in parameters:
            parameter.grad_sample[~finite] = 0.0  # type: ignore[attr-defined]


def _target(terms: Privacy) -> tuple[float, float]:
    if terms.epsilon is None or terms.delta is None:
        raise PlanRefused("Differential privacy needs epsilon and delta.", mend="Add them under privacy.")
    return terms.epsilon, terms.delta
