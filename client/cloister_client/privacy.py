"""The mechanisms. Each makes the gradient of a local step AND the accounting event that this gradient costs.

``dp_sgd`` is DP-SGD (Abadi et al. 2016) by patient or by record: Poisson sampling, clipping, Gaussian noise.
``noisy`` does the same to a whole hospital's update, and ``with_its_part`` adds what a hospital contributes where
all share the noise. ``plain`` is what they are compared with. Sampling and noise come from a cryptographic
keystream, which has no seed to keep or to guess; only a simulation that says so may pass another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cloister_client.clipping import Clipper
from cloister_client.dataset import Dataset, Rows
from cloister_client.ledger import Cost
from cloister_client.network import Network, rows_at_once
from cloister_shared import noise
from cloister_shared.budget import Event, epsilon, merged
from cloister_shared.charges import charges, in_patients, part_of, promise
from cloister_shared.errors import PlanRefused
from cloister_shared.masking import Ring, encoding_of, norm, weight
from cloister_shared.noise import Entropy
from cloister_shared.objective import Objective
from cloister_shared.plan import Privacy, StudyPlan
from cloister_shared.shared_noise import rounding_inflation
from cloister_shared.tasks.task import Augmentation
from cloister_shared.tasks.zoo import Augmenting

Gradient = Callable[[], None]
"""Draws a batch and leaves its gradient in the ``grad`` of the mechanism's parameters."""

Vector = NDArray[np.float32]

PHYSICAL_BATCH = 4096
"""Rows that go through the model at a time, however many a step draws. Memory, not privacy."""

SINGLE = 1 + 2.0**-11
"""By how much the noise is larger because sums are made in single precision: of 4,096 gradients that all point one
way, which a hostile model can bring about, one moves such a sum by 1.0003 clip norms."""

log = logging.getLogger("cloister.site")


@dataclass(frozen=True)
class Mechanism:
    """One study's local gradient and what each round of it costs (None: nothing is guaranteed)."""

    parameters: Sequence[Tensor]
    gradient: Gradient
    event: Event | None


@dataclass(frozen=True)
class Units:
    """A table's rows by whose they are: unit ``i`` has the row numbers ``rows[starts[i]:starts[i + 1]]``."""

    rows: NDArray[np.int64]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Rows, unit: str) -> Units:
        """By patient, or each row by itself."""
        if unit != "patient":
            return cls(np.arange(len(rows)), np.arange(len(rows) + 1))
        order = np.argsort(rows.patients, kind="stable")
        _, counts = np.unique(rows.patients, return_counts=True)
        return cls(order, np.concatenate([[0], np.cumsum(counts)]))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Rows of each unit."""
        return np.diff(self.starts)

    def rows_of(self, drawn: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All rows of the drawn units, and which of these each row is of, counted from 0."""
        sizes = self.starts[drawn + 1] - self.starts[drawn]
        ends = np.cumsum(sizes)
        at = np.arange(ends[-1] if len(ends) else 0) + np.repeat(self.starts[drawn] - (ends - sizes), sizes)
        return self.rows[at], np.repeat(np.arange(len(drawn)), sizes)


# --- without privacy ---------------------------------------------------------------------------------------
def plain(network: Network, rows: Rows, batch_size: int, generator: torch.Generator) -> Mechanism:
    """Ordinary mini-batches over shuffled epochs; an epoch goes on where the last step left it."""
    (x, y), batches = rows.arrays, _epochs(len(rows), batch_size, generator)

    def gradient() -> None:
        batch = next(batches)
        network.backward(x[batch], y[batch])

    return Mechanism(network.parameters, gradient, None)


def _epochs(rows: int, batch_size: int, generator: torch.Generator) -> Iterator[NDArray[np.int64]]:
    while True:
        order = torch.randperm(rows, generator=generator).numpy()
        for at in range(0, rows, batch_size):
            yield order[at : at + batch_size]


# --- a step ------------------------------------------------------------------------------------------------
def dp_sgd(
    model: nn.Module, objective: Objective, rows: Rows, plan: StudyPlan, event: Event, entropy: Entropy
) -> Mechanism:
    """DP-SGD with the noise and the sample rate of ``event``, which is what a round of it costs.

    Each unit enters a step with all its rows by a draw of its own, and is clipped once; the sum is divided by
    batch_size, whatever the draw. The number of units is taken as public. Where the hospitals share the noise,
    the gradient has none: ``with_its_part`` adds it where the update leaves. With ``training.augment`` a unit's rows
    are taken several times, each time varied by the task; the one clip is of the mean over all of them.

    Raises:
        PlanRefused: the model keeps statistics that no clip bounds, such as BatchNorm's, or the task cannot augment.
    """
    refuse_running_statistics(model)
    terms, units = plan.privacy, Units.of(rows, plan.privacy.unit or "record")
    clip_norm = _clip_norm(terms)
    clipper = Clipper(
        model,
        objective.loss,
        clip_norm,
        per_unit=terms.per_patient,
        at_once=min(PHYSICAL_BATCH, rows_at_once(rows.x.shape[1])),
        notice=log.warning,
    )
    spread = 0.0 if plan.shared_noise else event.noise_multiplier * clip_norm * SINGLE
    copies, varied = _augmented(plan)

    def gradient() -> None:
        model.train()
        drawn = noise.draw_subset(entropy, len(units), event.sample_rate)
        at, whose = (np.repeat(numbers, copies) for numbers in units.rows_of(drawn))
        clipper.add(varied(rows.x[at], entropy), rows.y[at], torch.from_numpy(whose), len(drawn))
        # An empty draw still releases its noise, or its absence would tell.
        for parameter, total in zip(clipper.parameters, clipper.take(), strict=True):
            said = torch.from_numpy(noise.noisy(entropy, total.numpy(), spread)) if spread else total
            parameter.grad = (said / plan.training.batch_size).to(parameter.dtype).view_as(parameter)

    return Mechanism(clipper.parameters, gradient, event)


