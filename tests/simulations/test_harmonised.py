"""The harmonised scenario, in short: with noise and all, hospitals are nearer to each other than before."""

import json

import numpy as np
import pytest

from cloister_client.combat import effects, inputs
from cloister_client.connectors.connector import open_records
from cloister_client.dataset import load_dataset
from cloister_server.store import Store
from cloister_shared.combat import harmonised
from cloister_shared.inputs import columns
from cloister_shared.plan_file import amend
from cloister_simulations.federation import Arm, Options, compare, plan_for
from cloister_simulations.generated import GeneratedEhr
from cloister_simulations.scenario import read_scenario


def short(**changes):
    full = read_scenario("harmonised")
    terms = {"rounds": 2, "task": {"model": "logistic", "hidden": []}, "evaluation": {"resamples": 100}}
    hospitals = GeneratedEhr(
        source="generated-ehr", sites=4, patients=4000, feature_shift=0.2, missing=0.0, site_effects=1.0
    )
    simulation = full.simulation.model_copy(update={"hospitals": hospitals})
    return full.model_copy(update={"plan": amend(full.plan, **terms | changes), "simulation": simulation})


def apart(plan, folder, arm):
    """Variance between hospitals of each feature's mean over their training rows, before and after: [2, features]."""
    checkpoint = Store(folder / "seed-0" / arm.folder).load(plan.digest)
    assert checkpoint
    assert checkpoint.normalisation
    at = [i for i, c in enumerate(columns(plan.table)) if c.feature in {f.name for f in harmonised(plan)}]
    means = []
    for site_yaml in sorted((folder / "hospitals").glob("*/site.yaml")):
        data = load_dataset(open_records(site_yaml), plan)
        kept = folder / "seed-0" / arm.folder / "sites" / data.quality.site / f"{plan.digest}.moments.json"
        own = effects(plan, json.loads(kept.read_text()), checkpoint.normalisation)
        made = [inputs(data.train, plan, checkpoint.normalisation, known).x[:, at] for known in (None, own)]
        means.append([part.double().mean(dim=0).numpy() for part in made])
    return np.array(means).var(axis=0)


@pytest.mark.parametrize(
    ("kind", "epsilon", "most"),
    [("federated", None, 0.05), pytest.param("private", 3.0, 0.6, marks=pytest.mark.slow)],
)
def test_hospitals_are_nearer_to_each_other(tmp_path, kind, epsilon, most):
    scenario, arm = short(), Arm(kind, epsilon)
    (result,) = compare(scenario, Options(tmp_path, arms=(kind,), noise_seed=1)).results
    assert not result.rejected
    before, after = apart(plan_for(scenario.plan, arm, 0), tmp_path, arm).mean(axis=1)
    assert after < most * before
    if epsilon:
        assert max(result.epsilon.values()) <= epsilon


def test_pooled_and_federated_take_the_same_effects_out(tmp_path):
    pooled, federated = compare(short(), Options(tmp_path, arms=("pooled", "federated"))).results
    assert pooled.curve[0]["auroc"] == pytest.approx(federated.curve[0]["auroc"], abs=1e-6)
