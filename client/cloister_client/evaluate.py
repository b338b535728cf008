"""How a model does on the rows that a hospital holds out. Small counts do not leave the hospital."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cloister_client.dataset import Rows
from cloister_client.network import Network
from cloister_shared.plan import Evaluation
from cloister_shared.tasks.metrics import Estimate, auroc, evaluate


def risks(network: Network, rows: Rows) -> NDArray[np.float64]:
    """Predicted probabilities, shape [n]."""
    return _told(network, network.output(rows.x))


def _told(network: Network, output: Tensor) -> NDArray[np.float64]:
    """What is no number counts as a coin. A failure would say which rows a hostile model had been made for."""
    risk = network.task.risk(output)
    return np.where(np.isnan(risk), 0.5, risk)


def enough(outcomes: Sequence[float] | NDArray[np.float64], terms: Evaluation) -> bool:
    """Whether there are ``min_count`` rows of either outcome, so that a metric tells of no single patient."""
    positives = int(np.count_nonzero(outcomes))
    return min(positives, len(outcomes) - positives) >= terms.min_count


def at_a_glance(network: Network, rows: Rows, terms: Evaluation) -> dict[str, float | None]:
    """Loss and AUROC of the incoming model, cheap enough for every round; empty if counts are too small."""
    outcomes = rows.y.numpy()
    if not enough(outcomes, terms):
        return {}
    said = network.output(rows.x)
    value = network.loss(said, outcomes)
    return {"loss": value if math.isfinite(value) else None, "auroc": auroc(outcomes, _told(network, said))}


def in_full(network: Network, rows: Rows, terms: Evaluation, seed: int) -> dict[str, Estimate]:
    """Every metric with its bootstrap interval; empty if counts are too small."""
    if not enough(rows.y.numpy(), terms):
        return {}
    return evaluate(
        rows.y.numpy().astype(float),
        risks(network, rows),
        threshold=terms.threshold,
        level=terms.interval,
        resamples=terms.resamples,
        seed=seed,
    )
