"""The mechanisms. Each makes the gradient of a local step AND the accounting event that this gradient costs.

``dp_sgd`` is record-level DP-SGD (Abadi et al. 2016) by Opacus: true Poisson sampling, per-record clipping,
Gaussian noise. ``plain`` is what it is compared with. The noise's generator is seeded by the operating system
and its seed is never kept; only a simulation that says so may pass one.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cloister_client.dataset import Rows
from cloister_shared.budget import Event, calibrate
from cloister_shared.errors import PlanRefused
from cloister_shared.plan import Privacy, StudyPlan
from cloister_shared.schema import numbers
from cloister_shared.tasks.zoo import Task

Gradient = Callable[[], None]
"""Draws a batch and leaves its gradient in each parameter's ``grad``."""


@dataclass(frozen=True)
class Mechanism:
    """One study's local gradient and what each round of it costs (None: nothing is guaranteed)."""

    gradient: Gradient
    event: Event | None


def noise_generator(seed: int | None = None) -> torch.Generator:
    """A generator for sampling and noise. Without a seed it cannot be reproduced, which is the point."""
    return torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)


def plain(model: nn.Module, task: Task, rows: Rows, batch_size: int, generator: torch.Generator) -> Mechanism:
    """Ordinary mini-batches over shuffled epochs; an epoch goes on where the last step left it."""
    order = torch.empty(0, dtype=torch.int64)

    def gradient() -> None:
        nonlocal order
        if not len(order):
            order = torch.randperm(len(rows), generator=generator)
        batch, order = order[:batch_size], order[batch_size:]
        model.zero_grad(set_to_none=True)
        task.loss(model(rows.x[batch]), rows.y[batch]).backward()

    return Mechanism(gradient, None)


def dp_sgd(
    model: nn.Module, task: Task, rows: Rows, plan: StudyPlan, before: tuple[Event, ...], generator: torch.Generator
) -> Mechanism:
    """DP-SGD whose noise is calibrated so that ``before`` and the whole run meet the plan's epsilon, never more.

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
    event = training_event(plan, len(rows), before)
    hooked = GradSampleModule(model, loss_reduction="mean")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),  # holds the parameters; the step itself is train.py's
        noise_multiplier=event.noise_multiplier,
        max_grad_norm=terms.clip_norm,
        expected_batch_size=batch_size,
        loss_reduction="mean",
        generator=generator,
    )

    def gradient() -> None:
        drawn = torch.rand(len(rows), generator=generator) < event.sample_rate
        optimizer.zero_grad(set_to_none=True)
        if drawn.any():
            task.loss(hooked(rows.x[drawn]), rows.y[drawn]).backward()
            _silence_non_finite(optimizer.params)
        else:  # an empty draw still releases its noise, or its absence would tell
            for parameter in optimizer.params:
                parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))  # type: ignore[attr-defined]
        optimizer.pre_step()

    return Mechanism(gradient, event)


def training_event(plan: StudyPlan, rows: int, before: tuple[Event, ...]) -> Event:
    """What one round of a plan costs a hospital with so many training rows.

    Raises:
        BudgetExceeded: no noise keeps the whole run within the plan's epsilon.
    """
    rate = min(1.0, plan.training.batch_size / rows)
    steps = plan.training.local_steps
    epsilon, delta = _target(plan.privacy)
    return Event(calibrate(rate, plan.rounds * steps, epsilon, delta, before), rate, steps)


def statistics_event(plan: StudyPlan) -> Event | None:
    """What the hospital's noisy sums for normalisation cost, or None without DP.

    They may use ``normalisation.epsilon_share`` of epsilon on their own.
    """
    if not plan.private:
        return None
    epsilon, delta = _target(plan.privacy)
    share = plan.normalisation.epsilon_share or 0.1
    return Event(calibrate(1.0, 1, epsilon * share, delta), 1.0, 1, purpose="statistics")


def noisy_statistics(rows: Rows, at: list[int], plan: StudyPlan, generator: torch.Generator) -> Tensor:
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
    return sums + torch.normal(0.0, spread, sums.shape, generator=generator, dtype=torch.float64)


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
