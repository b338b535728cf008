"""How a model does on the rows that a hospital holds out. Small counts do not leave the hospital."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from cloister_client.dataset import Rows
from cloister_client.network import output
from cloister_shared.plan import Evaluation
from cloister_shared.tasks.metrics import Estimate, auroc, evaluate
from cloister_shared.tasks.zoo import Task


def risks(model: nn.Module, task: Task, rows: Rows) -> NDArray[np.float64]:
    """Predicted probabilities, shape [n]."""
    return task.risk(output(model, rows.x))


def enough(outcomes: Sequence[float] | NDArray[np.float64], terms: Evaluation) -> bool:
    """Whether there are ``min_count`` rows of either outcome, so that a metric tells of no single patient."""
    positives = int(np.sum(outcomes))
    return min(positives, len(outcomes) - positives) >= terms.min_count


def at_a_glance(model: nn.Module, task: Task, rows: Rows, terms: Evaluation) -> dict[str, float | None]:
    """Loss and AUROC of the incoming model, cheap enough for every round; empty if counts are too small."""
    if not enough(rows.y.numpy(), terms):
        return {}
    said = output(model, rows.x)
    value = float(task.loss(said, rows.y))
    return {
        "loss": value if np.isfinite(value) else None,
        "auroc": auroc(rows.y.numpy().astype(float), task.risk(said)),
    }


def in_full(model: nn.Module, task: Task, rows: Rows, terms: Evaluation, seed: int) -> dict[str, Estimate]:
    """Every metric with its bootstrap interval; empty if counts are too small."""
    if not enough(rows.y.numpy(), terms):
        return {}
    return evaluate(
        rows.y.numpy().astype(float),
        risks(model, task, rows),
        threshold=terms.threshold,
        level=terms.interval,
        resamples=terms.resamples,
        seed=seed,
    )
