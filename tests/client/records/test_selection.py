"""What a plan's windows choose of dated records: edges, ties, cohorts and outcomes, on a few facts made by hand."""

import json
from datetime import UTC, datetime

import numpy as np
import pytest

from cloister_client.connectors.clinical import (
    NEVER,
    Encounters,
    Facts,
    Patients,
    Records,
    ages,
    births,
    meanings,
    seconds,
    sound,
    stands_for,
)
from cloister_client.connectors.selection import select
from cloister_client.site_file import Coded
from cloister_shared.errors import DataRefused
from cloister_shared.schema import Schema

CREATININE, WEIGHT, SMOKING, DIABETES = "LOINC:2160-0", "LOINC:29463-7", "LOINC:72166-2", "ICD10:E11.9"
STAY = "2020-03-01T08:00:00Z"


def records(
    *facts: tuple, stays: tuple = ((0, STAY, "2020-03-05T08:00:00Z", 0),), deaths: dict[int, str] | None = None
) -> Records:
    """``facts``: patient, time, code, and then value or words, and unit. ``stays``: patient, start, end, kind."""
    people = 1 + max(stay[0] for stay in stays)
    rows = [(*fact, *([None] * (5 - len(fact)))) for fact in facts]
    codes, units, answers = (list(dict.fromkeys(w for w in found if isinstance(w, str))) for found in (
        [row[2] for row in rows], [row[4] for row in rows], [row[3] for row in rows]))  # fmt: skip
    place = lambda words, word: words.index(word) if isinstance(word, str) else -1  # noqa: E731
    made = Facts(
        np.arange(len(rows), dtype=np.int64),
        np.array([row[0] for row in rows], np.int32),
        seconds([row[1] for row in rows]),
        np.array([place(codes, row[2]) for row in rows], np.int32),
        np.array([row[3] if isinstance(row[3], float | int) else np.nan for row in rows], float),
        np.array([place(units, row[4]) for row in rows], np.int32),
        np.array([place(answers, row[3]) for row in rows], np.int32),
        codes,
        units,
        answers,
    )
    died = seconds([(deaths or {}).get(n) for n in range(people)])
    ids = np.array([f"p{n}" for n in range(people)], dtype=object)
    born = births(["1950-03-01"] * people)
    patients = Patients(ids, np.array(["female"] * people, dtype=object), born, died, died != NEVER)
    encounters = Encounters(
        np.array([f"e{n}" for n in range(len(stays))], dtype=object),
        np.array([stay[0] for stay in stays], np.int32),
        seconds([stay[1] for stay in stays]),
        seconds([stay[2] for stay in stays]),
        np.array([stay[3] for stay in stays], np.int32),
    )
    return sound(patients, encounters, made, meanings(codes, codes), {})


def rows(found: Records, *features: dict, own: Coded | None = None, **terms):
    target = {"name": "died", "positive": 1, "negative": 0, "code": "LOCAL:death", "window": {"since": 0, "until": 720}}
    schema = {"features": list(features), "target": target, "patient_id": "patient"} | terms
    return select(found, Schema.model_validate_json(json.dumps(schema)), own or Coded(), "st-marys")


def number(**terms) -> dict:
    return {"name": "x", "kind": "number", "code": CREATININE, "unit": "mg/dL", "range": [0, 100]} | terms


MEASURED = [
    (0, "2020-02-28T08:00:00Z", CREATININE, 9.0, "mg/dL"),
    (0, "2020-03-01T08:00:00Z", CREATININE, 3.0, "mg/dL"),
    (0, "2020-03-01T10:00:00Z", CREATININE, 1.0, "mg/dL"),
    (0, "2020-03-01T10:00:00Z", CREATININE, 2.0, "mg/dL"),
    (0, "2020-03-02T08:00:00Z", CREATININE, 7.0, "mg/dL"),
]


@pytest.mark.parametrize(
    ("take", "expected"),
    [("last", 2.0), ("first", 3.0), ("mean", 2.0), ("min", 1.0), ("max", 3.0), ("count", 3.0), ("any", 1.0)],
)
def test_each_take(take, expected):
    frame = rows(records(*MEASURED), number(window={"since": 0, "until": 24, "take": take}))
    assert frame["x"].tolist() == [expected]


@pytest.mark.parametrize(
    ("since", "until", "expected"), [(0, 24, 3), (0, 24.001, 4), (-48, 24, 4), (-47.9, 0, 0), (-49, 0.001, 2)]
)
def test_a_window_begins_with_its_first_moment_and_ends_before_its_last(since, until, expected):
    frame = rows(records(*MEASURED), number(window={"since": since, "until": until, "take": "count"}))
    assert frame["x"].tolist() == [expected]


def test_nothing_measured_is_a_gap_and_nothing_counted_is_none():
    found = records(*MEASURED)
    assert np.isnan(rows(found, number(code="LOINC:1-1"))["x"][1])
    assert rows(found, number(code="LOINC:1-1", window={"take": "count"}))["x"][1] == 0


def test_another_patients_measurements_are_not_ones_own():
    stays = ((0, STAY, STAY, 0), (1, STAY, STAY, 0))
    frame = rows(records((1, STAY, CREATININE, 4.0, "mg/dL"), stays=stays), number())
    assert frame["x"].isna().tolist() == [True, False]


def test_each_value_is_converted_from_its_own_unit():
    weights = [(0, "2020-03-01T08:00:00Z", WEIGHT, 100.0, "[lb_av]"), (0, "2020-03-01T09:00:00Z", WEIGHT, 50.0, "kg")]
    terms = number(code=WEIGHT, unit="kg", window={"take": "mean"})
    assert rows(records(*weights), terms)["x"][1] == pytest.approx((45.359237 + 50) / 2)


