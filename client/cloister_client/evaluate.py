"""How a model does on the rows that a hospital holds out. Small counts do not leave the hospital."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from cloister_client.dataset import Rows
from cloister_client.network import Network
from cloister_shared.outcomes.judging import Estimate, judge
from cloister_shared.plan import Evaluation

Array = NDArray[np.float64]


def seen(network: Network, rows: Rows) -> tuple[Array, Array]:
    """Truth and prediction, [n, ...] each, as the outcome's metrics take them."""
    return network.objective.outcome.seen(network.output(rows.x).numpy(), rows.arrays[1])


def at_a_glance(network: Network, rows: Rows, terms: Evaluation) -> dict[str, float | None]:
    """Loss and headline metric of the incoming model, cheap enough for every round; empty if counts are too small."""
    _, outcomes = rows.arrays
    outcome, said = network.objective.outcome, network.output(rows.x)
    truth, prediction = outcome.seen(said.numpy(), outcomes)
    if not outcome.enough(truth, terms.min_count):
        return {}
    loss, headline = network.loss(said, outcomes), outcome.glance(truth, prediction)
    return {"loss": _known(loss), outcome.headline: _known(headline)}


def in_full(network: Network, rows: Rows, terms: Evaluation, seed: int) -> dict[str, Estimate]:
    """Every metric with its bootstrap interval; empty if counts are too small."""
    outcome = network.objective.outcome
    truth, prediction = seen(network, rows)
    if not outcome.enough(truth, terms.min_count):
        return {}
    return judge(outcome.metrics, truth, prediction, level=terms.interval, resamples=terms.resamples, seed=seed)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
