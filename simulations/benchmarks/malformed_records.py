"""Clinical records that are broken in one way each, and what becomes of them: a use, or one clear refusal.

A case takes sound files of FHIR or of OMOP, or a sound table, and breaks them. ``REFUSED`` names words of the refusal;
``USED`` names words of the quality report that says what was left out, or nothing where nothing needs to be said.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECRET = "Featherstonehaugh"
"""A patient's name, or a value that only a row has; no message may hold it."""

PLAN = """\
study: awkward
title: Awkward records
task: {name: tabular}
table:
  patient_id: patient
  duplicates: allow
  target: {name: died, positive: 1, negative: 0, code: "LOCAL:death", window: {since: 0, until: 720}}
  features:
    - {name: age, kind: number, code: "LOCAL:age", unit: year, range: [0, 120]}
    - name: creatinine
      kind: number
      code: LOINC:2160-0
      unit: mg/dL
      range: [0, 30]
      missing: fill
      fill: 1
    - {name: diabetes, kind: boolean, code: "ICD10:E11"}
cohort: {min_sites: 2, min_patients: 1}
rounds: 1
strategy: {name: fedavg}
training: {learning_rate: 0.1, batch_size: 2, local_steps: 1}
privacy: {mechanism: none}
evaluation: {holdout: 0.25}
"""

_STAYS = (
    "visit_occurrence_id person_id visit_concept_id visit_start_date visit_start_datetime visit_end_date"
    " visit_end_datetime"
)
_MEASURES = (
    "measurement_id person_id measurement_concept_id measurement_date measurement_datetime value_as_number"
    " unit_concept_id unit_source_value measurement_source_value"
)
Files = dict[str, Any]
"""A file's name to its resources, its rows, or its bytes."""


@dataclass(frozen=True)
class Case:
    """One way to be broken."""

    name: str
    form: str
    break_it: Callable[[Files], Any]
    refused: str = ""
    used: str = ""
    site: str = ""
    """More of its section in site.yaml."""


def sound(form: str) -> Files:
    """Records of eight patients that nothing is wrong with."""
    if form == "table":
        rows = [[f"p{n}", 40 + n, 1.0 + n / 10, n % 2, n % 2] for n in range(8)]
        return {"table.csv": [["patient", "age", "creatinine", "diabetes", "died"], *rows]}
    if form == "fhir":
        return {
            "Patient.ndjson": [
                {"resourceType": "Patient", "id": f"p{n}", "gender": "male", "birthDate": f"19{50 + n}-03-04"}
                | ({"deceasedDateTime": "2020-01-20T00:00:00Z"} if n % 2 else {})
                for n in range(8)
            ],
            "Encounter.ndjson": [
                {
                    "resourceType": "Encounter",
                    "id": f"e{n}",
                    "status": "finished",
                    "class": {"code": "IMP"},
                    "subject": {"reference": f"Patient/p{n}"},
                    "period": {"start": "2020-01-10T08:00:00Z", "end": "2020-01-14T08:00:00Z"},
                }
                for n in range(8)
            ],
            "Observation.ndjson": [
                {
                    "resourceType": "Observation",
                    "id": f"o{n}",
                    "status": "final",
                    "code": {"coding": [{"system": "http://loinc.org", "code": "2160-0"}]},
                    "subject": {"reference": f"Patient/p{n}"},
                    "effectiveDateTime": "2020-01-10T09:00:00Z",
                    "valueQuantity": {"value": 1.0 + n / 10, "unit": "mg/dL", "code": "mg/dL"},
                }
                for n in range(8)
            ],
            "Condition.ndjson": [
                {
                    "resourceType": "Condition",
                    "id": "c1",
                    "code": {"coding": [{"system": "http://hl7.org/fhir/sid/icd-10-cm", "code": "E11.9"}]},
                    "subject": {"reference": "Patient/p1"},
                    "onsetDateTime": "2019-11",
                }
            ],
        }
    return {
        "PERSON.csv": [
            ["person_id", "gender_concept_id", "year_of_birth", "month_of_birth", "day_of_birth"],
            *([n, 8507, 1950 + n, 3, 4] for n in range(1, 9)),
        ],
        "VISIT_OCCURRENCE.csv": [
            _STAYS.split(),
            *([n, n, 9201, "2020-01-10", "2020-01-10 08:00:00", "2020-01-14", ""] for n in range(1, 9)),
        ],
        "MEASUREMENT.csv": [
            _MEASURES.split(),
            *(
                [n, n, 3016723, "2020-01-10", "2020-01-10 09:00:00", 1 + n / 10, 8840, "mg/dL", "CREA"]
                for n in range(1, 9)
            ),
        ],
        "DEATH.csv": [["person_id", "death_date"], [1, "2020-01-20"], [3, "2020-01-20"]],
        "CONCEPT.csv": [
            ["concept_id", "vocabulary_id", "concept_code"],
            [3016723, "LOINC", "2160-0"],
            [8840, "UCUM", "mg/dL"],
            [201826, "SNOMED", "44054006"],
            [1567956, "ICD10CM", "E11"],
        ],
        "CONCEPT_ANCESTOR.csv": [["ancestor_concept_id", "descendant_concept_id"], [201826, 201826]],
        "CONCEPT_RELATIONSHIP.csv": [
            ["concept_id_1", "concept_id_2", "relationship_id"],
            [1567956, 201826, "Maps to"],
        ],
    }