def test_a_unit_that_cannot_be_converted_is_refused_only_where_it_counts():
    odd = (0, "2020-03-01T09:00:00Z", CREATININE, 90.0, "umol/L")
    with pytest.raises(DataRefused, match="1 values of x are in umol/L, which cannot become mg/dL"):
        rows(records(*MEASURED, odd), number())
    late = (0, "2021-03-01T09:00:00Z", CREATININE, 90.0, "umol/L")
    assert rows(records(*MEASURED, late), number())["x"][1] == 2.0
    own = Coded.model_validate({"units": {"x": {"unit": "umol/L", "factor": 0.0113}}})
    found = records(*MEASURED, odd, (0, "2020-03-01T11:00:00Z", CREATININE, 100.0, "umol/L"))
    assert rows(found, number(), own=own)["x"][1] == pytest.approx(1.13)


def test_a_fact_with_two_codings_counts_once():
    found = records((0, STAY, CREATININE, 1.0, "mg/dL"), (0, STAY, "LOCAL:CREA", 1.0, "mg/dL"))
    found.facts.event[:] = 5
    own = Coded.model_validate({"codes": {"x": (CREATININE, "LOCAL:CREA")}})
    assert rows(found, number(window={"take": "count"}), own=own)["x"][1] == 1


def test_an_icd_code_stands_for_those_beneath_it():
    boolean = {"name": "x", "kind": "boolean", "code": "ICD10:E11"}
    assert rows(records((0, STAY, DIABETES)), boolean)["x"][1] == 1
    assert rows(records((0, STAY, "ICD10:E10.9")), boolean)["x"][1] == 0
    assert not stands_for("LOINC:2160", "LOINC:2160-0")


def test_an_answer_that_says_no_is_none():
    boolean = {"name": "x", "kind": "boolean", "code": SMOKING}
    assert rows(records((0, STAY, SMOKING, "false")), boolean)["x"][1] == 0
    assert rows(records((0, STAY, SMOKING, "true")), boolean)["x"][1] == 1


def test_a_category_is_the_last_answer():
    category = {"name": "x", "kind": "category", "code": SMOKING, "categories": ["a", "b"]}
    facts = [(0, "2020-03-01T07:00:00Z", SMOKING, "b"), (0, "2020-03-01T06:00:00Z", SMOKING, "a")]
    assert rows(records(*facts), category)["x"][1] == "b"


THREE = (
    (0, "2020-03-01T08:00:00Z", "2020-03-05T08:00:00Z", 0),
    (0, "2020-03-20T08:00:00Z", "2020-03-22T08:00:00Z", 0),
    (0, "2020-08-01T08:00:00Z", None, 0),
    (0, "2020-03-06T08:00:00Z", "2020-03-06T09:00:00Z", 2),
)


def test_a_readmission_is_another_inpatient_stay_soon_after_the_end():
    target = {"name": "back", "positive": "yes", "negative": "no", "code": "LOCAL:readmission"}
    frame = rows(records(stays=THREE), number(), target=target | {"window": {"since": 0, "until": 720}})
    assert frame["back"].tolist()[:2] == ["yes", "no"]
    assert frame["back"].isna().tolist() == [False, False, True]  # of a stay that has not ended nobody knows


@pytest.mark.parametrize(
    ("anchor", "expected"),
    [
        ({}, 3),
        ({"encounter": "any"}, 4),
        ({"encounter": "outpatient"}, 1),
        ({"which": "first"}, 1),
        ({"ages": [70, 71]}, 3),
        ({"ages": [71, 99]}, 0),
        ({"having": [CREATININE]}, 2),
        ({"having": [CREATININE], "window": {"since": 0, "until": 24}}, 1),
    ],
)
def test_the_cohort_is_data_of_the_plan(anchor, expected):
    found = records((0, "2020-03-20T09:00:00Z", CREATININE, 1.0, "mg/dL"), stays=THREE)
    assert len(rows(found, number(), anchor=anchor)) == expected


def test_age_grows_on_the_birthday():
    born = births(["1950-03-01", "1950-03-02", "1950", None])
    at = seconds(["2020-03-01"] * 4)
    np.testing.assert_array_equal(ages(born, at), [70, 69, 69, np.nan])


def test_survival_is_days_to_death_or_to_the_last_that_is_known():
    stays = ((0, STAY, "2020-03-05T08:00:00Z", 0), (1, STAY, "2020-03-05T08:00:00Z", 0))
    target = {"kind": "survival", "name": "days", "event": "died", "cuts": [5.0, 30.0], "code": "LOCAL:death"}
    frame = rows(records(stays=stays, deaths={1: "2020-03-11T08:00:00Z"}), number(), target=target)
    assert frame["days"].tolist() == [4.0, 10.0]
    assert frame["died"].tolist() == [0.0, 1.0]


def test_an_outcome_without_a_window_is_refused():
    target = {"name": "died", "positive": 1, "negative": 0, "code": "LOCAL:death"}
    with pytest.raises(DataRefused, match="no window for the outcome died"):
        rows(records(), number(), target=target)


def test_partial_times_are_their_first_moment():
    first = int(datetime(2020, 3, 1, tzinfo=UTC).timestamp())
    assert seconds(["2020-03", "2020-03-01T01:00:00+01:00", "never", None]).tolist() == [first, first, NEVER, NEVER]
