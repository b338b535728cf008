"""A finished study's model leaves the coordinator signed; an unfinished one's does not."""

import shutil

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from cloister_server import folder
from cloister_server.cli import app
from cloister_server.store import Checkpoint, Store
from cloister_shared import model_file
from cloister_shared.layout import gathered, initial_model, layout_of
from cloister_shared.plan_file import read_plan

PLAN = yaml.safe_dump(
    {
        "study": "small",
        "title": "Small",
        "task": {"name": "tabular"},
        "table": {
            "target": {"name": "ill", "positive": 1, "negative": 0},
            "features": [{"name": "age", "kind": "number", "range": [18, 110]}],
        },
        "normalisation": {"method": "federated"},
        "cohort": {"min_sites": 2, "min_patients": 20},
        "rounds": 2,
        "strategy": {"name": "fedavg"},
        "training": {"learning_rate": 0.1, "batch_size": 16, "local_steps": 2},
        "privacy": {"mechanism": "none"},
    }
)


@pytest.fixture
def study(made_once, tmp_path, monkeypatch):
    """A study that ran its two rounds, in ./consortium; its consortium's open folder and its digest."""
    shutil.copytree(made_once, tmp_path / "consortium")
    monkeypatch.chdir(tmp_path)
    plan = read_plan(PLAN, "plan.yaml")
    opened = folder.open_consortium(tmp_path / "consortium")
    opened.registry.add_study(plan.digest, "small", PLAN, "plan.yaml", "officer", {}, "")
    opened.registry.add_round(plan.digest, 2, {"round": 2, "numbers": {"auroc": 0.75, "loss": 0.5, "clipped": 0.0}})
    model = initial_model(plan)
    vector = gathered(model, layout_of(plan, model).shared) + np.float32(1.0)
    store = Store(tmp_path / "consortium" / "studies" / plan.digest[:16])
    store.save(Checkpoint("run", plan.digest, 2, vector, normalisation=((50.0, 10.0),)))
    yield opened, plan.digest
    opened.registry.close()


def typed(*words):
    return CliRunner().invoke(app, ["study", "export", *words])


def test_a_finished_study_is_exported_under_the_consortiums_key(study, tmp_path):
    opened, digest = study
    opened.registry.move(digest, "finished")
    done = typed("small", "--out", "taken")
    assert done.exit_code == 0, done.output
    assert "signed by the consortium" in done.output
    model = model_file.read(tmp_path / "taken", {"North": opened.signing.public})
    assert (model.signer, model.manifest.digest, model.manifest.constants) == ("North", digest, ((50.0, 10.0),))
    assert model.manifest.metrics == {"auroc": 0.75, "loss": 0.5}
    assert "AUROC: 0.75" in (tmp_path / "taken" / "MODEL_CARD.md").read_text()
    assert '"study export"' in (tmp_path / "consortium" / "audit.jsonl").read_text()


def test_an_unfinished_study_is_not(study):
    done = typed("small")
    assert done.exit_code == 1
    assert "small is submitted. Export it once it is finished." in done.output


def test_nothing_is_written_over(study, tmp_path):
    opened, digest = study
    opened.registry.move(digest, "finished")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").touch()
    assert "exists and is not empty" in typed("small").output
