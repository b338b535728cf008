"""cloister_client.dataset and connectors.table: what a sound table becomes. Unsound ones: tests/vectors."""

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_client.connectors.connector import open_records
from cloister_client.connectors.flat_file import MISSING
from cloister_client.dataset import Dataset, load_dataset, normalised
from cloister_client.site_file import read_site
from cloister_shared.errors import DataRefused, PlanRefused
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import read_plan

PLAN = """\
study: units
title: Units and kinds
task: {name: tabular}
table:
  patient_id: patient
  target: {name: died, positive: dead, negative: alive}
  features: FEATURES
  duplicates: allow
  max_bad_rows: 0.0
cohort: {min_sites: 2, min_patients: 1}
rounds: 1
strategy: {name: fedavg}
training: {learning_rate: 0.1, batch_size: 2, local_steps: 1}
privacy: {mechanism: none}
evaluation: {holdout: 0.25}
"""


def plan_of(*features: str, **replaced: str) -> StudyPlan:
    text = PLAN.replace("FEATURES", "[" + ", ".join(f"{{{feature}}}" for feature in features) + "]")
    for key, value in replaced.items():
        assert f"{key}: " in text
        text = "\n".join(
            line[: len(line) - len(line.lstrip())] + f"{key}: {value}" if line.lstrip().startswith(f"{key}: ") else line
            for line in text.splitlines()
        )
    return read_plan(text)


Load = Callable[..., Dataset]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """``load(plan, {"column": cells}, "site.yaml's terms")``; patients and outcomes are added."""

    def loaded(plan: StudyPlan, cells: dict[str, list], table: str = "", kind: str = "csv") -> Dataset:
        frame = pd.DataFrame(cells)
        frame["patient"] = frame.get("patient", pd.Series([f"p{i}" for i in range(len(frame))]))
        frame["died"] = frame.get("died", pd.Series(["dead", "alive"] * len(frame))[: len(frame)])
        path = tmp_path / f"table.{kind}"
        if kind == "parquet":
            frame.to_parquet(path)
        elif kind == "csv.gz":
            path.write_bytes(gzip.compress(frame.to_csv(index=False).encode()))
        else:
            path.write_text(frame.to_csv(index=False))
        (tmp_path / "site.yaml").write_text(f"site: st-marys\ntable:\n  path: {path.name}\n{table}")
        return load_dataset(open_records(tmp_path / "site.yaml"), plan)

    return loaded


