"""Every task that a plan can name, on one page. A task is one file beside this one and one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from cloister_shared.noise import Entropy
from cloister_shared.plan import StudyPlan
from cloister_shared.tasks import tabular


class Task(Protocol):
    """What a task file offers: from the plan's schema to a model, its loss and what its output means."""

    @staticmethod
    def model(plan: StudyPlan) -> nn.Module:
        """The untrained network; weights come from torch's generator."""
        ...

    @staticmethod
    def loss(output: Tensor, target: Tensor) -> Tensor:
        """Mean over rows of a loss that no two rows share, so that one row's gradient can be clipped."""
        ...

    @staticmethod
    def risk(output: Tensor) -> NDArray[np.float64]:
        """Predicted probability of the positive outcome, shape [n]."""
        ...


@runtime_checkable
class Sloped(Task, Protocol):
    """A task that also does without torch: optional, and faster where the network is dense."""

    @staticmethod
    def cost(output: NDArray[np.float32], target: NDArray[np.float32]) -> float:
        """The value of ``loss``."""
        ...

    @staticmethod
    def slope(output: NDArray[np.float32], target: NDArray[np.float32]) -> NDArray[np.float32]:
        """The derivative of ``loss`` by each output, shaped like the output."""
        ...


Augmentation = Callable[[Tensor, Entropy], Tensor]
"""Records' inputs, each of them changed a little and independently; the shape stays."""


@runtime_checkable
class Augmenting(Task, Protocol):
    """A task whose records can be varied without changing what they mean: optional, for ``training.augment``."""

    @staticmethod
    def augmentation(plan: StudyPlan) -> Augmentation:
        """How. No record's change may depend on another record, or no clip would bound what one does."""
        ...


TASKS: dict[str, Task] = {"tabular": tabular}


def task_of(plan: StudyPlan) -> Task:
    """The task that a plan names."""
    return TASKS[plan.task.name]
