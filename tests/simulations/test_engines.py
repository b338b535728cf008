"""Both engines carry the same messages: the same plan gives the same model, and errors reach the caller."""

import importlib.util

import numpy as np
import pytest

from cloister_client.connectors.connector import open_records
from cloister_client.dataset import load_dataset
from cloister_server.store import Store
from cloister_shared.errors import CohortTooSmall, PlanRefused
from cloister_shared.plan_file import amend
from cloister_simulations import engines
from cloister_simulations.federation import Arm, Options, plan_for, run_federated
from cloister_simulations.grid import Fault
from cloister_simulations.hospitals import build

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'cloister[ray]'"
)


@pytest.fixture
def run(small, tmp_path):
    """Run the small study on an engine; its plan, result and store."""

    def run(engine, arm, noise_seed=None, **changes):
        # A worker imports Opacus in its first round: on a busy machine that takes longer than the study's 5 s.
        plan = amend(plan_for(small.plan, arm, 0), rounds=2, round_timeout=120.0, **changes)
        paths = build(small.simulation.hospitals, tmp_path / "hospitals")
        datasets = {path.parent.name: load_dataset(open_records(path), plan) for path in paths}
        folder = tmp_path / engine
        options = Options(folder, engine=engine, noise_seed=noise_seed)
        result = run_federated(plan, datasets, arm, folder, options, lambda *_: None)
        return plan, result, Store(folder)

    return run


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize(("arm", "noise_seed"), [(Arm("federated"), None), (Arm("private", 2.0), 1)])
def test_ray_gives_the_model_that_one_process_gives(run, arm, noise_seed):
    plan, alone, here = run("in-process", arm, noise_seed)
    _, spread, there = run("ray", arm, noise_seed)
    one, other = here.load(plan.digest), there.load(plan.digest)
    assert one
    assert other
    assert np.abs(one.model - other.model).max() <= 1e-6 * np.abs(one.model).max()
    assert spread.epsilon == alone.epsilon
    assert spread.rejected == []
    assert [set(record["answered"]) for record in there.rounds()] == [set(alone.sites)] * plan.rounds


@needs_ray
@pytest.mark.slow
def test_what_the_coordinator_raises_reaches_the_caller_through_ray(run):
    with pytest.raises(CohortTooSmall, match="which needs 9"):
        run("ray", Arm("federated"), cohort={"min_sites": 9})


def test_ray_takes_no_faults():
    with pytest.raises(PlanRefused, match="in-process"):
        engines.ready("ray", (Fault("drop", "birch", 1),))


def test_without_ray_the_mend_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlanRefused, match=r"pip install 'cloister\[ray\]'"):
        engines.ready("ray", ())


def test_in_process_is_always_ready():
    engines.ready("in-process", (Fault("drop", "birch", 1),))
