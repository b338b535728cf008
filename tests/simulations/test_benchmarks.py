"""The harness of the benchmarks: verdicts, the table, the exit code. The figures themselves take too long."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "simulations" / "benchmarks"


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import figures  # pyright: ignore[reportMissingImports]

    return figures


@pytest.fixture
def study(figures):
    import study  # pyright: ignore[reportMissingImports]

    return study


@pytest.fixture
def suite(figures):
    import suite  # pyright: ignore[reportMissingImports]

    return suite


def test_a_bar_is_met_or_missed_on_its_edge(figures):
    assert figures.at_most("a", 3.0, 3.0).verdict == "holds"
    assert figures.at_most("a", 3.01, 3.0).verdict == "falls short"
    assert figures.at_least("a", 30, 30).verdict == "holds"
    assert figures.near("a", 0.749, 0.731, 0.02).verdict == "holds"
    assert figures.near("a", 0.752, 0.731, 0.02).verdict == "falls short"
    assert figures.told("a", 1.0).verdict == "no bar"
    assert figures.missed("a", "why").verdict == "falls short"


def test_a_line_fits_a_terminal_of_100_columns(figures):
    line = figures.at_most("engines.private", 1e-7, 1e-6, "{:.1e} of the largest weight").line()
    assert len(line) <= 100
    assert line.endswith("holds")


def test_a_missed_figure_is_printed_and_the_exit_code_says_so(figures, study, suite, monkeypatch, capsys):
    found = [figures.at_most("memory.aggregation", 4.0, 3.0), figures.told("memory.before", 1.0)]
    monkeypatch.setattr(suite, "measure", lambda family, module: found)
    assert suite.run("", study.FAMILIES, ["--only", "memory"]) == 1
    assert [line.rsplit("  ", 1)[-1].strip() for line in capsys.readouterr().out.splitlines()] == [
        "falls short",
        "no bar",
    ]
    assert suite.run("", study.FAMILIES, ["--only", "memory.before"]) == 0


def test_a_family_that_breaks_is_a_figure_missed(suite):
    (figure,) = suite.measure("memory", "no_such_module")
    assert figure.holds is False
    assert "ModuleNotFoundError" in figure.measured


@pytest.mark.slow
def test_json_from_the_command_line():
    command = [sys.executable, str(BENCHMARKS / "study.py"), "--json", "--only", "epsilon"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (figure,) = json.loads(done.stdout)
    assert figure["name"] == "epsilon.from-dp-accounting"
    assert figure["verdict"] == "holds"


@pytest.mark.slow
def test_the_coordinator_holds_two_models_whatever_the_number_of_replies(figures):
    """One sum and one reply. Large enough that malloc gives back at once what is let go: more than 32 MB."""
    assert figures.in_fresh_process(str(BENCHMARKS / "memory.py"), "10000000")["peak"] < 2.5


def test_an_unknown_family_is_named(study, suite, capsys):
    with pytest.raises(SystemExit):
        suite.run("", study.FAMILIES, ["--only", "no-such"])
    assert "there is no no-such" in capsys.readouterr().err
