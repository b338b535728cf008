"""The hospital's and the consortium's commands: what a plan promises, or one sentence with the mend."""

from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cloister_client.cli import app as site
from cloister_server.cli import app as coordinator
from cloister_simulations.generated import GeneratedEhr
from cloister_simulations.hospitals import build


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    scenario = Path(str(files("cloister_simulations") / "scenarios" / "generated-ehr.yaml"))
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(scenario.read_text())["plan"], sort_keys=False))
    return path


def test_a_coordinator_reads_what_a_plan_promises(plan):
    done = CliRunner().invoke(coordinator, ["check", str(plan)])
    assert done.exit_code == 0
    assert "patient-level, epsilon 3 at delta 1e-05" in done.output
    assert "on: the coordinator sees only the sum" in done.output


def test_a_hospital_reads_its_quality_report_and_its_noise(plan, tmp_path):
    folder = build(GeneratedEhr(source="generated-ehr", sites=2, patients=400), tmp_path)[0]
    done = CliRunner().invoke(site, ["check", str(plan), str(folder)])
    assert done.exit_code == 0
    assert "Data quality at alder" in done.output
    assert "times the clip norm" in done.output


@pytest.mark.parametrize("command", [coordinator, site])
@pytest.mark.parametrize(("name", "said"), [("nope.yaml", "is not there"), (".", "is a folder")])
def test_a_missing_plan_is_a_sentence_with_its_mend(command, name, said, tmp_path):
    more = ["site.yaml"] if command is site else []
    done = CliRunner().invoke(command, ["check", str(tmp_path / name), *more])
    assert done.exit_code == 1
    assert said in done.output
    assert "Give the path of a plan in YAML." in done.output
