"""The report from invented results: what it must say, and that it stands alone."""

import html
import json
import re
from dataclasses import replace

import pytest
import yaml
from rich.console import Console

from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend
from cloister_shared.tasks.metrics import METRICS, Estimate
from cloister_simulations import findings, report
from cloister_simulations.federation import Arm, Comparison, Result

POOLED, ALONE, FEDERATED, PRIVATE = Arm("pooled"), Arm("alone"), Arm("federated"), Arm("private", 2.0)
AUROCS = {POOLED: 0.84, ALONE: 0.78, FEDERATED: 0.83, PRIVATE: 0.8}


def metrics(auroc, half=0.05):
    names = [*METRICS, "accuracy"]
    return dict.fromkeys(names, Estimate(0.5, 0.4, 0.6, 90)) | {
        "auroc": Estimate(auroc, auroc - half, auroc + half, 90)
    }


def result(arm, seed, half=0.05):
    auroc = AUROCS[arm] + 0.01 * seed
    return Result(
        arm=arm,
        seed=seed,
        overall=metrics(auroc, half),
        sites={"alder": metrics(auroc + 0.02, half), "birch": metrics(auroc - 0.02, half), "cedar": {}},
        curve=[{"round": n, "loss": 1 / (n + 1), "auroc": 0.5 + n * (auroc - 0.5) / 4} for n in range(5)],
        reliability=[(0.1, 0.12, 40), (0.5, 0.45, 30), (0.9, 0.95, 20)],
        epsilon={"alder": 1.91, "birch": 1.98765, "cedar": 1.5} if arm is PRIVATE else {},
        rejected=["round 3, birch: <late> & gone"] if arm is FEDERATED and seed else [],
        plan="d" * 64,
    )


@pytest.fixture
def comparison(small, tmp_path):
    rows = {
        name: {
            "train": train,
            "test": 30,
            "patients": train,
            "positives": 20,
            "training patients": train,
            "most records": 3,
        }
        for name, train in (("birch", 80), ("alder", 120), ("cedar", 40))
    }
    results = [result(arm, seed) for seed in (0, 1) for arm in AUROCS]
    return Comparison(small, results, rows, "in-process", False, tmp_path)


def with_plan(comparison, **changes):
    plan = amend(comparison.scenario.plan, **changes)
    return replace(comparison, scenario=comparison.scenario.model_copy(update={"plan": plan}))


def without(comparison, *kinds):
    return replace(comparison, results=[r for r in comparison.results if r.arm.kind not in kinds])


def words(page):
    """What a reader sees, roughly: no tags, single spaces."""
    text = re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(text))


def said(comparison):
    return " ".join(findings.summary(comparison))


# --- the page ----------------------------------------------------------------------------------------------
def test_the_page_needs_nothing_from_anywhere(comparison):
    page = report.html(comparison)
    assert "http" not in page
    assert not re.search(r"<(script|link|img|iframe|object)\b|@import", page)
    assert set(re.findall(r"url\(([^)]*)\)", page)) <= {f"#{name}" for name in re.findall(r'id="([^"]+)"', page)}
    assert all(target.startswith("#") for target in re.findall(r'(?:href|src)="([^"]*)"', page))


def test_ids_are_unique_so_that_no_figure_borrows_from_another(comparison):
    ids = re.findall(r'id="([^"]+)"', report.html(comparison))
    assert len(ids) == len(set(ids))


def test_the_page_says_what_each_reader_looks_for(comparison):
    page = words(report.html(comparison))
    plan = comparison.scenario.plan
    for text in (
        plan.title,
        plan.digest,
        "0.845 (0.795–0.895)",  # pooled: mean over seeds of value and limits
        "0.840–0.850",  # and the range over seeds
        "1.99",  # the most that a ledger counts
        "1.9876",
        "Add or remove one record",
        "constants written in the plan",
        "Federated, no privacy, seed 1: round 3, birch: <late> & gone",
        "engine in-process",
        "seeds 0, 1",
        "fewer than 2 held-out rows",
    ):
        assert text in page, text


