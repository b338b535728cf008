"""Invented hospitals that keep the same kind of records in other forms: FHIR, OMOP, HL7, and a flat table.

The flat table is worked out here one record at a time, by the plan's words and not by the connectors' code, so that
all agree only if the connectors are right.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field

from cloister_client.units import factor
from cloister_shared.plan import Mechanism
from cloister_simulations.site_folder import invented_names

Form = Literal["fhir", "omop", "hl7", "ccda", "table"]
DAY, HOUR = 86400, 3600
INPATIENT, EMERGENCY, OUTPATIENT = "IMP", "EMER", "AMB"


class ClinicalForms(BaseModel):
    """Invented stays whose readmission has a known risk, at hospitals that each keep them in another form."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    source: Literal["clinical-forms"]
    sites: Annotated[int, Field(ge=1, le=20)] = 3
    patients: Annotated[int, Field(ge=4)] = 1200
    forms: tuple[Form, ...] = Field(("fhir", "omop", "table"), min_length=1)
    """Of the first hospital, the second and so on, and from the first again."""
    seed: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True)
class Person:
    """A patient; the times of this file are seconds from 1970 UTC."""

    id: int
    sex: str
    birth: date
    death: int | None


@dataclass(frozen=True)
class Visit:
    """An encounter."""

    id: int
    person: int
    start: int
    end: int
    kind: str


@dataclass(frozen=True)
class Fact:
    """Anything with a code and a time. ``value`` is a number, the code of an answer, or nothing."""

    id: int
    person: int
    visit: int
    time: int
    code: str
    value: float | str | None = None
    unit: str | None = None


@dataclass(frozen=True)
class Invented:
    """All that one hospital knows."""

    people: list[Person]
    visits: list[Visit]
    facts: list[Fact]


_MEASURED = {
    # mean, sd, decimals, and the units that it is written in, each with how often
    "LOINC:2160-0": (1.1, 0.35, 2, (("mg/dL", 0.7), ("g/L", 0.3))),
    "LOINC:718-7": (13.2, 1.8, 1, (("g/dL", 0.8), ("g/L", 0.2))),
    "LOINC:2951-2": (139.0, 4.0, 0, (("mmol/L", 1.0),)),
    "LOINC:29463-7": (78.0, 14.0, 1, (("kg", 0.6), ("[lb_av]", 0.4))),
    "LOINC:8310-5": (37.0, 0.6, 1, (("Cel", 0.7), ("[degF]", 0.3))),
    "LOINC:8480-6": (130.0, 19.0, 0, (("mm[Hg]", 1.0),)),
    "LOINC:8867-4": (84.0, 14.0, 0, (("/min", 1.0),)),
}
_OFTEN = ("LOINC:8480-6", "LOINC:8867-4", "LOINC:8310-5")
_SMOKING = ("266919005", "8517006", "449868002")
_DIABETES = ("ICD10:E11.9", "ICD10:E11.65", "ICD10:E11.22")
_OTHER_ILLS = ("ICD10:I10", "ICD10:J44.1", "ICD10:E10.9")


def invent(patients: int, seed: int) -> Invented:
    """The same hospital each time."""
    rng = np.random.default_rng(seed)
    people, visits, facts = list[Person](), list[Visit](), list[Fact]()
    for number in range(1, patients + 1):
        _invent_person(rng, 1000 * (seed + 1) * 100 + number, people, visits, facts)
    return Invented(people, visits, facts)


