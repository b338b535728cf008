"""The secure sum's figures with small sizes: that they are measured, and that a missed one makes the exit code."""

import importlib
import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "simulations" / "benchmarks"


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def module(monkeypatch):
    """A measuring module with other constants."""

    def load(name, **constants):
        found = importlib.import_module(name)
        for constant, value in constants.items():
            monkeypatch.setattr(found, constant, value)
        return found

    return load


def measured(figures):
    return {figure.name: figure for figure in figures}


def test_masking(module):
    found = measured(module("masking_time", PARAMETERS=50_000, NEIGHBOURS=3, REPEATS=1).speed())
    assert found["mask.wire"].value == pytest.approx(0.2)
    assert found["mask.wire.flower"].value == pytest.approx(0.4, rel=1e-3)
    assert 0 < found["mask.cpu.floor"].value < found["mask.cpu.flower"].value


def test_rounds(module):
    secure_round = module("secure_round", REPEATS_LARGE=1, REPEATS_SMALL=1)
    secure_round.LARGE = replace(secure_round.LARGE, hospitals=8, parameters=2000)
    secure_round.SMALL = replace(secure_round.SMALL, hospitals=3, parameters=2000)
    found = measured(secure_round.figures())
    assert found["round.large.hospital.silent"].value > 0
    assert found["round.large.coordinator.lost"].value > 0
    assert found["round.large.mean"].value < 1e-4
    assert found["round.small"].value > 0


@pytest.mark.slow
def test_many_hospitals_and_exactness(module):
    for name, constants in (
        ("hundred_hospitals", {"PARAMETERS": 1000, "HOSPITALS": 5, "DROPPED": 1}),
        ("exactness", {"PARAMETERS": 2000, "HOSPITALS": 4, "SIZES": (0.05,), "COHORTS": {"small": (20, 20, 20)}}),
    ):
        found = measured(module(name, **constants).figures())
        assert all(figure.holds is not False for figure in found.values()), found
        assert any(figure.value == 0 for figure in found.values())


def test_a_wrong_sum_is_seen(module):
    hospitals = module("secure_hospitals")
    terms = hospitals.Terms(3, 100)
    with hospitals.sums_seen() as seen:
        hospitals.one_round(terms)
    assert hospitals.wrong_in(terms, seen[0]) == 0
    seen[0][7] += 1
    assert hospitals.wrong_in(terms, seen[0]) == 1


def test_a_line_of_the_table_of_costs(module):
    costs = module("secure_costs")
    (line,) = costs.rows([4], [1000])
    assert line.count("|") == costs.HEAD.splitlines()[0].count("|")


def test_a_figure_that_falls_short_makes_the_exit_code(module, capsys):
    suite, exactness = (
        module("suite"),
        module("exactness", PARAMETERS=1000, SIZES=(0.05,), COHORTS={"small": (20, 20, 20)}, BAR=1e-12),
    )
    exactness.figures = exactness.means
    assert suite.run("", {"exact": "exactness"}, ["--only", "exact.small", "--json"]) == 1
    assert {figure["verdict"] for figure in json.loads(capsys.readouterr().out)} == {"falls short", "no bar"}
    assert suite.run("", {"exact": "exactness"}, ["--only", "exact.small.flower"]) == 0
    assert suite.run("", {"mask": "no_such_module"}, []) == 1


def test_every_family_has_its_module():
    families = runpy.run_path(str(BENCHMARKS / "secure-sum.py"))["FAMILIES"]
    for name in families.values():
        assert callable(importlib.import_module(name).figures)
