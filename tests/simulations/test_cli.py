"""The command line: a run from a file, and every mistake answered by a sentence."""

import io
import json
import re
import subprocess
import sys
import time

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from cloister_simulations import cli, federation
from cloister_simulations.engines import ENGINES
from cloister_simulations.federation import Arm, Result
from cloister_simulations.scenario import shipped

HEAVY = ("torch", "opacus", "pandas", "flwr", "sklearn", "matplotlib", "rich", "pydantic", "numpy", "scipy", "jinja2")


def sim(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture
def scenario(small, tmp_path):
    """A scenario file of three rounds at three invented hospitals."""
    terms = {
        "simulation": small.simulation.model_dump(mode="json"),
        "plan": small.plan.model_dump(mode="json") | {"rounds": 3},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(terms), encoding="utf-8")
    return path


def test_a_run_prints_its_findings_and_writes_its_report(scenario, tmp_path):
    out = tmp_path / "out"
    done = sim("run", scenario, "--out", out, "--arm", "pooled", "--arm", "federated")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Pooled, no privacy, seed 0: AUROC 0.")
    assert lines[1].startswith("Federated, no privacy, seed 0: AUROC 0.")
    assert str(out / "report.html") in done.stdout
    assert "What to try next" in done.stdout
    assert "Each hospital alone" not in done.stdout
    assert "<svg" in (out / "report.html").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["of"] for row in rows].count("round") == 2 * (3 + 1)

    before = (out / "seed-0" / "federated" / "checkpoint.safetensors").stat().st_mtime_ns
    again = sim("run", scenario, "--out", out, "--arm", "pooled", "--arm", "federated", "--resume")
    assert again.exit_code == 0
    assert (out / "seed-0" / "federated" / "checkpoint.safetensors").stat().st_mtime_ns == before


def test_a_dropped_reply_is_reported_and_not_waited_for(scenario, tmp_path):
    began = time.monotonic()
    done = sim("run", scenario, "--out", tmp_path / "out", "--arm", "federated", "--fault", "drop:birch:2")
    assert done.exit_code == 0, done.output
    assert time.monotonic() - began < 60  # and not the plan's round_timeout, ten minutes
    assert "round 2, birch: no answer within" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_reproducible_noise_is_warned_of(scenario, tmp_path):
    out = tmp_path / "out"
    done = sim("run", scenario, "--out", out, "--arm", "private", "--reproducible-noise", "7")
    assert done.exit_code == 0, done.output
    assert "NOISE REPRODUCIBLE: this run gives no privacy." in done.stderr
    assert "NOISE REPRODUCIBLE" in done.stdout
    assert "this run gives no privacy" in (out / "report.html").read_text(encoding="utf-8")
    resumed = sim("run", scenario, "--out", out, "--arm", "private", "--resume")
    assert "NOISE REPRODUCIBLE" in resumed.stdout  # leaving the option out later does not wash it off


def test_list_names_every_scenario():
    done = sim("list")
    assert done.exit_code == 0
    assert all(name in done.stdout for name in shipped())
    assert "four real hospitals" in done.stdout
    assert "20 rounds, 3 seeds, ε 3, 1" in done.stdout


def test_check_names_the_plan(scenario, small):
    done = sim("check", scenario)
    assert done.exit_code == 0
    plan = small.plan.model_copy(update={"rounds": 3})
    for text in (plan.digest, "4 invented hospitals", f"features     {len(plan.table.features)}", "epsilon      2"):
        assert text in done.stdout


def test_check_shows_a_certificate_for_each_epsilon():
    done = sim("check", "shared-noise")
    assert done.exit_code == 0, done.output
    assert re.findall(r"^Federated, ε = (\S+)$", done.stdout, flags=re.M) == ["2", "1"]
    assert re.search(r"the coordinator alone +0 of 19 +100% +1\.000\n", done.stdout)
    assert done.stdout.count("with all other hospitals ") == 2
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_a_plan_without_exact_metrics_runs_and_tells_only_noise(scenario, tmp_path):
    terms = yaml.safe_load(scenario.read_text(encoding="utf-8"))
    terms["plan"]["evaluation"]["epsilon_share"] = 0.2
    terms["plan"]["statistics"] = {"histograms": 4, "epsilon_share": 0.2}
    scenario.write_text(yaml.safe_dump(terms), encoding="utf-8")
    out = tmp_path / "out"
    done = sim("run", scenario, "--out", out, "--arm", "private")
    assert done.exit_code == 0, done.output
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "The final model, as told and in truth" in page
    assert page.count('class="card"') == 17
    assert 'class="bad"' not in page
    result = json.loads((out / "seed-0" / "private-2" / "result.json").read_text(encoding="utf-8"))
    assert [point["round"] for point in result["curve"] if "auroc" in point] == [3]
    value = result["learned"]["final auroc"]  # of so few patients noise may leave nobody with the outcome
    assert value is None or 0 <= value <= 1
    assert len(result["cohort"]["age"]["quartiles"]) in (0, 3)  # none, where noise has left nobody


