"""Scenarios of time to event, effect, invention and fusion: a few rounds each, and what is found held to the truth."""

import numpy as np
import pandas as pd
import pytest
import torch

from cloister_shared.errors import PlanRefused
from cloister_shared.outcomes.binary import auroc
from cloister_shared.plan_file import amend
from cloister_shared.tasks.synthetic import Synthetic, parts
from cloister_simulations import boosting, synthetic_report
from cloister_simulations.federation import Arm, Options, Result, compare
from cloister_simulations.hospitals import build
from cloister_simulations.scenario import Scenario, read_scenario
from cloister_simulations.sources.censored import CensoredEhr, censored_ehr, log_hazard, outlives
from cloister_simulations.sources.multimodal import MultimodalEhr
from cloister_simulations.sources.trial import Trial, trial, true_effect, untreated

FEW = {"resamples": 100, "min_count": 2}


def quick(name: str, hospitals: dict[str, object], **changes: object) -> Scenario:
    full = read_scenario(name)
    source = full.simulation.hospitals.model_copy(update=hospitals)
    simulation = full.simulation.model_copy(update={"hospitals": source, "seeds": (0,)})
    cohort = {"min_sites": 2, "min_patients": 20}
    plan = amend(full.plan, **({"evaluation": FEW, "cohort": cohort} | changes))
    return full.model_copy(update={"simulation": simulation, "plan": plan})


def arms(scenario: Scenario, folder, *kinds: str) -> dict[str, Result]:
    return {r.arm.kind: r for r in compare(scenario, Options(folder, arms=kinds or None)).results}


def value(result: Result, metric: str) -> float:
    found = result.overall[metric].value
    assert found is not None
    return found


def without_privacy(scenario: Scenario, **changes: object) -> Scenario:
    none = {"mechanism": "none"} | dict.fromkeys(("unit", "epsilon", "delta", "clip_norm"))
    return scenario.model_copy(update={"plan": amend(scenario.plan, privacy=none, **changes)})


@pytest.mark.parametrize("source", ["censored-ehr", "trial", "multimodal-ehr"])
def test_the_same_terms_give_the_same_bytes(source, tmp_path):
    terms = {"censored-ehr": CensoredEhr, "trial": Trial, "multimodal-ehr": MultimodalEhr}[source](
        source=source, sites=2, patients=120
    )
    for name in ("a", "b"):
        build(terms, tmp_path / name)
    written = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert written
    for path in written:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


@pytest.mark.parametrize("name", ["survival", "treatment", "multimodal"])
def test_a_round_of_each_scenario(name, tmp_path):
    """Without privacy, and with: a coordinator's and three hospitals' whole way."""
    found = arms(quick(name, {"patients": 240, "sites": 3}, rounds=1), tmp_path, "federated", "private")
    assert set(found) == {"federated", "private"}
    for result in found.values():
        assert result.rejected == []
        assert set(result.sites) == {"alder", "birch", "cedar"}
    assert all(0 < spent <= 3.0 for spent in found["private"].epsilon.values())


# --- time to an event --------------------------------------------------------------------------------------
def test_known_hazards_are_those_of_who_dies():
    """Of a thousand patients whom nobody loses, as many outlive two years as the truth says."""
    source = CensoredEhr(source="censored-ehr", sites=2, patients=4000, lost=0.0, hazard_shift=0.0)
    table = pd.concat([hospital.table for hospital in censored_ehr(source)])
    expected = outlives(log_hazard(table), np.array([24.0])).mean()
    assert (table["months"] > 24).mean() == pytest.approx(expected, abs=0.02)


@pytest.mark.slow
def test_hazards_are_learned_federated_and_under_privacy(tmp_path):
    found = arms(quick("survival", {"patients": 1500, "sites": 3}, rounds=12), tmp_path)
    assert set(found) == {"pooled", "alone", "federated", "private"}
    assert value(found["federated"], "c_index") == pytest.approx(value(found["pooled"], "c_index"), abs=0.03)
    assert value(found["federated"], "c_index") > 0.7
    assert value(found["federated"], "integrated_brier") < 0.2
    assert value(found["private"], "c_index") > 0.6