def _invent_person(
    rng: np.random.Generator, id: int, people: list[Person], visits: list[Visit], facts: list[Fact]
) -> None:
    z = {code: float(rng.normal()) for code in _MEASURED}
    birth = date(int(rng.integers(1930, 2000)), int(rng.integers(1, 13)), int(rng.integers(1, 29)))
    sex, diabetic, smoking = ("male", "female")[int(rng.integers(2))], rng.random() < 0.3, int(rng.integers(3))
    at = int(datetime(2018, 1, 1, tzinfo=UTC).timestamp()) + int(rng.integers(0, 4 * 365 * DAY))

    def note(visit: int, time: int, code: str, value: float | str | None = None, unit: str | None = None) -> None:
        facts.append(Fact(len(facts) + 1, id, visit, time, code, value, unit))

    risk = 0.9 * z["LOINC:2160-0"] - 0.7 * z["LOINC:718-7"] + 0.8 * diabetic + 0.01 * (2018 - birth.year - 55) - 1.0
    for _ in range(int(rng.integers(1, 5))):
        kind = (INPATIENT, EMERGENCY, OUTPATIENT)[int(rng.choice(3, p=(0.7, 0.1, 0.2)))]
        lasts = int(rng.integers(1, 10)) * DAY if kind == INPATIENT else int(rng.integers(1, 9)) * HOUR
        visit = Visit(len(visits) + 1, id, at, at + lasts + int(rng.integers(0, DAY)), kind)
        visits.append(visit)
        for code, (mean, sd, decimals, units) in _MEASURED.items():
            for _ in range(int(rng.integers(3, 8)) if code in _OFTEN else int(rng.integers(0, 4))):
                true = mean + sd * (0.8 * z[code] + 0.6 * float(rng.normal()))
                unit = units[int(rng.choice(len(units), p=[share for _, share in units]))][0]
                by = factor(units[0][0], unit)
                assert by is not None
                time = at + int(rng.integers(-6 * HOUR, 30 * HOUR)) // 60 * 60
                note(visit.id, time, code, round(true * by[0] + by[1], decimals + 2), unit)
        if diabetic and rng.random() < 0.8:
            note(visit.id, at - int(rng.integers(0, 300)) * DAY, _DIABETES[int(rng.integers(3))])
            note(visit.id, at + HOUR, "RXNORM:860975")
        note(visit.id, at, _OTHER_ILLS[int(rng.integers(3))])
        if rng.random() < 0.8:
            note(visit.id, at + 2 * HOUR, "LOINC:72166-2", _SMOKING[smoking])
        if rng.random() < 0.3:
            note(visit.id, at + 5 * HOUR, "SNOMED:265764009")
        soon = kind == INPATIENT and rng.random() < 1 / (1 + np.exp(-risk))
        at = visit.end + int(rng.integers(1, 29) if soon else rng.integers(40, 400)) * DAY
        if soon and visit is visits[-1]:
            visits.append(again := Visit(len(visits) + 1, id, at, at + 2 * DAY, INPATIENT))
            at = again.end + int(rng.integers(40, 400)) * DAY
    died = at - 30 * DAY if rng.random() < 0.1 else None
    people.append(Person(id, sex, birth, died))