def in_order(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and outcomes of training and held-out rows together, by patient (the id's rank)."""
    x = torch.cat([dataset.train.x, dataset.test.x]).numpy()
    y = torch.cat([dataset.train.y, dataset.test.y]).numpy()
    order = np.argsort(np.concatenate([dataset.train.patients, dataset.test.patients]), kind="stable")
    return x[order], y[order]


# --- units -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("wanted", "given", "cell", "expected"),
    [
        ("kg", "lb", 150, 68.0388555),
        ("kg", "g", 70500, 70.5),
        ("cm", "inch", 70, 177.8),
        ("degC", "degF", 98.6, 37.0),
        ("degC", "degF", -40, -40.0),
        ("degC", "kelvin", 310.15, 37.0),
        ("degF", "degC", 37, 98.6),
        ("mmHg", "kPa", 16, 120.00986),
        ("mg/dL", "g/L", 1.5, 150.0),
        ("year", "month", 30, 2.5),
        ("mg/dL", "{unit: umol/L, factor: 0.0113}", 100, 1.13),
        ("mg/dL", "mg/dL", 3.25, 3.25),
    ],
)
def test_units_are_converted(load: Load, wanted, given, cell, expected):
    plan = plan_of(f"name: v, kind: number, unit: {wanted}, range: [-1000, 1000]")
    x, _ = in_order(load(plan, {"v": [cell] * 8}, f"  units: {{v: {given}}}\n"))
    np.testing.assert_allclose(x, np.full((8, 1), expected), rtol=1e-6)


def test_the_range_is_in_the_plans_unit(load: Load):
    plan = plan_of("name: v, kind: number, unit: kg, range: [60, 80]")
    load(plan, {"v": [150] * 8}, "  units: {v: lb}\n")
    with pytest.raises(DataRefused, match="v: outside the plan's range"):
        load(plan, {"v": [150] * 8})


# --- encoding ----------------------------------------------------------------------------------------------
def test_columns_stand_in_the_plans_order(load: Load):
    """Not in the file's: every hospital has its own."""
    plan = plan_of(
        "name: colour, kind: category, categories: [red, 2, green]",
        "name: v, kind: number, range: [0, 10], missing: indicator, fill: 7.5",
        "name: smoker, kind: boolean, missing: indicator, fill: true",
        "name: w, kind: number, range: [0, 10]",
    )
    cells = {
        "w": [1, 2, 3, 4],
        "smoker": ["yes", "", "no", "no"],
        "v": ["5", "6", "", "8"],
        "colour": ["green", "red", "2", "2.0"],
    }
    dataset = load(plan, cells)
    assert [column.name for column in dataset.columns] == [
        "colour = red",
        "colour = 2",
        "colour = green",
        "v",
        "v is missing",
        "smoker",
        "smoker is missing",
        "w",
    ]
    x, y = in_order(dataset)
    assert x.tolist() == [
        [0, 0, 1, 5, 0, 1, 0, 1],
        [1, 0, 0, 6, 0, 1, 1, 2],
        [0, 1, 0, 7.5, 1, 0, 0, 3],
        [0, 1, 0, 8, 0, 0, 0, 4],
    ]
    assert y.tolist() == [1, 0, 1, 0]
    assert (dataset.train.x.dtype, dataset.train.y.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("words", ["1 0", "true false", "True False", "YES No", "y N", "t F", "1.0 0.0"])
@pytest.mark.parametrize("blank", ["", "  "])
def test_spellings_of_yes_and_no(load: Load, words, blank):
    plan = plan_of("name: smoker, kind: boolean")
    yes, no = (blank + word + blank for word in words.split())
    x, _ = in_order(load(plan, {"smoker": [yes, no, no, yes]}))
    assert x.ravel().tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("gap", MISSING)
def test_spellings_of_a_gap(load: Load, gap):
    plan = plan_of("name: v, kind: number, range: [0, 10], missing: indicator, fill: 3")
    x, _ = in_order(load(plan, {"v": ["1", gap, "2", "4"]}))
    assert x.tolist() == [[1, 0], [3, 1], [2, 0], [4, 0]]


def test_gaps_are_filled_or_their_rows_dropped(load: Load):
    features = [
        "name: v, kind: number, range: [0, 10], missing: fill, fill: 9",
        "name: c, kind: category, categories: [a, b], missing: fill, fill: b",
        "name: d, kind: number, range: [0, 10], missing: drop",
    ]
    cells = {"v": ["1", "", "2", ""], "c": ["a", "a", "", ""], "d": ["5", "6", "7", ""]}
    dataset = load(plan_of(*features), cells)
    x, y = in_order(dataset)
    assert x.tolist() == [[1, 1, 0, 5], [9, 1, 0, 6], [2, 0, 1, 7]]
    assert y.tolist() == [1, 0, 1]
    assert dataset.quality.dropped_missing == 1
    assert {column.name: column.missing for column in dataset.quality.columns} == {
        "v": 2, "c": 2, "d": 1, "died": 0, "patient": 0
    }  # fmt: skip


def test_outcomes_are_read_as_the_plan_spells_them(load: Load):
    plan = plan_of("name: v, kind: number, range: [0, 10]", target="{name: died, positive: 2, negative: 1}")
    _, y = in_order(load(plan, {"v": [1, 2, 3, 4], "died": ["2", "1", "1.0", "2.0"]}))
    assert y.tolist() == [1, 0, 0, 1]


def test_normalised_touches_numbers_alone(load: Load):
    plan = plan_of(
        "name: v, kind: number, range: [0, 10], missing: indicator, fill: 5",
        "name: smoker, kind: boolean",
        "name: w, kind: number, range: [0, 10]",
    )
    dataset = load(plan, {"v": ["1", "", "3", "5"], "smoker": [1, 0, 1, 0], "w": [2, 4, 6, 8]})
    before = dataset.train.x.clone()
    after = normalised(dataset.train, dataset.columns, [(1.0, 2.0), (4.0, 4.0)])
    expected = before.clone()
    expected[:, 0], expected[:, 3] = (before[:, 0] - 1) / 2, (before[:, 3] - 4) / 4
    torch.testing.assert_close(after.x, expected)
    torch.testing.assert_close(dataset.train.x, before)  # the same rows serve the next study


# --- the quality gate --------------------------------------------------------------------------------------
def test_bad_rows_are_left_out_up_to_the_plans_share(load: Load):
    cells = {"v": ["1", "2", "Zzyzx", "4", "5", "600", "7", "8"]}
    feature = "name: v, kind: number, range: [0, 10]"
    dataset = load(plan_of(feature, max_bad_rows="0.25"), cells)
    x, y = in_order(dataset)
    assert x.ravel().tolist() == [1, 2, 4, 5, 7, 8]
    assert y.tolist() == [1, 0, 0, 1, 1, 0]
    assert dataset.quality.bad_rows == [3, 6]
    assert dataset.quality.lines() == ["v: not a number in row 3", "v: outside the plan's range in row 6"]
    assert (dataset.quality.rows, dataset.quality.patients, dataset.quality.positives) == (8, 6, 3)
    with pytest.raises(DataRefused, match="in 2 of 8 rows"):
        load(plan_of(feature, max_bad_rows="0.24"), cells)


def test_duplicates_are_dropped_where_the_plan_says_so(load: Load):
    cells = {"v": [1, 1, 2, 3], "patient": ["a", "a", "b", "c"], "died": ["dead", "dead", "dead", "alive"]}
    feature = "name: v, kind: number, range: [0, 10]"
    assert len(in_order(load(plan_of(feature, duplicates="drop"), cells))[1]) == 3
    assert len(in_order(load(plan_of(feature, duplicates="allow"), cells))[1]) == 4
    with pytest.raises(DataRefused, match="whole row: duplicate of an earlier row in row 2"):
        load(plan_of(feature, duplicates="refuse"), cells)


def test_the_quality_report_holds_no_value(load: Load):
    """Counts and row numbers only; every cell of this table is a word to look for."""
    cells = {
        "v": ["1.2345", "Zzyzx-v", "98765.4321", "4.5678"],
        "c": ["aardvark", "Zzyzx-c", "badger", ""],
        "patient": ["Zzyzx-1", "Zzyzx-2", "Zzyzx-3", "Zzyzx-4"],
        "died": ["dead", "alive", "Zzyzx-d", "dead"],
    }
    plan = plan_of(
        "name: v, kind: number, range: [0, 10]",
        "name: c, kind: category, categories: [aardvark, badger]",
        max_bad_rows="0.9",
    )
    report = load(plan, cells).quality
    assert report.bad_rows == [2, 3, 4]
    for text in (repr(report), "\n".join(report.lines())):
        for cell in [cell for column in cells.values() for cell in column if cell not in ("", "dead", "alive")]:
            assert cell not in text
        assert "dead" not in text


def test_many_bad_rows_are_counted_not_listed(load: Load):
    plan = plan_of("name: v, kind: number, range: [0, 10]")
    with pytest.raises(DataRefused, match=r"v: not a number in rows 1, 2, 3, 4, 5, 6, 7, 8 and 92 more\.") as refused:
        load(plan, {"v": ["Zzyzx"] * 100})
    assert "Zzyzx" not in str(refused.value)


# --- files -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["parquet", "csv.gz"])
def test_every_kind_of_file_holds_the_same_rows(load: Load, kind):
    plan = plan_of(
        "name: v, kind: number, range: [0, 10], missing: indicator, fill: 5",
        "name: n, kind: number, range: [0, 10], missing: drop",
        "name: smoker, kind: boolean, missing: fill, fill: false",
        "name: grade, kind: category, categories: [1, 2, 3], missing: indicator, fill: 2",
        "name: c, kind: category, categories: [a, b]",
    )
    cells = {
        "v": [1.5, None, 2.25, 1 / 3, 9.0, 0.1],
        "n": [1, 2, None, 4, 5, 6],
        "smoker": [True, False, None, True, True, None],
        "grade": [1, 2, 3, None, 1, 2],
        "c": list("ababab"),
        "patient": [11, 12, 13, 14, 15, 11],
    }
    csv, other = load(plan, cells), load(plan, cells, kind=kind)
    for part in ("train", "test"):
        one, two = getattr(csv, part), getattr(other, part)
        assert torch.equal(one.x, two.x)
        assert torch.equal(one.y, two.y)
        assert (one.patients == two.patients).all()
    assert repr(csv.quality) == repr(other.quality)


def test_site_yaml_names_the_hospital_by_the_rule_of_its_certificate(tmp_path: Path):
    path = tmp_path / "site.yaml"
    path.write_text("site: Hôpital St Mary's\ntable: {path: t.csv}\n", encoding="utf-8")
    assert read_site(path).site == "Hôpital St Mary's"
    path.write_text("site: ../oak\ntable: {path: t.csv}\n")
    with pytest.raises(PlanRefused, match=r"line 1: site = .*a name is letters.*name that the hospital is enrolled"):
        open_records(path)


def test_site_yaml_that_is_no_text_or_not_there(tmp_path: Path):
    with pytest.raises(DataRefused, match="is not there"):
        open_records(tmp_path / "site.yaml")
    (tmp_path / "site.yaml").write_bytes(b"site: \xff\xfe")
    with pytest.raises(DataRefused, match=r"cannot be read \(UnicodeDecodeError\)"):
        open_records(tmp_path / "site.yaml")
    with pytest.raises(DataRefused, match=r"cannot be read \(IsADirectoryError\)"):
        open_records(tmp_path)


@pytest.mark.parametrize("damage", [slice(None, 40), slice(None, -4)])
def test_a_torn_gzip_is_refused(load: Load, tmp_path: Path, damage):
    plan = plan_of("name: v, kind: number, range: [0, 10]")
    load(plan, {"v": [1, 2, 3, 4]}, kind="csv.gz")
    path = tmp_path / "table.csv.gz"
    path.write_bytes(path.read_bytes()[damage])
    with pytest.raises(DataRefused, match="cannot be read as a table"):
        load_dataset(open_records(tmp_path / "site.yaml"), plan)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="kgmLdmol/*^-+() 0123456789.%°µ'\"#\\\n\t", max_size=12))
