"""A small study that trains in a moment: four invented hospitals, four rounds."""

from pathlib import Path

import pytest

from cloister_shared.plan_file import amend
from cloister_simulations.generated import GeneratedEhr
from cloister_simulations.scenario import Scenario, read_scenario


@pytest.fixture(scope="session")
def small() -> Scenario:
    """Logistic regression on generated records with the plan's own constants."""
    full = read_scenario("generated-ehr")
    plan = amend(
        full.plan,
        study="small",
        rounds=4,
        round_timeout=5.0,
        task={"model": "logistic", "hidden": []},
        normalisation={"method": "plan"},
        cohort={"min_sites": 2, "min_patients": 20},
        training={"batch_size": 32, "local_steps": 3, "learning_rate": 0.3},
        evaluation={"resamples": 100, "min_count": 2},
    )
    hospitals = GeneratedEhr(source="generated-ehr", sites=4, patients=500)
    simulation = full.simulation.model_copy(update={"hospitals": hospitals, "seeds": (0,), "epsilons": (2.0,)})
    return full.model_copy(update={"plan": plan, "simulation": simulation, "name": "small"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a run keeps its files."""
    return tmp_path / "run"
