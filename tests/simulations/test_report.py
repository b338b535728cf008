"""The report from invented results: what it must say, and that it stands alone."""

import html
import json
import re
from dataclasses import replace

import pytest
import yaml
from rich.console import Console

from cloister_server.statistics import cohort_view
from cloister_shared import budget, tally
from cloister_shared.charges import charges
from cloister_shared.outcomes.binary import METRICS
from cloister_shared.outcomes.judging import Estimate
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend
from cloister_simulations import figures, findings, guarantees, report
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


@pytest.fixture
def quick(monkeypatch):
    """A page without its larger drawings, and bounds that are coarser still."""
    for drawing in ("curves", "calibration", "forest"):
        monkeypatch.setattr(figures, drawing, lambda *_: "a drawing")
    monkeypatch.setattr(guarantees, "_POINTS", 60)


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
        "Add or remove one patient",
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


@pytest.mark.usefixtures("quick")
def test_nothing_is_red_where_nothing_is_turned_off(comparison):
    page = report.html(with_plan(comparison, evaluation={"epsilon_share": 0.1}))
    assert 'class="bad"' not in page
    assert 'class="red"' not in page


@pytest.mark.usefixtures("quick")
def test_exact_metrics_are_said_in_red(comparison):
    page = report.html(comparison)
    assert page.count('class="bad"') == 1
    assert "Held-out metrics EXACT. ε does not cover them" in words(page)


@pytest.mark.usefixtures("quick")
def test_secure_sum_off_is_said_in_red(comparison):
    page = report.html(with_plan(comparison, aggregation={"secure_sum": False}))
    assert page.count('class="bad"') == 2
    said = "Secure sum OFF. With differential privacy on, the coordinator sees each hospital's noisy update."
    assert said in words(page)
    assert "un-noised update" in words(page)


@pytest.mark.usefixtures("quick")
def test_federated_statistics_are_said_to_cost_their_share(comparison):
    changed = with_plan(comparison, normalisation={"method": "federated"}, statistics={"epsilon_share": 0.2})
    assert "may use 20% of ε, and are counted in the ε below" in words(report.html(changed))


@pytest.mark.usefixtures("quick")
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


@pytest.mark.usefixtures("quick")
def test_without_a_private_arm_nothing_is_promised(comparison):
    page = report.html(without(comparison, "private"))
    assert 'class="bad"' in page
    page = words(page)
    assert "Differential privacy OFF." in page
    assert "No arm of this report trained with differential privacy" in page
    assert "What ε does not cover" not in page


@pytest.mark.usefixtures("quick")
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


# --- what stands behind epsilon ------------------------------------------------------------------------------
SHARED = {
    "privacy": {"mechanism": "shared", "colluding": 1, "epsilon_alone": 6.0},
    "cohort": {"min_sites": 4},
    "aggregation": {"weights": "equal"},
    "training": {"local_steps": 1, "sample_rate": 0.25},
}


@pytest.mark.usefixtures("quick")
def test_a_hospital_that_adds_all_noise_trusts_nobody(comparison):
    page = words(report.html(comparison))
    assert "Mechanism DP-SGD at each hospital. Each patient enters a step with all records" in page
    assert "Trusted Nobody outside the hospital" in page
    assert "Inside ε Training, 4 rounds of 3 noisy steps each." in page
    assert "Outside ε EXACT metrics of held-out patients" in page
    assert "who would have to collude" not in page