def test_the_plan_on_the_page_is_the_plan(comparison):
    shown = re.search(r"<pre>(.*?)</pre>", report.html(comparison), flags=re.S)
    assert shown
    terms = yaml.safe_load(html.unescape(shown[1]))
    assert StudyPlan.model_validate_json(json.dumps(terms)).digest == comparison.scenario.plan.digest


def test_secure_sum_off_is_said_in_red(comparison):
    assert 'class="bad"' not in report.html(comparison)
    page = report.html(with_plan(comparison, aggregation={"secure_sum": False}))
    assert 'class="bad"' in page
    said = "Secure sum OFF. With differential privacy on, the coordinator sees each hospital's noisy update."
    assert said in words(page)
    assert "un-noised update" in words(page)


def test_federated_statistics_are_said_to_cost_their_share(comparison):
    changed = with_plan(comparison, normalisation={"method": "federated"}, statistics={"epsilon_share": 0.2})
    assert "may use 20% of ε, and are counted in the ε below" in words(report.html(changed))


def test_reproducible_noise_is_loud_everywhere(comparison):
    for found in comparison.results:
        found.reproducible_noise = found.arm is PRIVATE
    comparison = replace(comparison, reproducible_noise=True)
    page = words(report.html(comparison))
    assert "Noise reproducible: this run gives no privacy." in page
    assert "void, counted 1.9876" in page
    assert "such noise gives no privacy" in said(comparison)
    assert findings.arm_rows(comparison)[-1].epsilon == "void"
    marked = [line for line in report.metrics_lines(comparison) if line.get("reproducible_noise")]
    assert {line["arm"] for line in marked} == {"private-2"}


def test_without_a_private_arm_nothing_is_promised(comparison):
    page = words(report.html(without(comparison, "private")))
    assert "No arm of this report trained with differential privacy" in page
    assert "What ε does not cover" not in page


def test_fine_tuned_models_have_their_own_column(comparison):
    for found in comparison.results:
        found.tuned = {"alder": metrics(0.9)} if found.arm is FEDERATED else {}
    assert "fine-tuned" in words(report.html(comparison))
    assert findings.hospital_rows(comparison)[0].tuned.value == pytest.approx(0.9)


def test_a_comparison_that_can_say_nothing_still_has_a_report(comparison):
    for found in comparison.results:
        found.overall = dict.fromkeys(found.overall, Estimate(None, None, None, 3))
        found.sites, found.curve, found.reliability = {"alder": {}, "birch": {}, "cedar": {}}, [{"round": 4}], []
    assert "cannot be held against" in said(comparison)
    assert report.html(comparison)
    assert report.tables(comparison)


@pytest.mark.parametrize("kind", ["pooled", "alone", "federated", "private"])
def test_one_arm_alone_has_a_report(comparison, kind):
    only = without(comparison, *({"pooled", "alone", "federated", "private"} - {kind}))
    assert report.html(only)
    assert said(only)


# --- what may be said ----------------------------------------------------------------------------------------
def test_overlapping_intervals_prove_nothing(comparison):
    text = said(comparison)
    assert "Trained together without privacy, the model reaches 0.835 (0.785–0.885), 0.010 below pooling." in text
    assert "Trained together at ε = 2, the model reaches 0.805 (0.755–0.855), 0.030 below training without" in text
    assert "The intervals overlap, so no difference between these is proven." in text
    assert "higher at 2 and lower at 0 of 2 hospitals; the intervals lie apart at none" in text


def test_intervals_that_lie_apart_are_named(comparison):
    narrow = replace(comparison, results=[result(r.arm, r.seed, half=0.007) for r in comparison.results])
    text = said(narrow)
    assert "The intervals of “Federated, ε = 2” and training without privacy do not overlap; no other" in text
    assert "the intervals lie apart at 2" in text


def test_a_difference_is_that_of_the_figures_shown():
    one, other = Estimate(0.98749, 0.9, 1.0, 9), Estimate(0.98751, 0.9, 1.0, 9)
    assert findings._difference(one, other) == "0.001 below"
    assert findings._difference(one, one) == "to three decimals the same as"