# --- to disk -----------------------------------------------------------------------------------------------
def write_forms(source: ClinicalForms, folder: Path) -> list[Path]:
    """Every hospital in its form; the paths of the ``site.yaml`` files."""
    made: list[Path] = []
    for number, site in enumerate(invented_names(source.sites)):
        form = source.forms[number % len(source.forms)]
        invented = invent(source.patients // source.sites, source.seed * 100 + number)
        made.append(write_form(invented, form, folder / site, site))
    return sorted(made)


def write_form(invented: Invented, form: Form, folder: Path, site: str) -> Path:
    """One hospital's records and the ``site.yaml`` that says where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    match form:
        case "fhir":
            write_fhir(invented, folder / "export")
            section: dict[str, Any] = {"fhir": {"path": "export"}}
        case "omop":
            write_omop(invented, folder / "cdm")
            section = {"omop": {"folder": "cdm"}}
        case "hl7" | "ccda":
            # Imported here: that file speaks of the people and visits of this one.
            from cloister_simulations.sources.hl7_forms import write_documents, write_messages

            (write_messages if form == "hl7" else write_documents)(invented, folder / "messages")
            section = {"hl7": {"path": "messages"}}
        case "table":
            flat(invented).to_parquet(folder / "table.parquet", index=False)
            section = {"table": {"path": "table.parquet", "units": {"weight": "lb"}}}
    terms = {"site": site, "policy": {"mechanisms": [mechanism.value for mechanism in Mechanism]}, **section}
    (folder / "site.yaml").write_text(yaml.safe_dump(terms, sort_keys=False), encoding="utf-8", newline="\n")
    return folder / "site.yaml"


def _spelt(time: int) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%dT%H:%M:%S")


# --- FHIR --------------------------------------------------------------------------------------------------
_SYSTEMS = {
    "LOINC": "http://loinc.org",
    "SNOMED": "http://snomed.info/sct",
    "RXNORM": "http://www.nlm.nih.gov/research/umls/rxnorm",
    "ICD10": "http://hl7.org/fhir/sid/icd-10-cm",
}
_RESOURCES = {"LOINC": "Observation", "SNOMED": "Procedure", "RXNORM": "MedicationRequest", "ICD10": "Condition"}


def write_fhir(invented: Invented, folder: Path) -> None:
    """NDJSON as Bulk Data writes it; the observations gzipped and in two files."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {}
    for kind, resource in _resources(invented):
        lines.setdefault(kind, []).append(json.dumps(resource, separators=(",", ":")))
    for kind, found in lines.items():
        whole = "\n".join(found[: len(found) // 2] if kind == "Observation" else found) + "\n"
        if kind == "Observation":
            rest = ("\n".join(found[len(found) // 2 :]) + "\n").encode()
            (folder / "Observation.001.ndjson.gz").write_bytes(gzip.compress(rest, mtime=0))
        (folder / f"{kind}.000.ndjson").write_text(whole, encoding="utf-8", newline="\n")


def _resources(invented: Invented) -> Iterator[tuple[str, dict[str, Any]]]:
    for person in invented.people:
        died = {"deceasedDateTime": f"{_spelt(person.death)}Z"} if person.death else {"deceasedBoolean": False}
        named: dict[str, Any] = {"gender": person.sex, "birthDate": person.birth.isoformat()}
        yield "Patient", {"resourceType": "Patient", "id": str(person.id), **named, **died}
    for visit in invented.visits:
        yield (
            "Encounter",
            {
                "resourceType": "Encounter",
                "id": str(visit.id),
                "status": "finished",
                "class": {"system": "http://terminology.hl7.org/CodeSystem/v3-ActCode", "code": visit.kind},
                "subject": {"reference": f"Patient/{visit.person}"},
                # As the hospital's clock shows it, one hour before UTC.
                "period": {"start": f"{_spelt(visit.start + HOUR)}+01:00", "end": f"{_spelt(visit.end)}Z"},
            },
        )
    for fact in invented.facts:
        yield _resource(fact)


def _resource(fact: Fact) -> tuple[str, dict[str, Any]]:
    system, _, code = fact.code.partition(":")
    kind, concept = _RESOURCES[system], {"coding": [{"system": _SYSTEMS[system], "code": code}]}
    made: dict[str, Any] = {
        "resourceType": kind,
        "id": str(fact.id),
        "subject": {"reference": f"Patient/{fact.person}"},
        "encounter": {"reference": f"Encounter/{fact.visit}"},
    }
    time = f"{_spelt(fact.time)}Z"
    match kind:
        case "Observation":
            made |= {"status": "final", "code": concept, "effectiveDateTime": time}
            if isinstance(fact.value, str):
                coding = {"system": _SYSTEMS["SNOMED"], "code": fact.value}
                made["valueCodeableConcept"] = {"coding": [coding]}
            else:
                made["valueQuantity"] = {
                    "value": fact.value,
                    "unit": fact.unit,
                    "system": "http://unitsofmeasure.org",
                    "code": fact.unit,
                }
        case "Condition":
            made |= {"code": concept, "onsetDateTime": time}
        case "Procedure":
            made |= {"status": "completed", "code": concept, "performedPeriod": {"start": time}}
        case _:
            made |= {"status": "active", "intent": "order", "medicationCodeableConcept": concept, "authoredOn": time}
    return kind, made


# --- OMOP --------------------------------------------------------------------------------------------------
_UNITS = {"mg/dL": 8840, "g/L": 8636, "g/dL": 8713, "mmol/L": 8753, "kg": 9529, "[lb_av]": 8739, "Cel": 586323,
          "[degF]": 9289, "mm[Hg]": 8876, "/min": 8541}  # fmt: skip
_VOCABULARY = {"LOINC": "LOINC", "SNOMED": "SNOMED", "RXNORM": "RxNorm", "ICD10": "ICD10CM"}
_TABLES = {
    "LOINC": ("measurement", "measurement"),
    "SNOMED": ("procedure_occurrence", "procedure"),
    "RXNORM": ("drug_exposure", "drug"),
    "ICD10": ("condition_occurrence", "condition"),
}
Table = tuple[tuple[str, ...], list[tuple[Any, ...]]]


def write_omop(invented: Invented, folder: Path) -> None:
    """A folder of CSVs."""
    write_tables(omop_tables(invented), folder)


def write_tables(tables: dict[str, Table], folder: Path) -> None:
    """One CSV a table."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (columns, rows) in tables.items():
        with (folder / f"{name.upper()}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(rows)


def omop_tables(invented: Invented) -> dict[str, Table]:
    """Columns and rows of each table. Diagnoses stand under a standard concept, and under ICD-10 as source concept."""
    codes = sorted({fact.code for fact in invented.facts} | {f"SNOMED:{code}" for code in _SMOKING})
    concepts = {code: 2_000_000_001 + at for at, code in enumerate(codes)}
    known: list[tuple[Any, ...]] = []
    for code, concept in concepts.items():
        system, _, bare = code.partition(":")
        known.append((concept, _VOCABULARY[system], bare, "" if system == "ICD10" else "S"))
    known += [(concept, "UCUM", unit, "S") for unit, concept in _UNITS.items()]
    people = [
        (p.id, {"male": 8507, "female": 8532}[p.sex], p.birth.year, p.birth.month, p.birth.day) for p in invented.people
    ]
    stays = {INPATIENT: 9201, EMERGENCY: 9203, OUTPATIENT: 9202}
    visits = [
        (v.id, v.person, stays[v.kind], _spelt(v.start)[:10], _sql(v.start), _spelt(v.end)[:10], _sql(v.end))
        for v in invented.visits
    ]
    made: dict[str, Table] = {
        "person": (("person_id", "gender_concept_id", "year_of_birth", "month_of_birth", "day_of_birth"), people),
        "visit_occurrence": (
            (
                "visit_occurrence_id", "person_id", "visit_concept_id", "visit_start_date", "visit_start_datetime",
                "visit_end_date", "visit_end_datetime",
            ),
            visits,
        ),
        "death": (
            ("person_id", "death_date", "death_datetime"),
            [(p.id, _spelt(p.death)[:10], _sql(p.death)) for p in invented.people if p.death],
        ),
        "concept": (("concept_id", "vocabulary_id", "concept_code", "standard_concept"), known),
        "concept_ancestor": (
            ("ancestor_concept_id", "descendant_concept_id"),
            [(concept, concept) for concept in concepts.values()],
        ),
    }  # fmt: skip
    for system, (table, name) in _TABLES.items():
        facts = [fact for fact in invented.facts if fact.code.startswith(f"{system}:")]
        made[table] = _omop_facts(table, name, facts, concepts)
    return made


def _omop_facts(table: str, name: str, facts: Sequence[Fact], concepts: dict[str, int]) -> Table:
    day = {"condition": "condition_start", "drug": "drug_exposure_start"}.get(name, name)
    columns = [f"{table}_id", "person_id", f"{name}_concept_id", f"{day}_date", f"{day}_datetime"]
    columns += ["visit_occurrence_id", f"{name}_source_value", f"{name}_source_concept_id"]
    if name == "measurement":
        columns += ["value_as_number", "value_as_concept_id", "unit_concept_id", "unit_source_value"]
    rows = list[tuple[Any, ...]]()
    for fact in facts:
        concept = concepts[fact.code]
        icd = fact.code.startswith("ICD10:")
        row: list[Any] = [fact.id, fact.person, 0 if icd else concept, _spelt(fact.time)[:10], _sql(fact.time)]
        row += [fact.visit, fact.code.partition(":")[2], concept]
        if name == "measurement":
            answer = concepts[f"SNOMED:{fact.value}"] if isinstance(fact.value, str) else ""
            number = fact.value if isinstance(fact.value, float) else ""
            row += [number, answer, _UNITS.get(fact.unit or "", 0), fact.unit or ""]
        rows.append(tuple(row))
    return tuple(columns), rows


def _sql(time: int) -> str:
    return _spelt(time).replace("T", " ")


# --- the flat table ----------------------------------------------------------------------------------------
def flat(invented: Invented) -> pd.DataFrame:
    """The rows of the scenario's plan, one inpatient stay each, worked out by hand; weight is in pounds."""
    by_id = {person.id: person for person in invented.people}
    stays = sorted(
        (visit for visit in invented.visits if visit.kind == INPATIENT),
        key=lambda visit: (str(visit.person), visit.start, str(visit.id)),
    )
    facts: dict[tuple[int, str], list[Fact]] = {}
    for fact in invented.facts:
        facts.setdefault((fact.person, fact.code), []).append(fact)
    return pd.DataFrame([_row(stay, by_id[stay.person], stays, facts) for stay in stays])


def _row(
    stay: Visit, person: Person, stays: Sequence[Visit], facts: dict[tuple[int, str], list[Fact]]
) -> dict[str, Any]:
    def within(codes: Sequence[str], since: float, until: float) -> list[Fact]:
        found = [fact for code in codes for fact in facts.get((person.id, code), [])]
        return [fact for fact in found if since * HOUR <= fact.time - stay.start < until * HOUR]

    def numbers(code: str, unit: str, since: float, until: float) -> list[float]:
        made = list[tuple[int, float]]()
        for fact in within([code], since, until):
            by = factor(fact.unit or "", unit)
            assert by is not None
            assert isinstance(fact.value, float)
            made.append((fact.time, fact.value if by == (1.0, 0.0) else fact.value * by[0] + by[1]))
        return [value for _, value in sorted(made)]

    year = -8760.0
    start = datetime.fromtimestamp(stay.start, UTC)
    before = (start.month, start.day) < (person.birth.month, person.birth.day)
    creatinine = numbers("LOINC:2160-0", "mg/dL", year, 24)
    haemoglobin = numbers("LOINC:718-7", "g/dL", -24, 24)
    sodium = numbers("LOINC:2951-2", "mmol/L", year, 24)
    temperature = numbers("LOINC:8310-5", "degC", -6, 24)
    pressure = numbers("LOINC:8480-6", "mmHg", -6, 24)
    pulse = numbers("LOINC:8867-4", "1/min", -6, 24)
    # In the pounds of the hospital's scale where the last one was; a converted one reads as it does in kilograms.
    weights = numbers("LOINC:29463-7", "kg", year, 24)
    pound = factor("lb", "kg")
    assert pound is not None
    smoking = sorted((fact.time, str(fact.value)) for fact in within(["LOINC:72166-2"], year, 24))
    again = [
        other
        for other in stays
        if other.person == stay.person and 0 <= other.start - stay.end < 720 * HOUR and other is not stay
    ]
    return {
        "patient": str(person.id),
        "age": start.year - person.birth.year - before,
        "sex": person.sex,
        "creatinine": creatinine[-1] if creatinine else None,
        "haemoglobin": min(haemoglobin, default=None),
        "sodium": sodium[0] if sodium else None,
        "temperature": max(temperature, default=None),
        "systolic_bp": float(np.add.reduce(np.array(pressure))) / len(pressure) if pressure else None,
        "heart_rate_max": max(pulse, default=None),
        "weight": weights[-1] / pound[0] if weights else None,
        "diabetes": int(bool(within(_DIABETES, -87600, 24))),
        "metformin": int(bool(within(["RXNORM:860975"], year, 24))),
        "measured": float(len(within(["LOINC:8867-4"], year, 24))),
        "smoking": smoking[-1][1] if smoking else None,
        "readmitted": "yes" if again else "no",
    }