def test_coxs_model_is_refused_under_privacy_and_trains_without(tmp_path):
    scenario = quick("survival", {"patients": 1500, "sites": 3}, rounds=12)
    with pytest.raises(PlanRefused, match="a loss in which all patients at risk share"):
        amend(scenario.plan, task={"name": "cox", "hidden": []})
    plain = without_privacy(scenario)
    terms = {"name": "cox"}
    cox = plain.model_copy(update={"plan": amend(plain.plan, task=terms)})
    found = arms(cox, tmp_path, "federated")
    assert value(found["federated"], "c_index") > 0.7
    assert value(found["federated"], "integrated_brier") < 0.2


# --- what a treatment changes ------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("model", ["t-learner", "dr-learner"])
def test_a_trials_effect_is_near_the_truth(model, tmp_path):
    scenario = quick("treatment", {"patients": 3000, "sites": 3}, rounds=20, task={"model": model})
    table = pd.concat([hospital.table for hospital in trial(scenario.simulation.hospitals)])
    gain, without = true_effect(table), untreated(table)
    found = arms(scenario, tmp_path, "federated", "private")
    for kind, slack in (("federated", 0.5), ("private", 0.8)):
        assert value(found[kind], "mean_effect") == pytest.approx(gain.mean(), abs=slack)
        assert value(found[kind], "policy_value") == pytest.approx((without + np.maximum(gain, 0)).mean(), abs=slack)
        assert value(found[kind], "uplift") > 0.7
        assert value(found[kind], "overlap") > 0.95


def test_a_plain_difference_is_wrong_where_doctors_choose():
    table = list(trial(Trial(source="trial", sites=2, patients=4000, confounding=1.5)))[-1].table
    treated = table["treated"] == 1
    plain = table["systolic_fall"][treated].mean() - table["systolic_fall"][~treated].mean()
    assert plain - true_effect(table).mean() > 1.5


# --- fusion ------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_hospital_without_pictures_takes_part(tmp_path):
    scenario = quick("multimodal", {"patients": 400, "sites": 3}, rounds=3)
    found = arms(scenario, tmp_path)
    assert set(found) == {"pooled", "alone", "federated", "private"}
    assert found["private"].rejected == []
    assert not (tmp_path / "hospitals" / "cedar" / "pictures").exists()
    assert found["federated"].curve[-2]["loss"] < found["federated"].curve[0]["loss"]


# --- invented patients -------------------------------------------------------------------------------------
@pytest.fixture
def invented() -> Scenario:
    """A generator of the invented hospitals' patients: it needs no real records."""
    full = read_scenario("generated-ehr")
    features = [feature.model_dump(mode="json") for feature in full.plan.table.features]
    features.append({"name": "deteriorated", "kind": "boolean"})
    plan = amend(
        full.plan,
        study="invented",
        rounds=5,
        task={"name": "synthetic", "model": "chain"},
        table={"features": features, "target": {"kind": "itself"}, "duplicates": "allow"},
        normalisation={"method": "plan"},
        privacy={"clip_norm": 3.0},
        cohort={"min_sites": 2, "min_patients": 20},
        evaluation=FEW,
    )
    hospitals = full.simulation.hospitals.model_copy(update={"sites": 3, "patients": 700})
    simulation = full.simulation.model_copy(update={"hospitals": hospitals, "seeds": (0,), "epsilons": (3.0,)})
    return Scenario(simulation=simulation, plan=plan, name="invented")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["chain", "vae"])