def test_one_seed_says_that_chance_is_unknown(comparison):
    one = replace(comparison, results=[r for r in comparison.results if r.seed == 0])
    assert "Only one seed was run" in said(one)
    assert {row.over_seeds for row in findings.arm_rows(one)} == {"one seed"}


def test_a_seed_that_cannot_say_is_left_out_of_the_mean():
    known, unknown = Estimate(0.8, 0.7, None, 9), Estimate(None, None, None, 9)
    assert findings.mean([unknown, known, None]) == Estimate(0.8, 0.7, None, 9)
    assert findings.mean([unknown, None]) == findings.NOTHING


# --- metrics.jsonl -----------------------------------------------------------------------------------------
def test_every_metric_has_its_line(comparison):
    path = report.write(comparison)
    assert path == comparison.folder / "report.html"
    text = (comparison.folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    runs, hospitals, rounds = 8, 3, 5
    of = [line["of"] for line in lines]
    assert of == ["round"] * runs * rounds + ["hospital", "hospital", "hospital", "all hospitals"] * runs
    assert lines[0] == {"of": "round", "arm": "pooled", "seed": 0, "round": 0, "loss": 1.0, "auroc": 0.5}
    everyone = next(line for line in lines if line["of"] == "all hospitals" and line["arm"] == "private-2")
    assert everyone["epsilon"] == 1.98765
    assert everyone["metrics"]["auroc"] == pytest.approx({"value": 0.8, "low": 0.75, "high": 0.85, "n": 90})
    silent = [line for line in lines if line.get("hospital") == "cedar"]
    assert len(silent) == runs * hospitals / 3
    assert all(line["metrics"] == {} for line in silent)


# --- the terminal ------------------------------------------------------------------------------------------
def printed(comparison, width=100):
    console = Console(width=width)
    with console.capture() as captured:
        for table in report.tables(comparison):
            console.print(table)
    return captured.get()


def test_tables_fit_a_terminal_of_100_columns(comparison):
    text = printed(comparison, width=200)  # so that nothing but the tables' own size holds them
    assert max(map(len, text.splitlines())) <= 100
    assert re.search(r"Federated, ε = 2 +0\.805 \(0\.755–0\.855\) +0\.800–0\.810 +0\.500 +0\.500 +0\.500 +1\.99", text)
    assert re.search(r"alder +120 +30 +13% +0\.805 +0\.855 +0\.825\n", text)
    assert re.search(r"cedar +40 +30 +29% +– +– +–\n", text)
    assert "–: fewer than 2 held-out rows" in text


def test_many_hospitals_and_many_epsilons_still_fit(comparison):
    arms = [Arm("private", epsilon) for epsilon in (8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125)]
    counts = {"train": 12_345, "test": 4_321, "patients": 9, "positives": 5}
    names = [f"university-hospital-of-somewhere-{number}" for number in range(40)]
    results = [replace(result(PRIVATE, 0), arm=arm, sites={name: metrics(0.8) for name in names}) for arm in arms]
    text = printed(replace(comparison, results=results, rows=dict.fromkeys(names, counts)))
    assert max(map(len, text.splitlines())) <= 100
    assert "The 20 largest of 40 hospitals" in text


def test_what_the_coordinator_saw_is_shown(comparison):
    assert "What the coordinator saw" not in report.html(comparison)
    glimpse = {"site": "birch", "received": [5, -(2**31), 2**31 - 1], "learned": [0.1, -0.2, 0.0]}
    results = [
        replace(result, glimpse=glimpse, clipped=0.015, learned={"rows": 486.0, "final auroc": 0.8768})
        if result.arm.kind == "federated"
        else result
        for result in comparison.results
    ]
    page = words(report.html(replace(comparison, results=results)))
    for text in (
        "received from birch",
        "one mean AUROC over hospitals, 0.877",
        "486 training rows together",
        "up to 1.5%",
    ):
        assert text in page, text