def test_no_unit_ends_in_a_traceback(tmp_path_factory, unit):
    """pint reads units with Python's own tokenizer."""
    folder = tmp_path_factory.getbasetemp() / "units"
    folder.mkdir(exist_ok=True)
    import json

    (folder / "site.yaml").write_text(f"site: st-marys\ntable:\n  path: t.csv\n  units: {{v: {json.dumps(unit)}}}\n")
    plan = plan_of("name: v, kind: number, unit: kg, range: [0, 10]")
    try:
        factor, zero = open_records(folder / "site.yaml").factors(plan.table)["v"]
    except (DataRefused, PlanRefused):
        return
    assert np.isfinite([factor, zero]).all()


# --- the split ---------------------------------------------------------------------------------------------
FEATURE = "name: v, kind: number, range: [0, 1000]"


def held_out(dataset: Dataset) -> set[float]:
    return set(dataset.test.x.ravel().tolist())


def test_a_patient_is_held_out_whole(load: Load):
    owner = np.random.default_rng(0).integers(0, 40, size=400)
    dataset = load(plan_of(FEATURE), {"v": list(range(400)), "patient": [f"p{who}" for who in owner]})
    train, test = ({owner[int(v)] for v in rows.x.ravel()} for rows in (dataset.train, dataset.test))
    assert not train & test
    assert train | test == set(range(40))
    assert not set(dataset.train.patients) & set(dataset.test.patients)
    assert dataset.quality.patients == 40


