"""Scenarios of pictures, made small: every arm runs, with the secure sum, and what is learned is learned."""

import numpy as np
import pytest
import torch

from cloister_client.connectors.connector import open_records
from cloister_client.dataset import load_dataset
from cloister_shared.errors import CohortTooSmall
from cloister_shared.plan_file import amend
from cloister_simulations.federation import Options, compare
from cloister_simulations.hospitals import build
from cloister_simulations.scenario import read_scenario
from cloister_simulations.sources.phantoms import phantom
from cloister_simulations.sources.pneumonia import Pneumonia


def small(name, hospitals, **changes):
    """A shipped scenario with few records and rounds."""
    whole = read_scenario(name)
    source = whole.simulation.hospitals.model_copy(update=hospitals)
    plan = amend(whole.plan, **{"rounds": 2, "evaluation": {"resamples": 100, "min_count": 1}, **changes})
    simulation = whole.simulation.model_copy(update={"hospitals": source, "seeds": (0,)})
    return whole.model_copy(update={"plan": plan, "simulation": simulation})


def figures(scenario, folder, *arms):
    """Each arm's headline metrics, and that privacy was spent where it was promised."""
    results = {result.arm.kind: result for result in compare(scenario, Options(folder, arms=arms)).results}
    if "private" in results:
        spent = results["private"].epsilon.values()
        assert all(0 < epsilon <= scenario.plan.privacy.epsilon for epsilon in spent)
        assert len(spent) == scenario.simulation.hospitals.sites
    return results


def test_every_scenario_of_pictures_has_privacy_and_the_secure_sum():
    for name in ("pneumonia", "lesions", "lesions-3d", "dicom"):
        plan = read_scenario(name).plan
        assert plan.private
        assert plan.privacy.unit == "patient"
        assert plan.aggregation.secure_sum


@pytest.mark.slow
def test_dicom_archives_train(tmp_path):
    scenario = small("dicom", {"patients": 24}, cohort={"min_patients": 5}, task={"widths": [8, 8]})
    results = figures(scenario, tmp_path, "federated", "private")
    assert set(results) == {"federated", "private"}
    assert not any(result.rejected for result in results.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lesions", "lesions-3d"])
def test_lesions_are_found(tmp_path, name):
    size = {"lesions": (16, 16), "lesions-3d": (16, 16, 16)}[name]
    scenario = small(
        name,
        {"patients": 20, "size": size, "noise": 0.02, "reach": (0.25, 0.4)},
        rounds=6,
        cohort={"min_patients": 5},
        table={"features": [{"name": "scan", "kind": "image", "size": list(size), "range": [0.0, 255.0]}]},
        training={"learning_rate": 0.02, "batch_size": 8, "local_steps": 6 if name == "lesions" else 2},
    )
    results = figures(scenario, tmp_path, "federated", "private")
    first, last = (results["federated"].curve[at]["dice"] for at in (0, -1))
    assert last > first + 0.1
    assert set(results["federated"].overall) == {"dice", "hausdorff_95", "lesion_sensitivity", "false_lesions"}


# --- the hospitals -----------------------------------------------------------------------------------------------
def test_x_rays_keep_the_official_test_apart(data_dir, tmp_path):
    data_dir("pneumoniamnist_subset")
    plan = amend(read_scenario("pneumonia").plan, evaluation={"min_count": 1})
    loaded = [load_dataset(open_records(path), plan) for path in build(Pneumonia(source="pneumonia"), tmp_path)]
    assert len(loaded) == 5
    assert sum(len(one.test) for one in loaded) == 624
    assert sum(int(one.test.y.sum()) for one in loaded) == 390
    assert sum(len(one.train) for one in loaded) == 3882 + 524
    raw = np.load(data_dir("pneumoniamnist_subset") / "pneumoniamnist.npz")
    seen = np.sort(np.concatenate([one.test.x.numpy() for one in loaded]).sum(1))
    expected = np.sort((raw["test_images"].reshape(624, -1) / 127.5 - 1).astype(np.float32).sum(1))
    assert seen == pytest.approx(expected, abs=1e-2)


@pytest.mark.slow
def test_a_quick_run_takes_a_part_of_the_x_rays(data_dir, tmp_path):
    data_dir("pneumoniamnist_subset")
    scenario = small(
        "pneumonia", {"pictures": 300, "sites": 3}, cohort={"min_sites": 3, "min_patients": 10}, task={"widths": [8, 8]}
    )
    results = figures(scenario, tmp_path, "federated", "private")
    assert set(results) == {"federated", "private"}


def test_a_hospital_with_one_patient_is_told_so(tmp_path):
    scenario = small("lesions", {"patients": 10, "size": (16, 16)})
    (path, *_) = build(scenario.simulation.hospitals, tmp_path)
    table = path.parent / "table.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:2]) + "\n")
    with pytest.raises(CohortTooSmall, match="fewer than the plan's minimum"):
        load_dataset(open_records(path), scenario.plan)


def test_hospitals_of_phantoms_are_the_same_each_time_and_differ_from_each_other(tmp_path):
    source = read_scenario("lesions-3d").simulation.hospitals.model_copy(update={"patients": 10, "size": (16, 16, 16)})
    once, again = (build(source, tmp_path / name) for name in "ab")
    files = [sorted(path.parent.rglob("*.nii.gz")) for path in once]
    assert len(files[0]) == 20
    assert [one.read_bytes() for one in files[0]] == [
        one.read_bytes() for one in sorted(again[0].parent.rglob("*.nii.gz"))
    ]
    assert files[0][0].read_bytes() != files[1][0].read_bytes()


def test_a_lesion_is_brighter_than_the_tissue_around_it():
    seen = [phantom((32, 32), np.random.default_rng(seed), noise=0.0) for seed in range(20)]
    assert any(lesions.any() for _, lesions in seen)
    for picture, lesions in seen:
        tissue = picture[(picture > 100) & (lesions == 0)]
        if lesions.any():
            assert picture[lesions > 0].min() > np.median(tissue)


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [1, 1, 1, 1]])
def test_a_site_without_one_of_the_outcomes_trains_on_the_other(labels):
    from cloister_client.clipping import Clipper
    from cloister_shared.objective import objective_of

    plan = read_scenario("dicom").plan
    model = plan.task.network(plan.table)
    clipper = Clipper(model, objective_of(plan).loss, 1.0)
    norms = clipper.add(torch.randn(4, 1024), torch.tensor(labels, dtype=torch.float32), torch.arange(4), 4)
    assert bool((norms > 0).all())
    assert all(bool(total.isfinite().all()) for total in clipper.take())