@pytest.mark.usefixtures("quick")
def test_shared_noise_has_its_certificate(comparison):
    changed = with_plan(comparison, **SHARED)
    page = report.html(changed)
    assert "Epsilon holds against the coordinator and up to 1 of the other hospitals" in words(page)
    (rows,) = guarantees.certificates(changed).values()
    assert [row.colluding for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert f"{row.who} {row.colluding} of 3 {row.noise:.0%} {row.epsilon:.3f}" in words(page)
    assert PRIVATE.epsilon
    assert rows[1].epsilon <= PRIVATE.epsilon * (1 + 1e-9)
    assert rows[3].epsilon > PRIVATE.epsilon  # what all others together could learn
    assert f'class="red">{rows[3].epsilon:.3f}' in page


@pytest.mark.usefixtures("quick")
def test_counting_by_record_would_have_hidden_patients_with_many(comparison):
    found = guarantees.by_records(comparison)
    assert found
    assert list(found.found) == [1, 2, 3, 4, 8]
    values = list(found.found.values())
    assert values == sorted(values)
    assert PRIVATE.epsilon
    one, two = found.found[1], found.found[2]
    assert one
    assert two
    assert one <= PRIVATE.epsilon < two
    page = report.html(comparison)
    assert "What counting by record would have hidden" in page
    assert f"3 records, the most of any patient here {found.found[3]:.2f} 2 " in words(page)
    assert 'class="red"' not in page


def test_a_quick_bound_stays_a_bound(comparison):
    plan = guarantees.private_arms(comparison)[PRIVATE]
    events = charges(plan, 20)
    exact = budget.pld_epsilon([replace(event, records=2) for event in events], 1e-5)
    guarantees._of_patient.cache_clear()
    assert exact <= guarantees._of_patient(events, 1e-5, 2) <= 1.03 * exact
    whole = (replace(events[0], sample_rate=1.0, steps=1),)  # all records at once: a Gaussian, twice as near
    assert guarantees._of_patient(whole, 1e-5, 2) == pytest.approx(
        budget.pld_epsilon([replace(whole[0], noise_multiplier=whole[0].noise_multiplier / 2)], 1e-5), rel=1e-3
    )


@pytest.mark.usefixtures("quick")
def test_in_a_plan_by_record_what_a_patient_gets_is_red(comparison):
    changed = with_plan(comparison, privacy={"unit": "record"})
    for counts in changed.rows.values():
        counts["most records"] = 100  # counted up to 64
    found = guarantees.by_records(changed)
    assert found
    assert list(found.found) == [1, 2, 4, 8, 64]
    assert found.found[64] is None  # over 100
    page = report.html(changed)
    assert "What counting by record hides" in page
    assert 'class="red">over 100<' in page
    assert f'class="red">{found.found[4]:.2f}<' in page
    assert f'class="red">{found.found[1]:.2f}<' not in page
    assert "In red: what such a patient really gets" in words(page)
    for result in changed.results:
        result.epsilon = dict.fromkeys(result.epsilon, 7.5)
    assert 'class="red">7.5000' in report.html(changed)


@pytest.mark.usefixtures("quick")
def test_what_the_coordinator_learned_stands_beside_the_truth(comparison):
    changed = with_plan(comparison, evaluation={"epsilon_share": 0.1})
    for found in changed.results:
        if found.arm is PRIVATE:
            found.learned = {"final auroc": 0.7654, "final brier": None}
            found.curve = [{"round": n} for n in range(4)] + [{"round": 4, "auroc": 0.8}]
    page = report.html(changed)
    assert "AUROC 0.765 0.800" in words(page)  # of the first seed
    assert "Brier score – 0.500" in words(page)
    assert "known to the simulation alone" in words(page)
    assert "Metrics on held-out rows: their mean" not in words(page)
    assert "With privacy the model is judged at the end alone" in words(page)
    learned = [line["learned"] for line in report.metrics_lines(changed) if "learned" in line]
    assert learned[0] == {"final auroc": 0.7654, "final brier": None}


def test_an_arm_judged_at_the_end_alone_has_a_mark_and_no_line(comparison):
    results = [found for found in comparison.results if found.arm is PRIVATE]
    for found in results:
        found.curve = [{"round": n} for n in range(4)]  # as a plan without exact metrics leaves it
    assert figures.curves({PRIVATE: results}) == ""
    for found in results:
        found.curve += [{"round": 4, "auroc": 0.8}]
    orange = re.findall(r"<use[^>]*stroke: #c2410c", figures.curves({PRIVATE: results}))
    assert len(orange) == 2  # in the frame and in the legend


@pytest.mark.usefixtures("quick")
def test_the_cohort_is_shown_with_its_noise_and_its_price(comparison):
    changed = with_plan(comparison, statistics={"histograms": 4, "epsilon_share": 0.25})
    plan = guarantees.private_arms(changed)[PRIVATE]
    seen = cohort_view(plan, {name: 10.0 * at for at, name in enumerate(tally.statistics(plan))})
    assert "The cohort" not in report.html(changed)
    for found in changed.results:
        found.cohort = seen if found.arm is PRIVATE else {}
    page = report.html(changed)
    assert "The cohort, under differential privacy, noise included" in page
    assert page.count('class="card"') == len(tally.histograms(plan))
    assert "<title>18 to 41: 0</title>" in page
    assert f"{10 * (len(tally.statistics(plan)) - 1):,}" in words(page)  # the last cell: the outcome, yes
    cost = guarantees.statistics_cost(plan)
    assert cost == pytest.approx(0.5, rel=1e-3)
    assert f"All of this cost ε = {cost:.3f} by itself" in words(page)


@pytest.mark.usefixtures("quick")
def test_a_cohort_without_privacy_is_called_exact(comparison):
    changed = without(with_plan(comparison, statistics={"histograms": 4}), "private")
    plan = changed.scenario.plan
    for found in changed.results:
        found.cohort = cohort_view(plan, dict.fromkeys(tally.statistics(plan), 3.0))
    page = words(report.html(changed))
    assert "The cohort, exact: not under differential privacy" in page
    assert "All of this cost" not in page


@pytest.mark.usefixtures("quick")
def test_a_plan_by_hospital_promises_nothing_by_record(comparison):
    changed = with_plan(comparison, privacy={"unit": "site"})
    assert guarantees.by_records(changed) is None
    page = words(report.html(changed))
    assert "Protects A hospital's whole table." in page
    assert "Add or remove one hospital." in page
    assert "counting by record" not in page
