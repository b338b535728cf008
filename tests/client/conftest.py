"""A hospital in memory: three numbers with plan constants 0 and 1, so that inputs are as written here."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cloister_client.consent import ANY
from cloister_client.dataset import Dataset, Rows
from cloister_client.quality import QualityReport
from cloister_client.site import Site
from cloister_shared.inputs import columns
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend, read_plan
from cloister_shared.wire import Ticket, TicketHeader
from cloister_simulations.site_folder import grant

PLAN = """\
study: three-numbers
title: Three numbers and an outcome
task: {name: tabular}
table:
  target: {name: outcome, positive: 1, negative: 0}
  features:
    - {name: a, kind: number, range: [-2, 2]}
    - {name: b, kind: number, range: [-2, 2]}
    - {name: c, kind: number, range: [-2, 2]}
cohort: {min_sites: 2, min_patients: 4}
rounds: 3
strategy: {name: fedavg}
aggregation: {secure_sum: false}
training: {learning_rate: 0.5, batch_size: 24, local_steps: 2}
privacy: {mechanism: none}
evaluation: {min_count: 3}
"""

DP = {"mechanism": "site", "unit": "record", "epsilon": 3.0, "delta": 1e-5, "clip_norm": 1.0}
"""With a batch of all rows this is priced in a hundredth of a second; a sampled one takes a second."""


@pytest.fixture(scope="session")
def plan_with() -> Callable[..., StudyPlan]:
    """``plan_with(dp=True, rounds=5, training={...})``: the plan above, amended."""
    plain = read_plan(PLAN)

    def amended(*, dp: bool = False, **changes: object) -> StudyPlan:
        return amend(plain, **({"privacy": DP} if dp else {}), **changes)

    return amended


def some_rows(n: int = 24, seed: int = 0, width: int = 3) -> Rows:
    """Separable, but not wholly."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(n, width)).astype(np.float32)
    y = (x[:, 0] - x[:, 1] + generator.normal(size=n) > 0).astype(np.float32)
    return Rows(torch.from_numpy(x), torch.from_numpy(y), np.arange(n))


@pytest.fixture
def rows() -> Callable[..., Rows]:
    return some_rows


@pytest.fixture
def open_site(tmp_path: Path) -> Callable[..., Site]:
    """A hospital for a plan; ``folder`` names what it remembers, ``train`` and ``test`` are its rows."""

    def opened(
        plan: StudyPlan,
        *,
        folder: str = "st-marys",
        train: Rows | None = None,
        test: Rows | None = None,
        noise_seed: int | None = None,
    ) -> Site:
        train = some_rows() if train is None else train
        test = some_rows(20, seed=9) if test is None else test
        dataset = Dataset(columns(plan.table), train, test, QualityReport("st-marys", len(train), []), ANY)
        if plan.private:
            (tmp_path / folder).mkdir(exist_ok=True)
            grant(tmp_path / folder, plan)
        site = Site(plan, dataset, tmp_path / folder, noise_seed=noise_seed)
        if plan.private:
            site.enrol()
        return site

    return opened


@pytest.fixture
def ticket_for() -> Callable[..., Ticket]:
    """The ticket of an honest coordinator; ``vectors`` are added to the site's own untrained model."""

    def made(site: Site, number: int = 1, *, run: str = "run-1", **vectors: np.ndarray) -> Ticket:
        header = TicketHeader(run=run, plan=site.plan.digest, round=number, site=site.name)
        start = np.linspace(-0.3, 0.4, site.layout.size, dtype=np.float32)
        return Ticket(header, {"model": start, **vectors})

    return made


@pytest.fixture
def recorder() -> Callable[..., SimpleNamespace]:
    """A task whose loss writes down the outcomes it is given; y = 0, 1, 2, … names the rows drawn."""

    def made(scale: float = 1.0) -> SimpleNamespace:
        task = SimpleNamespace(drawn=[])

        def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            task.drawn.append(target.int().tolist())
            return scale * output.mean()

        task.loss = loss
        return task

    return made


@pytest.fixture
def flat() -> Callable[[torch.nn.Module], np.ndarray]:
    """A model's parameters as one vector."""
    return lambda model: torch.cat([part.flatten() for part in model.state_dict().values()]).numpy()
