"""What HL7 messages and C-CDA documents say: units, answers, zones, corrections, and who is meant."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from cloister_client.cli import app
from cloister_client.connectors.connector import open_records
from cloister_client.connectors.newest import moment
from cloister_client.doctor import _records
from cloister_shared.errors import DataRefused
from cloister_shared.schema import Schema

sys.path.insert(0, str(Path(__file__).parents[3] / "simulations" / "benchmarks"))
from malformed_hl7 import sound  # pyright: ignore[reportMissingImports]
from malformed_records import PLAN  # pyright: ignore[reportMissingImports]

SCHEMA = Schema.model_validate_json(
    json.dumps(
        {
            "patient_id": "patient",
            "target": {"name": "died", "positive": 1, "negative": 0, "code": "LOCAL:death", "window": {"until": 720}},
            "features": [
                {"name": "creatinine", "kind": "number", "code": "LOINC:2160-0", "unit": "mg/dL", "range": [0, 30]},
                {
                    "name": "smoking",
                    "kind": "category",
                    "code": "LOINC:72166-2",
                    "categories": ["8517006", "266919005"],
                },
                {"name": "diabetes", "kind": "boolean", "code": "ICD10:E11"},
                {"name": "metformin", "kind": "boolean", "code": "RXNORM:860975"},
            ],
        }
    )
)
HEAD = "MSH|^~\\&|||||{sent}||{kind}|1|P|2.5.1"
PATIENT = "PID|1||7^^^H&1.2.3&ISO^MR~8^^^CLINIC^PI||||F"
VISIT = "PV1|1|I|||||||||||||||||e1|||||||||||||||||||||||||20200110080000|20200114080000"


def written(folder: Path, *messages: tuple[str, ...], own: str = "", **head: str) -> Path:
    """One file a message, the newest first; the path of site.yaml."""
    (folder / "m").mkdir(exist_ok=True)
    for number, segments in enumerate(messages):
        first = HEAD.format(**({"sent": f"202001150{9 - number}0000", "kind": "ORU^R01"} | head))
        (folder / "m" / f"{number}.hl7").write_text("\r".join([first, *segments]))
    (folder / "site.yaml").write_text(f"site: st-marys\nhl7:\n  path: m\n{own}")
    return folder / "site.yaml"


def row(site_yaml: Path) -> pd.Series:
    frame = open_records(site_yaml).rows(SCHEMA)
    assert len(frame) == 1
    return frame.iloc[0]


def obx(kind: str, value: str, unit: str = "mg/dL", status: str = "F", time: str = "20200110090000") -> str:
    return f"OBX|1|{kind}|2160-0^^LN|1|{value}|{unit}|||||{status}|||{time}"


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("NM", "1.25", 1.25), ("SN", "^1.5", 1.5), ("SN", "<^0.5", 0.5), ("SN", "^1^-^2", None), ("ST", "1.75", 1.75),
        ("ST", "see note", None), ("NM", "1,5", None), ("NM", "1_000", None), ("NM", "nan", None), ("", "2", 2.0),
        ("NM", '""', None),
    ],
)  # fmt: skip
def test_a_result_of_each_type(kind, value, expected, tmp_path):
    found = row(written(tmp_path, (PATIENT, VISIT, obx(kind, value))))["creatinine"]
    assert np.isnan(found) if expected is None else found == expected


def test_a_later_message_corrects_whatever_the_order_of_files(tmp_path):
    site = written(tmp_path, (PATIENT, VISIT, obx("NM", "2.0", status="C")), (PATIENT, VISIT, obx("NM", "1.0")))
    assert row(site)["creatinine"] == 2.0


def test_a_result_that_is_taken_back_is_gone(tmp_path):
    site = written(tmp_path, (PATIENT, VISIT, obx("NM", "", status="D")), (PATIENT, VISIT, obx("NM", "1.0")))
    frame = open_records(site).rows(SCHEMA)
    assert np.isnan(frame["creatinine"].iloc[0])
    assert frame.attrs["notes"] == ["results that say that nothing was: 1"]


def test_each_element_of_a_patient_and_a_visit_is_the_newest_that_was_said(tmp_path):
    older = (PATIENT.replace("|F", "|M"), VISIT)
    newer = ("PID|1||7^^^H^MR" + "|" * 26 + "20200120|Y", "PV1|1||" + "|" * 16 + "e1|", obx("NM", "1.0"))
    frame = open_records(written(tmp_path, newer, older)).rows(SCHEMA)
    assert list(frame["died"]) == [1]


def test_the_alternate_code_the_coded_answer_diagnoses_and_prescriptions(tmp_path):
    results = (
        PATIENT, VISIT, "OBX|1|NM|CREA^Crea^L^2160-0^Creatinine^LN||80|ug/dL",
        "OBX|2|CWE|72166-2^Smoking^LN||8517006^Former^SCT", "OBX|3|NM|2345-7^Glucose^LN||90|mg/dL",
        "DG1|1|I10|E119|||F", "ORC|NW|1||||||||20200110", "RXE||860975^^RXNORM",
    )  # fmt: skip
    found = row(written(tmp_path, results))
    assert found["creatinine"] == pytest.approx(0.08)
    assert found["smoking"] == "8517006"
    assert (found["diabetes"], found["metformin"]) == (1.0, 1.0)


def test_the_zone_of_the_message_is_that_of_its_times(tmp_path):
    assert moment("202001100900", "+01:00") == "2020-01-10T09:00:00+01:00"
    assert moment("20200110090000-0530", "+01:00") == "2020-01-10T09:00:00-05:30"
    assert moment("20200110", "+01:00") == "2020-01-10"
    assert moment("2020011") is None
    late = obx("NM", "1.0", time="20200111083000")  # 07:30 UTC, half an hour before the first day ends
    site = written(tmp_path, (PATIENT, VISIT.replace("0000|", "0000+0000|") + "+0000", late), sent="202001150900+0100")
    assert row(site)["creatinine"] == 1.0


@pytest.mark.parametrize(("authority", "name"), [("H", "7"), ("1.2.3", "7"), ("CLINIC", "8")])
def test_the_patient_is_known_by_the_number_of_the_authority_that_is_named(authority, name, tmp_path):
    site = written(tmp_path, (PATIENT, VISIT, obx("NM", "1.0")), own=f"  authority: '{authority}'\n")
    assert row(site)["patient"] == name


def test_messages_and_documents_of_one_folder_are_of_the_same_patients(tmp_path):
    (tmp_path / "m").mkdir()
    documents = sound("ccda")
    (tmp_path / "m" / "p1.xml").write_text(documents["p1.xml"])
    message = sound("hl7")["results.hl7"].split("MSH|")[2].replace("|e1|", "|another|").replace("202001", "202101")
    (tmp_path / "m" / "p1.hl7").write_text(f"MSH|{message}")
    (tmp_path / "site.yaml").write_text("site: st-marys\nhl7: {path: m}\n")
    schema = SCHEMA.model_copy(update={"features": SCHEMA.features[:1]})
    frame = open_records(tmp_path / "site.yaml").rows(schema)
    assert list(frame["patient"]) == ["p1", "p1"]
    assert list(frame["creatinine"]) == [1.1, 1.1]


def test_the_commands_work_with_it(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "results.hl7").write_text(sound("hl7")["results.hl7"])
    (tmp_path / "site.yaml").write_text("site: st-marys\nhl7: {path: m}\n")
    (tmp_path / "plan.yaml").write_text(PLAN.replace("min_patients: 1", "min_patients: 1, max_rows: 100"))
    shown = CliRunner().invoke(app, ["map", str(tmp_path / "plan.yaml"), "--site", str(tmp_path / "site.yaml")])
    assert shown.exit_code == 0, shown.output
    assert "8 of 8, 100%" in shown.output
    checked = CliRunner().invoke(app, ["check", str(tmp_path / "plan.yaml"), str(tmp_path / "site.yaml")])
    assert checked.exit_code == 0, checked.output
    assert _records(open_records(tmp_path / "site.yaml")) == "m (HL7): 8 encounters, 4 codes"


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "site.yaml").write_text("site: st-marys\nhl7: {path: m}\n")
    with pytest.raises(DataRefused, match="there is no folder m"):
        open_records(tmp_path / "site.yaml").count()