def test_the_split_does_not_know_the_order_of_rows(load: Load):
    values, patients = np.arange(200), np.array([f"p{i % 90}" for i in range(200)])
    died = np.where(values % 3 == 0, "dead", "alive")
    shuffled = np.random.default_rng(0).permutation(200)
    found = [
        held_out(load(plan_of(FEATURE), {"v": values[at], "patient": patients[at], "died": died[at]}))
        for at in (np.arange(200), shuffled)
    ]
    assert found[0] == found[1]
    assert 20 < len(found[0]) < 80


def test_the_split_does_not_know_the_other_patients(load: Load):
    """A hospital that sends more rows later keeps those it held out: none was ever trained on."""
    few = held_out(load(plan_of(FEATURE), {"v": list(range(100))}))
    assert few == {v for v in held_out(load(plan_of(FEATURE), {"v": list(range(200))})) if v < 100}


def test_the_share_held_out_is_the_plans(load: Load):
    for holdout in (0.1, 0.5):
        dataset = load(plan_of(FEATURE, evaluation=f"{{holdout: {holdout}}}"), {"v": [i % 1000 for i in range(3000)]})
        assert len(dataset.test) / 3000 == pytest.approx(holdout, abs=4 * (holdout * (1 - holdout) / 3000) ** 0.5)


def test_another_seed_is_another_split(load: Load):
    plan, other = plan_of(FEATURE), plan_of(FEATURE, rounds="1\nseed: 1")
    cells = {"v": list(range(200))}
    assert held_out(load(plan, cells)) != held_out(load(other, cells))


def test_a_split_column_decides(load: Load):
    plan = plan_of(FEATURE, evaluation="{split_column: part}")
    dataset = load(plan, {"v": [1, 2, 3, 4], "part": ["train", "test", "test", "train"]})
    assert held_out(dataset) == {2, 3}


def test_without_ids_every_row_is_a_patient(load: Load):
    plan = plan_of(FEATURE, patient_id="null")
    dataset = load(plan, {"v": list(range(200))})
    assert dataset.quality.patients == 200
    assert len(set(dataset.train.patients) | set(dataset.test.patients)) == 200
