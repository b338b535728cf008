"""The guide's task and connector are added as it says, to a copy of the shared package, and train."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "guides" / "new-task.md"
BLOCKS = {
    found[2]: found[3]
    for found in re.finditer(r"```(python|toml|yaml)\n# (\S+)\n(.*?)```", GUIDE.read_text(), flags=re.S)
}


def write_records(folder: Path) -> None:
    draw = np.random.default_rng(1)
    for name in ("north", "south", "east"):
        age, asthma = draw.integers(18, 95, 300), draw.integers(0, 2, 300)
        visits = draw.poisson(np.exp(-0.5 + 0.015 * age + 0.9 * asthma)).clip(0, 40)
        rows = zip(age.tolist(), asthma.tolist(), visits.tolist(), strict=True)
        lines = [
            json.dumps({"patient": f"{name}-{at}", "age": a, "asthma": b, "visits": c})
            for at, (a, b, c) in enumerate(rows)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        (folder / f"{name}.yaml").write_text(BLOCKS["north.yaml"].replace("north", name))


@pytest.fixture
def extended(tmp_path):
    """A folder with the guide's files in their places, and the environment in which they are imported."""
    shared, installed = tmp_path / "shared", tmp_path / "site-packages"
    shutil.copytree(ROOT / "shared", shared, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in BLOCKS.items():
        if name.startswith("shared/"):
            (tmp_path / name).write_text(text)
    zoo = shared / "cloister_shared" / "tasks" / "zoo.py"
    text = zoo.read_text().replace("\nTask = Annotated[\n    ", "\nTask = Annotated[\n    Counts | ", 1)
    zoo.write_text(
        text.replace(
            "from cloister_shared.tasks.",
            "from cloister_shared.tasks.counts import Counts\nfrom cloister_shared.tasks.",
            1,
        )
    )
    # As pip would install the package.
    info = installed / "cloister_json_lines-1.dist-info"
    info.mkdir(parents=True)
    project = tomllib.loads(BLOCKS["pyproject.toml"])["project"]
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["cloister.connectors"]
    (info / "entry_points.txt").write_text(
        "[cloister.connectors]\n" + "".join(f"{name} = {where}\n" for name, where in points.items())
    )
    (installed / "cloister_json_lines.py").write_text(BLOCKS["cloister_json_lines.py"])
    write_records(tmp_path)
    (tmp_path / "visits.yaml").write_text(BLOCKS["visits.yaml"])
    places = [shared, installed, *(ROOT / part for part in ("server", "client", "simulations"))]
    return tmp_path, os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places))}


def test_the_guide_is_short():
    assert len(GUIDE.read_text().splitlines()) < 200
    code = sum(len(text.splitlines()) for text in BLOCKS.values())
    assert code < 150


@pytest.mark.slow
def test_the_guides_task_and_connector_train_together(extended):
    folder, environment = extended
    run = [sys.executable, "-m", "cloister_simulations.cli", "run", "visits.yaml", "--out", "out"]
    done = subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    errors = {
        arm: float(value) for arm, value in re.findall(r"^(.*), seed 0: RMSE (\d+\.\d+)", done.stdout, flags=re.M)
    }
    assert list(errors) == ["Pooled, no privacy", "Each hospital alone", "Federated, no privacy", "Federated, ε = 4"]
    assert errors["Federated, no privacy"] == pytest.approx(errors["Pooled, no privacy"], abs=0.1)
    assert errors["Federated, no privacy"] < 2.6  # the mean alone would be further off
    model = folder / "out" / "models" / "private-4"
    assert {"model.safetensors", "manifest.json", "MODEL_CARD.md"} <= {path.name for path in model.iterdir()}
    score = [
        "predict",
        "out/models/private-4",
        "north.yaml",
        "--site",
        "north.yaml",
        "--pinned",
        "out/models.roster.json",
    ]
    scored = subprocess.run(
        [sys.executable, "-m", "cloister_client.cli", *score],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert scored.returncode == 0, scored.stdout + scored.stderr
    assert "300 of 300 rows are scored" in scored.stdout


def test_a_connector_that_nobody_installed_is_refused_by_name(tmp_path):
    from cloister_client.connectors.connector import open_records
    from cloister_shared.errors import DataRefused

    (tmp_path / "site.yaml").write_text(BLOCKS["north.yaml"].replace("json-lines", "carrier-pigeon"))
    with pytest.raises(DataRefused, match="No installed package has the connector carrier-pigeon"):
        open_records(tmp_path / "site.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("site: north\n", "is missing"),
        ("site: north\ntable: {path: a.csv}\nconnector: {name: b}\n", "stands beside table"),
    ],
)
def test_a_hospital_names_one_source(tmp_path, text, said):
    from cloister_client.site_file import read_site
    from cloister_shared.errors import PlanRefused

    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(PlanRefused, match=said):
        read_site(tmp_path / "site.yaml")