# --- mistakes ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "There is no scenario nowhere."),
        (["breast-cancer", "--engine", "abacus"], "There is no engine abacus. Write one of in-process, ray."),
        (["breast-cancer", "--arm", "left"], "There is no arm left."),
        (["breast-cancer", "--seed", "x"], "--seed x is not a whole number"),
        (["breast-cancer", "--seed", "-1"], "--seed -1 is not a whole number"),
        (["breast-cancer", "--seed", str(2**31)], "is not a whole number from 0"),
        (["breast-cancer", "--reproducible-noise", "yes"], "--reproducible-noise yes is not a whole number"),
        (["breast-cancer", "--fault", "drop:alder"], "The fault 'drop:alder' cannot be read."),
        (["breast-cancer", "--fault", "drop:nobody:3"], "There is no hospital nobody."),
        (["breast-cancer", "--fault", "drop:alder:21"], "There is no round 21. Write one from 1 to 20."),
    ],
)
def test_a_mistake_is_answered_by_a_sentence(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = sim("run", *arguments)
    assert done.exit_code == 1
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    done = sim("run", "breast-cancer", "--out", tmp_path / "file" / "below")
    assert done.exit_code == 1
    assert "Nothing can be written in" in done.stderr
    assert done.stderr.endswith("Name another with --out.\n")


def test_a_refused_plan_names_the_line(scenario):
    scenario.write_text(scenario.read_text(encoding="utf-8").replace("epsilon:", "epsilom:"), encoding="utf-8")
    done = sim("check", scenario)
    assert done.exit_code == 1
    assert "Did you mean epsilon?" in done.stderr


def test_private_arms_of_a_plan_without_privacy_are_refused(scenario, tmp_path):
    terms = yaml.safe_load(scenario.read_text(encoding="utf-8"))
    terms["plan"]["privacy"] = {"mechanism": "none"}
    terms["simulation"]["epsilons"] = []
    scenario.write_text(yaml.safe_dump(terms), encoding="utf-8")
    done = sim("run", scenario, "--out", tmp_path / "out", "--arm", "private")
    assert done.exit_code == 1
    assert "no arm private" in done.stderr


def test_a_fault_exits_with_two(scenario, tmp_path):
    faults = ["--fault", "nan:birch:2", "--fault", "nan:cedar:2"]
    done = sim("run", scenario, "--out", tmp_path / "out", "--arm", "federated", *faults)
    assert done.exit_code == 2
    assert "Round 2: 2 of the 3 hospitals needed" in done.stderr
    assert "Traceback" not in done.output


def test_an_interrupt_says_how_to_go_on(scenario, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(federation, "compare", interrupted)
    done = sim("run", scenario, "--out", tmp_path / "out")
    assert done.exit_code == 130
    assert done.stderr.strip() == "Interrupted; the same command with --resume goes on."


# --- the rest ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], []])
def test_help_imports_nothing_slow(arguments):
    code = f"""
import sys
from cloister_simulations.cli import app
try:
    app({arguments!r})
except SystemExit:
    pass
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "[]"
    assert "Usage" in done.stdout + done.stderr


def test_the_words_of_the_options_are_those_of_the_code(small):
    assert set(cli.ENGINES) == set(ENGINES)
    assert {arm.kind for arm in federation.arms_of(small)} == set(cli.ARMS)


def test_a_terminal_shows_a_bar_for_each_arm(small):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    arms = [Arm("pooled"), Arm("federated")]
    finished = Result(arms[1], 1, {}, {}, [], [])
    with cli._watched(small, (0, 1), arms, console) as (notice, done):
        notice(arms[0], 0, 2, {"auroc": 0.75})
        done(finished)
    text = screen.getvalue()
    assert "Pooled, no privacy" in text
    assert "2/8 rounds AUROC 0.750" in text
    assert "8/8 rounds" in text
