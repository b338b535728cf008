"""The report of outcomes that are not yes or no: every figure under its own name, and what is better said right."""

import html
import re

import pytest
from rich.console import Console

from cloister_shared.outcomes.judging import Estimate
from cloister_shared.outcomes.outcome import meaning, outcome_of, title
from cloister_shared.schema import Classes, Effect, Itself, Labels, Quantity, Survival
from cloister_simulations import findings, report
from cloister_simulations.federation import Arm, Comparison, Result

ARMS = {Arm("pooled"): 0.5, Arm("alone"): 0.7, Arm("federated"): 0.55}
TARGETS = {
    "quantity": Quantity(kind="quantity", name="stay", range=(0.0, 60.0)),
    "classes": Classes(kind="classes", name="ward", classes=("a", "b", "c")),
    "labels": Labels(kind="labels", name="codes", labels=("x", "y")),
    "survival": Survival(kind="survival", name="days", event="died", cuts=(30.0, 90.0)),
    "effect": Effect(kind="effect", name="score", treatment="given", range=(0.0, 1.0), larger_is_better=False),
    "itself": Itself(kind="itself"),
}


def invented(small, folder, target) -> Comparison:
    plan = small.plan.model_copy(update={"table": small.plan.table.model_copy(update={"target": target})})
    outcome = outcome_of(plan.table)

    def metrics(value):
        others = dict.fromkeys(outcome.metrics, Estimate(0.25, 0.2, 0.3, 90))
        return others | {outcome.headline: Estimate(value, value - 0.01, value + 0.01, 90)}

    results = [
        Result(
            arm,
            0,
            overall=metrics(value),
            sites={"alder": metrics(value), "birch": metrics(value)},
            curve=[{"round": n, "loss": 1.0, outcome.headline: value + 1 - n / 4} for n in range(5)],
            reliability=[],
            ditto={"alder": metrics(0.45)} if arm.kind == "federated" else {},
        )
        for arm, value in ARMS.items()
    ]
    counts = {"train": 80, "test": 30, "patients": 100, "positives": 33, "training patients": 80, "most records": 1}
    scenario = small.model_copy(update={"plan": plan})
    return Comparison(scenario, results, {"alder": counts, "birch": counts}, "in-process", False, folder)


@pytest.mark.parametrize("kind", TARGETS)
def test_a_report_names_what_it_measures(small, tmp_path, kind):
    found = invented(small, tmp_path, TARGETS[kind])
    outcome = outcome_of(found.scenario.plan.table)
    page = html.unescape(report.html(found).replace("<br>", " "))
    for name in (outcome.headline, *outcome.beside):
        assert title(name) in page
        assert meaning(name)
    if kind in ("quantity", "survival", "effect"):
        assert "AUROC" not in page
    assert "Calibration: are the predicted risks right?" not in page
    assert 'data-of="positive"' not in page
    assert ('data-of="event"' in page) == (kind == "survival")


@pytest.mark.parametrize("kind", TARGETS)
def test_tables_fit_whatever_is_measured(small, tmp_path, kind):
    console = Console(width=200)
    found = invented(small, tmp_path, TARGETS[kind])
    with console.capture() as captured:
        for table in report.tables(found):
            console.print(table)
    text = captured.get()
    assert max(map(len, text.splitlines())) <= 100
    assert re.search(r"alder .* 0\.700 +0\.550 +0\.450\n", text)


def test_where_less_is_better_it_is_said(small, tmp_path):
    said = " ".join(findings.summary(invented(small, tmp_path, TARGETS["quantity"])))
    assert "The measure is RMSE with its 95% interval: 0 is perfect, lower is better." in said
    assert "reaches 0.550 (0.540–0.560), 0.050 above pooling" in said
    assert "is lower, which is better, at 2 and higher at 0 of 2 hospitals" in said


def test_where_more_is_better_nothing_else_is_said(small, tmp_path):
    said = " ".join(findings.summary(invented(small, tmp_path, TARGETS["classes"])))
    assert "The measure is accuracy with its 95% interval: 1 is perfect." in said
    assert "is higher at 0 and lower at 2 of 2 hospitals" in said
    assert "of rows have the outcome" not in said
