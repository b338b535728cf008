"""Series beside a table: files of measurements and recordings, to cells and to the model's inputs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cloister_client.connectors.connector import open_records
from cloister_client.dataset import Dataset, load_dataset
from cloister_client.site_file import read_site
from cloister_shared.errors import DataRefused, PlanRefused
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import read_plan

PLAN = """\
study: vitals
title: Vitals over three hours
task: {name: series, units: 4}
table:
  patient_id: stay
  target: {name: died, positive: 1, negative: 0}
  duplicates: refuse
  features:
    - {name: age, kind: number, range: [0, 120]}
    - name: vitals
      kind: series
      steps: 3
      required: false
      channels:
        - {name: heart_rate, unit: 1/min, range: [20, 250], mean: 100, sd: 10}
        - {name: temperature, unit: degC, range: [30, 43], mean: 37, sd: 1}
cohort: {min_sites: 2, min_patients: 1}
rounds: 1
strategy: {name: fedavg}
training: {learning_rate: 0.1, batch_size: 2, local_steps: 1}
privacy: {mechanism: none}
evaluation: {holdout: 0.25}
"""
TABLE = "stay,age,died\n" + "".join(f"{stay},50,{stay % 2}\n" for stay in range(1, 9))
TERMS = "series: {path: vitals.csv, row: stay, hours: time, name: what, value: value}"
HEAD = "stay,time,what,value\n"

Load = Callable[..., Dataset]


def plan(**changes: str) -> StudyPlan:
    text = PLAN
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return read_plan(text)


@pytest.fixture
def site(tmp_path: Path) -> Callable[..., Path]:
    """``site("rows of vitals.csv", "more terms", …)``: a hospital's site.yaml."""

    def made(events: str, more: str = "", terms: str = TERMS, table: str = TABLE, head: str = HEAD) -> Path:
        (tmp_path / "table.csv").write_text(table)
        (tmp_path / "vitals.csv").write_text(head + events)
        path = tmp_path / "site.yaml"
        path.write_text(f"site: st-marys\ntable:\n  path: table.csv\n  {terms}\n{more}")
        return path

    return made


def cell(path: Path, row: int = 1) -> np.ndarray:
    return open_records(path).rows(plan().table)["vitals"][row]


def test_a_cell_has_hours_channel_and_value_of_its_record_alone(site):
    path = site("2,0.5,temperature,38\n1,1.5,heart_rate,90\n1,0.25,temperature,36.5\n77,0,heart_rate,60\n")
    assert cell(path).tolist() == [[1.5, 0, 90], [0.25, 1, 36.5]]
    assert cell(path, 2).tolist() == [[0.5, 1, 38]]
    assert cell(path, 3) is None


def test_names_units_and_minutes_of_the_hospital_become_the_plans(site):
    terms = TERMS.replace("hours: time", "minutes: time")
    more = "  columns: {heart_rate: PULSE}\n  units: {temperature: degF, heart_rate: Hz}\n"
    path = site("1,90,PULSE,1.5\n1,0,temperature,98.6\n", more, terms)
    assert cell(path) == pytest.approx(np.array([[1.5, 0, 90], [0, 1, 37]]))


def test_a_file_in_parquet_with_numbers_as_keys_says_the_same(site, tmp_path):
    path = site("1,0.5,heart_rate,80\n2,1,temperature,37.5\n")
    csv = [cell(path, row).tolist() for row in (1, 2)]
    frame = pd.read_csv(tmp_path / "vitals.csv").astype({"stay": float})
    frame.to_parquet(tmp_path / "vitals.parquet")
    path.write_text(path.read_text().replace("vitals.csv", "vitals.parquet"))
    assert [cell(path, row).tolist() for row in (1, 2)] == csv


def test_what_the_model_gets_does_not_depend_on_the_order_of_the_file(site):
    rows = [f"1,{hour},heart_rate,{value}\n" for hour, value in ((0.1, 80.1), (0.2, 80.7), (0.3, 93.3), (0.4, 71.9))]
    said = [load_dataset(open_records(site("".join(order))), plan()) for order in (rows, rows[::-1])]
    assert (said[0].train.x == said[1].train.x).all()
    assert said[0].train.x[:, 1:].any() or said[0].test.x[:, 1:].any()


def test_two_stays_that_differ_in_their_series_alone_are_no_duplicates(site):
    table = "stay,age,died\n" + "1,50,0\n2,50,0\n"
    events = "1,0,heart_rate,80\n2,0,heart_rate,81\n"
    terms, nobody = TERMS, plan(**{"  patient_id: stay\n": ""})
    assert len(load_dataset(open_records(site(events, terms=terms, table=table)), nobody).train.x) <= 2
    with pytest.raises(DataRefused, match="duplicate of an earlier row in row 2"):
        load_dataset(open_records(site(events.replace("81", "80"), terms=terms, table=table)), nobody)


def test_a_missing_value_counts_as_not_measured(site):
    assert cell(site("1,0,heart_rate,NA\n1,0,temperature,37\n")).tolist() == [[0, 1, 37]]