def test_a_drawn_table_is_one_of_the_plans_and_is_judged(invented, model, tmp_path):
    scenario = invented.model_copy(update={"plan": amend(invented.plan, task={"model": model})})
    assert set(arms(scenario, tmp_path, "federated", "private")) == {"federated", "private"}
    for arm in (Arm("federated"), Arm("private", 3.0)):
        worth = synthetic_report.judge(scenario, tmp_path, arm, "deteriorated", rows=600)
        assert worth.rows == 600  # the connector took every drawn row
        assert 0 < worth.marginal < 0.6
        assert 0.4 < worth.nearer_to_trained < 0.6
        assert 0.4 < worth.membership < 0.6
        assert 0 <= worth.copies <= 1
    table = pd.read_csv(tmp_path / "seed-0" / "private-3" / "synthetic" / "synthetic.csv")
    assert set(table["sex"]) == {"female", "male"}
    assert table["charlson"].between(0, 37).all()
    assert table["creatinine"].between(0.2, 15).sum() + table["creatinine"].isna().sum() == 600


def test_training_brings_the_drawn_table_nearer(invented, tmp_path):
    far = invented.model_copy(update={"plan": amend(invented.plan, rounds=1, training={"local_steps": 1})})
    found = []
    for scenario, name in ((far, "far"), (invented, "near")):
        arms(scenario, tmp_path / name, "federated")
        found.append(synthetic_report.judge(scenario, tmp_path / name, Arm("federated"), "deteriorated"))
    assert found[1].marginal < found[0].marginal / 2
    assert found[1].taught_by_drawn > 0.6


def test_a_generator_that_remembers_is_found_out():
    """Distances to rows that were copied from the trained ones tell who was trained on."""
    scenario = read_scenario("synthetic")
    assert isinstance(scenario.plan.task, Synthetic)
    made = parts(scenario.plan.table, scenario.plan.task.bins)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(600, sum(part.columns for part in made), generator=draw)
    worth = synthetic_report._worth(
        scenario.plan, x[:300], x[300:], x[:300], "readmitted_30d", np.random.default_rng(0)
    )
    assert worth.membership > 0.95
    assert worth.nearer_to_trained > 0.95
    assert worth.copies == 1.0
    assert worth.marginal == 0.0


# --- trees -------------------------------------------------------------------------------------------------
def test_federated_trees_are_the_pooled_ones_and_learn_a_product():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(3000, 3)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] > 0).astype(float)
    terms = boosting.Terms(trees=30, depth=3, learning_rate=0.3)
    scores = []
    for cuts in ([], [700, 1500]):
        hospitals = [
            boosting.Hospital(*pair) for pair in zip(np.split(x[:2000], cuts), np.split(y[:2000], cuts), strict=True)
        ]
        watching = boosting.Hospital(x[2000:], y[2000:])
        boosting.boosted(hospitals, [watching], terms)
        scores.append(watching.score)
    assert scores[0] == pytest.approx(scores[1])
    assert auroc(y[2000:], 1 / (1 + np.exp(-scores[0]))) > 0.97


# --- real records ------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_real_intensive_care_stays_of_eight_networks(data_dir, tmp_path):
    data_dir("eicu_demo")
    found = arms(quick("icu-death", {}, rounds=3), tmp_path, "federated", "private")
    assert len(found["federated"].sites) == 8
    assert found["federated"].curve[-2]["loss"] < found["federated"].curve[0]["loss"]


@pytest.mark.slow
def test_a_generator_of_real_encounters(data_dir, tmp_path):
    data_dir("diabetes130")
    scenario = quick("synthetic", {"max_rows": 3000}, rounds=3)
    arms(scenario, tmp_path, "private")
    worth = synthetic_report.judge(scenario, tmp_path, Arm("private", 3.0), "readmitted_30d", rows=500)
    assert worth.marginal < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("task", [{"width": 8}, {"width": 8, "depth": 2}])
def test_a_transformer_reads_the_invented_hospitals_tables(small, task, tmp_path):
    terms = {"name": "tabular-transformer"} | task
    scenario = small.model_copy(update={"plan": amend(small.plan, task=terms, training={"learning_rate": 0.1})})
    found = arms(scenario, tmp_path, "federated", "private")
    assert found["federated"].curve[-2]["loss"] < found["federated"].curve[0]["loss"]
