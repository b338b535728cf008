"""A small study that trains in a moment: four invented hospitals, four rounds."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cloister_client.connectors.connector import open_records
from cloister_client.dataset import load_dataset
from cloister_client.site import Site
from cloister_client.site_file import read_site
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend
from cloister_simulations.generated import GeneratedEhr
from cloister_simulations.hospitals import build
from cloister_simulations.scenario import Scenario, read_scenario
from cloister_simulations.site_folder import enrol_all


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


@pytest.fixture
def opened(small: Scenario, folder: Path) -> Callable[[StudyPlan], dict[str, Site]]:
    """``opened(plan)``: the four hospitals, enrolled in a study of that plan, by name."""
    paths = {read_site(path).site: path for path in build(small.simulation.hospitals, folder / "hospitals")}

    def sites(plan: StudyPlan) -> dict[str, Site]:
        enrol_all(folder, list(paths), plan)
        return {
            name: Site(plan, load_dataset(open_records(path), plan), folder / "sites" / name)
            for name, path in paths.items()
        }

    return sites
