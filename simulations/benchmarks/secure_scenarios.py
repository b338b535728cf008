"""Each shipped scenario's federated arm with the secure sum on and off, same seed: how far apart the models end.

They add up the same integers, so they should not be apart at all. Beside it the plain mean in double precision: after
one round it differs by what fixed point changes. After all rounds, told without a bar, by what training made of
that: a network of ReLUs is not continuous in its gradient, so a last bit now and then tips one unit of one row over.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
from figures import Figure, at_most, missed, progress, told
from numpy.typing import NDArray

from cloister_client.connectors.connector import open_records
from cloister_client.dataset import Dataset, load_dataset
from cloister_server import rounds
from cloister_server.store import Store
from cloister_server.total import Mean, Total
from cloister_shared.errors import CloisterError
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend
from cloister_shared.wire import Reply
from cloister_simulations.federation import Arm, Options, plan_for, run_federated
from cloister_simulations.hospitals import build
from cloister_simulations.scenario import read_scenario, shipped

Vector = NDArray[np.float32]
BAR = 1e-6


def figures() -> list[Figure]:
    return [figure for name in shipped() for figure in scenario(name)]


def scenario(name: str) -> list[Figure]:
    """The largest difference of a parameter of the final models."""
    read = read_scenario(name)
    plan = plan_for(read.plan, Arm("federated"), 0)
    progress(f"scenarios: {name}, {plan.rounds} rounds with the secure sum and without")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            paths = build(read.simulation.hospitals, Path(scratch) / "hospitals")
        except CloisterError as refused:
            progress(f"scenarios: {refused}")
            return [missed(f"scenarios.{name}", f"not measured ({type(refused).__name__})")]
        loaded = [load_dataset(open_records(path), plan) for path in paths]
        datasets = {dataset.quality.site: dataset for dataset in loaded}
    once = amend(plan, rounds=1)
    on, one = final(plan, datasets), final(once, datasets)
    off = final(plan, datasets, secure_sum=False)
    doubles, double = (final(terms, datasets, secure_sum=False, total=InDoubles) for terms in (plan, once))
    return [
        at_most(f"scenarios.{name}", largest(on, off), BAR, f"{{:.1e}} apart after {plan.rounds} rounds, on and off"),
        at_most(f"scenarios.{name}.doubles", largest(one, double), BAR, "{:.1e} from doubles after 1 round"),
        told(
            f"scenarios.{name}.doubles-all", largest(on, doubles), f"{{:.1e}} from doubles after {plan.rounds} rounds"
        ),
    ]


class InDoubles(Total):
    """The weighted mean as a textbook has it."""

    def __init__(self, *terms: object) -> None:
        super().__init__(*terms)  # pyright: ignore[reportArgumentType]
        self._doubles, self._weight = np.zeros(self.layout.size), 0.0

    def add(self, site: str, reply: Reply) -> None:
        super().add(site, reply)
        weight = float(reply.header.rows) if self.plan.aggregation.weights == "rows" else 1.0
        self._doubles += weight * reply.vectors["update"].astype(float)
        self._weight += weight

    def mean(self, rejected: dict[str, str]) -> Mean:
        mean = super().mean(rejected)
        mean.vectors["update"] = (self._doubles / self._weight).astype(np.float32)
        return mean


def final(
    plan: StudyPlan, datasets: dict[str, Dataset], *, secure_sum: bool = True, total: type[Total] = Total
) -> Vector:
    """The final model."""
    plan = amend(plan, aggregation={"secure_sum": secure_sum})
    with tempfile.TemporaryDirectory() as scratch, patch.object(rounds, "Total", total):
        folder = Path(scratch)
        run_federated(plan, datasets, Arm("federated"), folder, Options(folder), lambda *_: None)
        checkpoint = Store(folder).load(plan.digest)
    assert checkpoint
    return checkpoint.model


def largest(one: Vector, other: Vector) -> float:
    """The largest difference of a parameter."""
    return float(np.abs(one - other).max())