MALFORMED = {
    "no file": ("", {"terms": TERMS.replace("vitals.csv", "none.csv")}, "none.csv is not there"),
    "no column": ("1,0,heart_rate,80\n", {"head": "stay,hour,what,value\n"}, "has no column time"),
    "time is text": ("1,0,heart_rate,80\n1,soon,heart_rate,80\n", {}, "no number as time in row 2"),
    "no time": ("1,,heart_rate,80\n", {}, "no number as time in row 1"),
    "no record": (",0,heart_rate,80\n", {}, "no stay in row 1"),
    "no name": ("1,0,,80\n", {}, "no what in row 1"),
    "value is text": ("2,0,heart_rate,77\n1,0,heart_rate,HAEMOLYSED\n", {}, "not a number in row 2"),
    "value is infinite": ("1,0,heart_rate,inf\n", {}, "not a number in row 1"),
    "ragged": ("1,0,heart_rate,80,9\n", {}, "row 1 has 5 cells"),
    "other names": ("1,0,PULSE,80\n", {}, "none of the channels of vitals"),
    "empty": ("", {}, "none of the channels"),
    "two records of a name": (
        "1,0,heart_rate,80\n",
        {"table": "stay,age,died\n1,50,0\n1,50,1\n"},
        "one stay in rows 1 and 2",
    ),
    "table without the key": ("1,0,heart_rate,80\n", {"terms": TERMS.replace("stay", "visit")}, "no column visit"),
    "unit of another kind": ("1,0,heart_rate,80\n", {"more": "  units: {temperature: kg}\n"}, "cannot become degC"),
    "no file named": ("", {"terms": "units: {}"}, "names no file of measurements"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_ends_in_one_refusal(name, site):
    events, terms, said = MALFORMED[name]
    with pytest.raises(DataRefused, match=said) as refused:
        load_dataset(open_records(site(events, **terms)), plan())
    assert "HAEMOLYSED" not in str(refused.value)


def test_text_in_a_quantity_that_the_plan_does_not_want_is_nobodys_fault(site):
    assert cell(site("1,0,heart_rate,80\n1,0,culture,positive\n")).tolist() == [[0, 0, 80]]


@pytest.mark.parametrize("clock", ["", "hours: time, minutes: time, "])
def test_the_time_is_given_once(clock, site):
    path = site("", terms=TERMS.replace("hours: time, ", clock))
    with pytest.raises(PlanRefused, match=r"site.yaml line 4: table.series names no column of the time, or two"):
        read_site(path)


# --- recordings --------------------------------------------------------------------------------------------
WAVES = "waveforms: {path: recordings, record: name, seconds: begins}"


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """Two signals at 10 Hz: the number of the sample, and ten less."""
    import wfdb

    (tmp_path / "recordings").mkdir()
    samples = np.arange(100.0)[:, None] - [[0, 10]]
    wfdb.wrsamp("r1", 10, ["mV", "mV"], ["II", "V"], samples, fmt=["16", "16"], write_dir=str(tmp_path / "recordings"))
    return tmp_path / "recordings"


def waves(site: Callable[..., Path], rows: str, more: str = "", terms: str = WAVES) -> np.ndarray:
    channels = "        - {name: II, range: [-1000, 1000]}\n        - {name: chest, range: [-1000, 1000]}\n"
    head, _, tail = PLAN.partition("        - {name: heart_rate")
    text = (head + channels + "cohort" + tail.partition("cohort")[2]).replace(
        "steps: 3", "steps: 3\n      step_hours: 1e-4"
    )
    path = site("", more or "  columns: {chest: V}\n", terms, table="stay,age,died,name,begins\n" + rows)
    return open_records(path).rows(read_plan(text).table)["vitals"][1]


def test_a_row_is_a_stretch_of_its_recording(recording, site):
    found = waves(site, "1,50,0,r1,2.0\n")
    first, second = (found[found[:, 1] == channel] for channel in (0, 1))
    assert first[:, 2] == pytest.approx(np.arange(20, 31), abs=0.01)  # 3 steps of 0.36 s at 10 Hz
    assert second[:, 2] == pytest.approx(first[:, 2] - 10, abs=0.01)
    assert first[:2, 0] * 3600 == pytest.approx([0.05, 0.15])


def test_a_stretch_beyond_the_end_is_what_there_is(recording, site):
    assert len(waves(site, "1,50,0,r1,9.5\n")) == 2 * 5


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        ("1,50,0,r2,0\n", "", "cannot be read"),
        ("1,50,0,,0\n", "", "Row 1 of st-marys names no recording"),
        ("1,50,0,r1,late\n", "", "Row 1 of st-marys names no recording"),
        ("1,50,0,../../r1,0\n", "", "outside of recordings"),
        ("1,50,0,r1,0\n", "  columns: {chest: V9}\n", "no signal V9"),
    ],
)
def test_a_recording_that_cannot_be_used_is_one_refusal(rows, more, said, recording, site):
    with pytest.raises(DataRefused, match=said):
        waves(site, rows, more)


def test_a_truncated_recording_is_one_refusal(recording, site):
    (recording / "r1.dat").write_bytes(b"123")
    with pytest.raises(DataRefused, match="cannot be read"):
        waves(site, "1,50,0,r1,0\n")
