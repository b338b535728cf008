"""The hospital's and the consortium's commands: what a plan promises, or one sentence with the mend."""

import re
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


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A plan whose hospitals share the noise: nothing is turned off in it."""
    terms = yaml.safe_load(Path(str(files("cloister_simulations") / "scenarios" / "shared-noise.yaml")).read_text())
    terms["plan"]["cohort"] |= {"min_sites": 4}
    terms["plan"]["privacy"] |= {"epsilon_alone": None, "colluding": 1}
    path = tmp_path / "shared.yaml"
    path.write_text(yaml.safe_dump(terms["plan"], sort_keys=False))
    return path


def _amended(path: Path, **changes: object) -> Path:
    terms = yaml.safe_load(path.read_text())
    for key, change in changes.items():
        terms[key] = change
    path.write_text(yaml.safe_dump(terms, sort_keys=False))
    return path


def test_a_check_says_who_is_trusted_and_what_epsilon_holds(plan):
    done = CliRunner().invoke(coordinator, ["check", str(plan)])
    page = " ".join(done.output.split())
    for said in (
        "Protects a patient with all records",
        "Mechanism DP-SGD at each hospital. Each patient enters a step with all records by a draw of its own",
        "Trusted nobody outside the hospital",
        "Inside training, 20 rounds of 20 noisy steps each; sums and counts before round 1, within 10% of epsilon",
        "Outside EXACT metrics of held-out patients, in every round and at the end; the number of training rows of all",
        "Held-out metrics EXACT: outside ε.",
    ):
        assert said in page, said


def test_a_check_shows_who_must_collude(shared, tmp_path):
    folder = build(GeneratedEhr(source="generated-ehr", sites=4, patients=900), tmp_path)[0]
    for done in (
        CliRunner().invoke(coordinator, ["check", str(shared)]),
        CliRunner().invoke(site, ["check", str(shared), str(folder)]),
    ):
        assert done.exit_code == 0, done.output
        assert re.search(r"the coordinator alone +0 of 3 +115% +0\.\d{3}\n", done.output)
        assert re.search(r"with 1 of the other hospitals, as the plan allows for +1 of 3 +100% +1\.000\n", done.output)
        assert re.search(r"with all other hospitals +3 of 3 +58% +[1-9]\.\d{3}\n", done.output)
        assert not re.search("OFF|EXACT|NONE", done.output)
        assert max(map(len, done.output.splitlines())) <= 100


def test_what_is_turned_off_is_said_in_red(plan):
    open_plan = _amended(
        plan,
        privacy={"mechanism": "none"},
        aggregation={"secure_sum": False, "weights": "equal"},
    )
    done = CliRunner().invoke(coordinator, ["check", str(open_plan)], color=True)
    assert done.exit_code == 0, done.output
    red = re.findall(r"\x1b\[31m\x1b\[1m(.*?)\x1b\[0m", done.output)
    assert [sentence.split(":")[0] for sentence in red] == ["Differential privacy OFF", "Secure sum OFF"]
    assert "Trusted" not in done.output


@pytest.mark.parametrize(
    ("unit", "said"), [("record", "A patient with several is protected less"), ("site", "one hospital")]
)
def test_other_units_are_named(plan, unit, said):
    terms = yaml.safe_load(plan.read_text())
    changed = _amended(plan, privacy=terms["privacy"] | {"unit": unit}, normalisation={"method": "plan"})
    done = CliRunner().invoke(coordinator, ["check", str(changed)])
    assert done.exit_code == 0, done.output
    assert said in " ".join(done.output.split())


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