def _augmented(plan: StudyPlan) -> tuple[int, Augmentation]:
    """How often a record is taken, and how each copy is varied."""
    task, terms = plan.task, plan.training.augment
    if terms is None:
        return 1, lambda x, entropy: x
    if not isinstance(task, Augmenting):
        raise PlanRefused(f"The task {task.name} has no augmentation of its own.", mend="Take out training.augment.")
    return terms.copies, task.augmentation(plan.table, terms)


def plan_cost(plan: StudyPlan, dataset: Dataset, records: int | None = None) -> Cost:
    """What the whole of a private plan costs a hospital's patients: what is reserved before round 1.

    ``records``: the most that one patient has, where it is known.

    Raises:
        BudgetExceeded: no noise keeps it within the plan's epsilon.
    """
    target, delta = promise(plan)
    units = Units.of(dataset.train, plan.privacy.unit or "record")
    records = records or most_records(dataset)
    whole = tuple(merged(in_patients(event, plan, records) for event in charges(plan, len(units))))
    # A plan in another unit promises its epsilon to that unit; what it costs a patient is another number.
    limit = target if plan.privacy.unit == "patient" else epsilon(whole, delta)
    return Cost(plan.digest, plan.study, whole, limit, delta, plan.rounds)


def most_records(dataset: Dataset) -> int:
    """The most rows that one patient has."""
    return max(int(Units.of(rows, "patient").sizes.max(initial=1)) for rows in (dataset.train, dataset.test))


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


# --- a whole update ----------------------------------------------------------------------------------------
def clipped(update: Vector, clip_norm: float) -> Vector:
    """The update, scaled down to ``clip_norm`` in ℓ² if it is longer; nothing of one that is not finite."""
    size = norm(update)
    if not np.isfinite(size):
        return np.zeros_like(update)
    return update * np.float32(min(1.0, clip_norm / max(size, 1e-30)))


def noisy(update: Vector, plan: StudyPlan, event: Event, entropy: Entropy) -> Vector:
    """A hospital's whole update under site-level DP: clipped, with the whole noise on it (McMahan et al. 2018)."""
    clip_norm = _clip_norm(plan.privacy)
    return noise.noisy(entropy, clipped(update, clip_norm), event.noise_multiplier * clip_norm)


def with_its_part(update: Vector, plan: StudyPlan, event: Event, sites: int, entropy: Entropy) -> Ring:
    """The update as ring elements with this hospital's part of the shared noise.

    ``sites`` are in the cohort. The noise is discrete Gaussian on the ring's own integers, so that what the
    coordinator adds up is a sum of noises and nothing else (Kairouz, Liu and Steinke 2021). How many values were
    clipped to the plan's bound is told to nobody: it is a function of the rows that no noise covers.

    Raises:
        PlanRefused: the noise would not fit beside the values, or is too fine for the ring.
    """
    if plan.privacy.unit == "site":
        update = clipped(update, _clip_norm(plan.privacy))
    ring = np.zeros(update.size, np.uint32)
    encoding_of(plan).add(ring, update, weight(plan, sites, 0))
    spread = ring_spread(plan, event, sites, update.size)
    ring += noise.discrete_gaussian(entropy, spread, update.size).astype(np.uint32)
    return ring


def ring_spread(plan: StudyPlan, event: Event, sites: int, size: int) -> float:
    """Standard deviation of one hospital's part of the noise, in steps of the ring, for so many parameters.

    Raises:
        PlanRefused: it would not fit beside the values, or is too fine for the ring.
    """
    terms, training, encoding = plan.privacy, plan.training, encoding_of(plan)
    # What one unit moves: its clipped gradient in one step of SGD, or the whole clipped update.
    most = _clip_norm(terms) * SINGLE
    most *= 1.0 if terms.unit == "site" else training.learning_rate / training.batch_size
    scale = weight(plan, sites, 0) * 2.0**encoding.fraction_bits
    spread = part_of(plan, event) * rounding_inflation(most, scale, size) * scale * most
    if spread < 16:
        raise PlanRefused(
            f"The noise is {spread:.2g} steps of the ring wide, too coarse to be trusted.",
            mend="Raise aggregation.bits or lower aggregation.bound.",
        )
    if 8 * spread * sites**0.5 > encoding.bound * 2.0**encoding.fraction_bits:
        raise PlanRefused(
            "The noise would not fit into the sum.",
            mend="Raise aggregation.bound or batch_size, or lower learning_rate and raise server_learning_rate.",
        )
    return spread


# --- small things ------------------------------------------------------------------------------------------
def _clip_norm(terms: Privacy) -> float:
    if terms.clip_norm is None:
        raise PlanRefused("DP-SGD needs clip_norm.", mend="Add it under privacy.")
    return terms.clip_norm