# --- how to break them -------------------------------------------------------------------------------------
def put(file: str, at: int, **elements: Any) -> Callable[[Files], Any]:
    """Other elements in a resource; None takes one away."""

    def change(files: Files) -> None:
        for name, value in elements.items():
            if value is None:
                files[file][at].pop(name.rstrip("_"))
            else:
                files[file][at][name.rstrip("_")] = value

    return change


def cell(file: str, column: str, value: Any, row: int = 1) -> Callable[[Files], Any]:
    def change(files: Files) -> None:
        files[file][row][files[file][0].index(column)] = value

    return change


def without(file: str, column: str) -> Callable[[Files], Any]:
    def change(files: Files) -> None:
        at = files[file][0].index(column)
        files[file] = [row[:at] + row[at + 1 :] for row in files[file]]

    return change


def instead(file: str, content: bytes) -> Callable[[Files], Any]:
    return lambda files: files.update({file: content})


def gone(file: str) -> Callable[[Files], Any]:
    return lambda files: files.pop(file)


def quantity(**elements: Any) -> dict[str, Any]:
    return {"value": 1.5, "unit": "mg/dL", "code": "mg/dL"} | elements


def _cut(files: Files) -> None:
    whole = gzip.compress("\n".join(map(json.dumps, files.pop("Observation.ndjson"))).encode())
    files["Observation.ndjson.gz"] = whole[: len(whole) // 2]


def _in_bundle(files: Files) -> None:
    entries = [
        {"fullUrl": f"urn:uuid:{number:04d}", "resource": resource}
        for number, resource in enumerate(r for name in list(files) for r in files.pop(name))
    ]
    urls = {f"{e['resource']['resourceType']}/{e['resource']['id']}": e["fullUrl"] for e in entries}
    for entry in entries:
        if subject := entry["resource"].get("subject"):
            subject["reference"] = urls[subject["reference"]]
    files["bundle.json"] = json.dumps({"resourceType": "Bundle", "type": "collection", "entry": entries}).encode()


def _twice(files: Files) -> None:
    files["again.ndjson"] = [resource for found in files.values() for resource in found]


def _mixed_lines(files: Files) -> None:
    lines = [json.dumps(resource) for name in list(files) for resource in files.pop(name)]
    files["all.ndjson"] = ("\r\n\r\n".join(lines)).encode()


OBS, ENC, PAT = "Observation.ndjson", "Encounter.ndjson", "Patient.ndjson"
MEA, VIS, PER = "MEASUREMENT.csv", "VISIT_OCCURRENCE.csv", "PERSON.csv"
CASES = (
    # FHIR: files
    Case("line that is not JSON", "fhir", instead(OBS, b'{"resourceType": "Observation", \n'), "is not JSON"),
    Case("file cut off in gzip", "fhir", _cut, "cannot be read"),
    Case("gz that is not gzip", "fhir", instead("x.ndjson.gz", b"plain"), "cannot be read"),
    Case("bytes that are not UTF-8", "fhir", instead(OBS, b'{"resourceType": "Obs\xff\xfe"}\n'), "is not JSON"),
    Case("number in place of a resource", "fhir", instead(OBS, b"17\n"), "is no resource"),
    Case("list in place of a resource", "fhir", instead(OBS, b"[]\n"), "is no resource"),
    Case("array in a .json file", "fhir", instead("x.json", b"[1, 2]"), "is no resource of FHIR"),
    Case("empty file", "fhir", instead("Procedure.ndjson", b"")),
    Case("blank lines and CRLF, all in one file", "fhir", _mixed_lines),
    Case("no Patient at all", "fhir", gone(PAT), "holds no Patient"),
    Case("the same resources in two files", "fhir", _twice),
    Case("a bundle whose addresses are urn:uuid", "fhir", _in_bundle),
    Case("bundle entry that is no list", "fhir", instead("x.json", b'{"resourceType": "Bundle", "entry": 3}'),
         "Bundle"),
    Case("resource of an unknown kind", "fhir", instead("x.ndjson", b'{"resourceType": "Spaceship", "id": "x"}\n')),
    Case("resource without a kind", "fhir", instead("x.ndjson", b'{"id": "x"}\n'), "is no resource"),
    # FHIR: resources
    Case("patient without an id", "fhir", put(PAT, 0, id=None), "is no Patient"),
    Case("patient whose name is a birth date", "fhir", put(PAT, 0, birthDate=SECRET), "birthDate"),
    Case("later patient whose birth date is a name", "fhir", put(PAT, 7, birthDate=SECRET), "age: missing value"),
    Case("encounter with a class of release 5", "fhir", put(ENC, 0, class_=[{"coding": [{"code": "IMP"}]}]),
         "Encounter"),
    Case("encounter without a class", "fhir", put(ENC, 5, class_=None), "Encounter"),
    Case("encounter without a period", "fhir", put(ENC, 0, period=None), used="encounters without a time: 1"),
    Case(
        "encounter that ends before it begins",
        "fhir",
        put(ENC, 0, period={"start": "2020-01-10T08:00:00Z", "end": "2019-01-10T08:00:00Z"}),
        used="encounters that end before they begin: 1",
    ),
    Case(
        "encounter of a patient who is not there",
        "fhir",
        put(ENC, 0, subject={"reference": f"Patient/{SECRET}"}),
        used="encounters of no known patient: 1",
    ),
    Case("encounter entered in error", "fhir", put(ENC, 0, status="entered-in-error"), used="nothing was: 1"),
    Case("observation in an impossible year", "fhir", put(OBS, 0, effectiveDateTime="0203-01-10T09:00:00Z"),
         used="facts in an impossible year: 1"),
    Case("observation whose time is a name", "fhir", put(OBS, 6, effectiveDateTime=SECRET),
         used="facts without a time: 1"),
    Case("observation without a subject", "fhir", put(OBS, 0, subject=None), used="facts of no known patient: 1"),
    Case("observation without a code", "fhir", put(OBS, 0, code=None), "code"),
    Case("observation whose code is text", "fhir", put(OBS, 6, code=SECRET), "Observation"),
    Case("value that is text", "fhir", put(OBS, 0, valueQuantity=quantity(value=SECRET)), "valueQuantity"),
    Case("later value that is text", "fhir", put(OBS, 6, valueQuantity=quantity(value=SECRET)), "valueQuantity"),
    Case("value without a unit", "fhir", put(OBS, 0, valueQuantity={"value": 1.5}), "come without a unit"),
    Case("value without a unit, which site.yaml gives", "fhir", put(OBS, 0, valueQuantity={"value": 1.5}),
         site="units: {creatinine: mg/dL}"),
    Case("value in a unit of another kind", "fhir", put(OBS, 0, valueQuantity=quantity(code="umol/L")), "umol/L"),
    Case("value in such a unit, with a factor", "fhir", put(OBS, 0, valueQuantity=quantity(code="umol/L", value=90)),
         site="units: {creatinine: {unit: umol/L, factor: 0.011312}}"),
    Case("unit that is a name", "fhir", put(OBS, 0, valueQuantity=quantity(code=SECRET)), "a unit that is not known"),
    Case("value far outside the plan's range", "fhir", put(OBS, 0, valueQuantity=quantity(value=15000.0)),
         "outside the plan's range"),
    Case("answer in words where a number is wanted", "fhir", put(OBS, 0, valueQuantity=None, valueString=SECRET),
         used="facts of creatinine with no number: 1"),
    Case("observation entered in error", "fhir", put(OBS, 0, status="entered-in-error"), used="nothing was: 1"),
    Case("death that nobody dated", "fhir", put(PAT, 0, deceasedBoolean=True), "died: missing target"),
    Case("code in site.yaml of no feature", "fhir", lambda files: None, "speaks of sodium",
         site='codes: {sodium: ["LOINC:2951-2"]}'),
    # OMOP
    Case("no person table", "omop", gone(PER), "has no table person"),
    Case("no visits' dates", "omop", without(VIS, "visit_start_date"), "visit_occurrence.visit_start_date"),
    Case("no concept table", "omop", gone("CONCEPT.csv"), "has no table concept"),
    Case("no measurements at all", "omop", gone(MEA)),
    Case("no table of ancestors", "omop", gone("CONCEPT_ANCESTOR.csv")),
    Case("person whose id is a name", "omop", cell(PER, "person_id", SECRET), "cannot be read"),
    Case("value that is a name", "omop", cell(MEA, "value_as_number", SECRET), "cannot be read"),
    Case("day that is a name", "omop", lambda files: [cell(MEA, "measurement_date", SECRET)(files),
         cell(MEA, "measurement_datetime", SECRET)(files)], used="facts without a time: 1"),
    Case("measurement of nobody", "omop", cell(MEA, "person_id", 99), used="facts of no known patient: 1"),
    Case("unit in the hospital's words alone", "omop", cell(MEA, "unit_concept_id", 0)),
    Case("unit that is a name ", "omop", lambda files: [cell(MEA, "unit_concept_id", 0)(files),
         cell(MEA, "unit_source_value", SECRET)(files)], "a unit that is not known"),
    Case("row with a cell too many", "omop", lambda files: files[MEA][3].append(SECRET), "cannot be read"),
    Case("file that is not UTF-8", "omop", instead(MEA, b"measurement_id,person_id\n1,\xff\xfe\n"), "cannot be read"),
    Case("empty file of persons", "omop", instead(PER, b""), "has no table person"),
    Case("vocabulary with tabs", "omop", lambda files: files.update({"CONCEPT.csv": "\n".join(
         "\t".join(map(str, row)) for row in files["CONCEPT.csv"]).encode()})),
    Case("visit without an end", "omop", cell(VIS, "visit_end_date", "")),
    Case("year of birth that nobody knows", "omop", cell(PER, "year_of_birth", ""), "age: missing value"),
    # a table
    Case("row with a cell too many ", "table", lambda files: files["table.csv"][2].append(SECRET), "row 2"),
    Case("number that is a name", "table", cell("table.csv", "creatinine", SECRET), "not a number"),
    Case("yes/no that is a name", "table", cell("table.csv", "diabetes", SECRET), "neither yes nor no"),
    Case("no column of the outcome", "table", without("table.csv", "died"), "has no column died"),
)  # fmt: skip


def written(case: Case, folder: Path) -> Path:
    """The case on disk; the path of its site.yaml."""
    files = sound(case.form)
    case.break_it(files)
    records = folder / "records"
    records.mkdir(parents=True)
    for name, content in files.items():
        if isinstance(content, bytes):
            (records / name).write_bytes(content)
        elif case.form == "fhir":
            (records / name).write_text("".join(json.dumps(resource) + "\n" for resource in content), encoding="utf-8")
        else:
            text = "".join(",".join(map(str, row)) + "\n" for row in content)
            (records / name).write_text(text, encoding="utf-8")
    place = {"fhir": "path: records", "omop": "folder: records", "table": "path: records/table.csv"}[case.form]
    lines = ["site: st-marys", f"{case.form}:", f"  {place}", *([f"  {case.site}"] if case.site else [])]
    (folder / "site.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "site.yaml"


def fault(case: Case, folder: Path) -> str:
    """What is wrong with what becomes of a case; "" where it ends as it should."""
    return judged(case, written(case, folder))


def judged(case: Case, site_yaml: Path) -> str:
    """The same of a case that is on disk."""
    from cloister_client.connectors.connector import open_records
    from cloister_client.dataset import load_dataset
    from cloister_shared.errors import DataRefused
    from cloister_shared.plan_file import read_plan

    try:
        page = load_dataset(open_records(site_yaml), read_plan(PLAN)).quality.page()
    except DataRefused as refusal:
        said = str(refusal)
        if not case.refused or case.refused not in said:
            return f"refused: {said}"
        clear = refusal.mend and len(said.splitlines()) == 1 and len(said) < 500 and said.endswith(".")
        return "" if clear and SECRET not in said else f"no clear refusal: {said}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if case.refused:
        return "used, where it had to be refused"
    return "" if case.used in page and SECRET not in page else f"not said: {page}"
