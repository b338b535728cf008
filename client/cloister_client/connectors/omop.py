"""Connector ``omop``: the OMOP common data model 5.4 (ohdsi.github.io/CommonDataModel) to dated facts.

The concept table says which concepts a plan's code is, ``Maps to`` which standard ones that means, and
``concept_ancestor`` which lie beneath; facts are found by these, by the code they were written under, and by the
hospital's own source value (``LOCAL:...``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cloister_client.connectors.clinical import (
    EMERGENCY,
    INPATIENT,
    NEVER,
    OUTPATIENT,
    Encounters,
    Facts,
    Patients,
    Records,
    births,
    sound,
)
from cloister_client.connectors.coded import CodedConnector
from cloister_client.site_file import OmopSource, SiteFile

if TYPE_CHECKING:
    from cloister_client.connectors.sql import Database, Kind, Piece

_VOCABULARIES = {
    "LOINC": ("LOINC",), "SNOMED": ("SNOMED",), "RXNORM": ("RxNorm", "RxNorm Extension"), "ATC": ("ATC",),
    "ICD9": ("ICD9CM",), "ICD10": ("ICD10CM", "ICD10"),
}  # fmt: skip
_SPOKEN = {vocabulary: system for system, names in _VOCABULARIES.items() for vocabulary in names}
_TABLES = (
    ("measurement", "measurement"),
    ("observation", "observation"),
    ("condition_occurrence", "condition"),
    ("drug_exposure", "drug"),
    ("procedure_occurrence", "procedure"),
)
"""Each table of facts, and what its columns' names begin with."""
_SEXES = {8507: "male", 8532: "female", 8521: "other"}
_STAYS = {9201: INPATIENT, 262: INPATIENT, 9203: EMERGENCY}
_MAPS_TO = "Maps to"


def omop_connector(site: SiteFile, terms: OmopSource, folder: Path) -> CodedConnector:
    """Of the database or folder that ``site.yaml`` names."""

    def named() -> str:
        with opened(site.site, terms, folder) as database:
            return f"{database.source} (OMOP)"

    return CodedConnector(site, folder, terms, named, partial(_records, site.site, terms, folder))


def may_write(site: str, terms: OmopSource, folder: Path) -> bool:
    """Whether the account could change the records.

    Raises:
        DataRefused: the database cannot be opened.
    """
    with opened(site, terms, folder) as database:
        return database.may_write()


def opened(site: str, terms: OmopSource, folder: Path) -> AbstractContextManager[Database]:
    """The database, to be read.

    Raises:
        DataRefused: it cannot be opened.
    """
    from cloister_client.connectors.sql import open_database

    return open_database(terms, folder, site)


def _records(site: str, terms: OmopSource, folder: Path, wanted: frozenset[str] | None) -> Records:
    """The records of these codes, or of all.

    Raises:
        DataRefused: the database cannot be read, or is no OMOP.
    """
    with opened(site, terms, folder) as database:
        patients = _patients(database)
        encounters = _encounters(database, patients)
        meant = None if wanted is None else _meant(database, wanted)
        facts, codes = _facts(database, patients, meant)
    return sound(patients, encounters, facts, codes, {})


# --- patients and encounters ---------------------------------------------------------------------------------
def _patients(database: Database) -> Patients:
    columns: dict[str, Kind] = {"person_id": "int", "gender_concept_id": "int"}
    parts: dict[str, Kind] = {"year_of_birth": "int", "month_of_birth": "int", "day_of_birth": "int"}
    found = _whole(database.read("person", columns | parts, optional=("month_of_birth", "day_of_birth")))
    order = np.argsort(found["person_id"], kind="stable")
    found = {name: column[order] for name, column in found.items()}
    born = [
        None
        if year < 0
        else f"{year:04d}" + (f"-{month:02d}" + (f"-{day:02d}" if day > 0 else "") if month > 0 else "")
        for year, month, day in zip(*(found[name] for name in parts), strict=True)
    ]
    death, dead = np.full(len(order), NEVER), np.zeros(len(order), bool)
    if database.has("death"):
        times: dict[str, Kind] = {"person_id": "int", "death_datetime": "time", "death_date": "time"}
        died = _whole(database.read("death", times, optional=("death_datetime",)))
        places = _placed(died["person_id"], found["person_id"])
        known = np.flatnonzero(places >= 0)
        death[places[known]] = _either(died, "death")[known]
        dead[places[known]] = True
    ids = found["person_id"].astype(str).astype(object)
    sexes = np.array([_SEXES.get(int(concept)) for concept in found["gender_concept_id"]], dtype=object)
    return Patients(ids, sexes, births(born), death, dead)


def _encounters(database: Database, patients: Patients) -> Encounters:
    columns: dict[str, Kind] = {"visit_occurrence_id": "int", "person_id": "int", "visit_concept_id": "int"}
    ends: dict[str, Kind] = {
        f"visit_{which}_{kind}": "time" for which in ("start", "end") for kind in ("datetime", "date")
    }
    optional = ("visit_start_datetime", "visit_end_datetime", "visit_end_date")
    found = _whole(database.read("visit_occurrence", columns | ends, optional=optional))
    below = _beneath(database, list(_STAYS))
    kind = np.full(len(found["person_id"]), OUTPATIENT, np.int32)
    for concept, stay in _STAYS.items():
        kind[np.isin(found["visit_concept_id"], list(below[concept]))] = stay
    return Encounters(
        found["visit_occurrence_id"].astype(str).astype(object),
        _placed(found["person_id"], patients.id.astype(np.int64)),
        _either(found, "visit_start"),
        _either(found, "visit_end"),
        kind,
    )


def _either(found: Piece, name: str) -> NDArray[np.int64]:
    """The moment, or else the day."""
    return np.where(found[f"{name}_datetime"] == NEVER, found[f"{name}_date"], found[f"{name}_datetime"])


def _placed(ids: NDArray[np.int64], known: NDArray[np.int64]) -> NDArray[np.int32]:
    """Where each id stands among the known ones, which are sorted; or -1."""
    if not len(known):
        return np.full(len(ids), -1, np.int32)
    places = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    return np.where(known[places] == ids, places, -1).astype(np.int32)


# --- concepts ------------------------------------------------------------------------------------------------
def _meant(database: Database, wanted: Iterable[str]) -> dict[str, frozenset[int] | str]:
    """The concepts that each code stands for; of a local one the source value."""
    split = {code: code.partition(":")[::2] for code in wanted}
    named = [within for system, within in split.values() if system in _VOCABULARIES]
    further = [within for system, within in split.values() if system in ("ICD9", "ICD10") and len(within) >= 3]
    words = database.words
    columns: dict[str, Kind] = {"concept_id": "int", "vocabulary_id": "text", "concept_code": "text"}
    rows = _whole(database.read("concept", columns, {"concept_code": named}, {"concept_code": further}))
    spelt = list(words.places)
    read = [
        (_SPOKEN.get(spelt[vocabulary], ""), spelt[code], int(concept))
        for concept, vocabulary, code in zip(*(rows[name] for name in columns), strict=True)
    ]
    direct: dict[str, set[int]] = {}
    for code, (system, within) in split.items():
        if system == "OMOP" and within.isdigit():
            direct[code] = {int(within)}
        elif system in _VOCABULARIES:
            icd = system in ("ICD9", "ICD10") and len(within) >= 3
            direct[code] = {
                concept
                for spoken, other, concept in read
                if spoken == system
                and (other == within or (icd and other.replace(".", "").startswith(within.replace(".", ""))))
            }
    standard = _mapped(database, {concept for concepts in direct.values() for concept in concepts})
    wide = {code: set().union(*(standard.get(c, {c}) | {c} for c in concepts)) for code, concepts in direct.items()}
    below = _beneath(database, {concept for concepts in wide.values() for concept in concepts})
    found: dict[str, frozenset[int] | str] = {
        code: frozenset().union(*(below[concept] for concept in concepts)) for code, concepts in wide.items()
    }
    return found | {code: within for code, (system, within) in split.items() if system == "LOCAL"}


def _mapped(database: Database, concepts: set[int]) -> dict[int, set[int]]:
    """The standard concepts that each means."""
    found: dict[int, set[int]] = {}
    if not concepts or not database.has("concept_relationship"):
        return found
    columns: dict[str, Kind] = {"concept_id_1": "int", "concept_id_2": "int", "relationship_id": "text"}
    for piece in database.read("concept_relationship", columns, {"concept_id_1": sorted(concepts)}):
        maps = piece["relationship_id"] == database.words.place(_MAPS_TO)
        for first, second in zip(piece["concept_id_1"][maps], piece["concept_id_2"][maps], strict=True):
            found.setdefault(int(first), set()).add(int(second))
    return found


def _beneath(database: Database, concepts: Iterable[int]) -> dict[int, set[int]]:
    """Each concept with all of its descendants."""
    found = {concept: {concept} for concept in concepts}
    if found and database.has("concept_ancestor"):
        columns: dict[str, Kind] = {"ancestor_concept_id": "int", "descendant_concept_id": "int"}
        for piece in database.read("concept_ancestor", columns, {"ancestor_concept_id": sorted(found)}):
            for above, below in zip(*(piece[name] for name in columns), strict=True):
                if int(above) in found:
                    found[int(above)].add(int(below))
    return found


def _names(database: Database, concepts: NDArray[np.int64], *, spoken: bool) -> dict[int, str]:
    """What concepts are called: their code, and with ``spoken`` the vocabulary before it."""
    columns: dict[str, Kind] = {"concept_id": "int", "vocabulary_id": "text", "concept_code": "text"}
    ids = [int(concept) for concept in np.unique(concepts) if concept > 0]
    rows = _whole(database.read("concept", columns, {"concept_id": ids}))
    words = list(database.words.places)
    return {
        int(concept): f"{_SPOKEN[words[vocabulary]]}:{words[code]}" if spoken else words[code]
        for concept, vocabulary, code in zip(*(rows[name] for name in columns), strict=True)
        if code >= 0 and (not spoken or words[vocabulary] in _SPOKEN)
    }


# --- facts ---------------------------------------------------------------------------------------------------
_COLUMNS: dict[str, Any] = {
    "event": np.int64, "patient": np.int32, "time": np.int64, "code": np.int64, "value": np.float64,
    "unit": np.int32, "unit_concept": np.int64, "answer": np.int32, "answer_concept": np.int64,
}  # fmt: skip
"""``code`` is a concept, or less than 0 a source value: see ``_local``."""


def _local(place: int) -> int:
    """The code of a source value, by its place among the words."""
    return -2 - place


def _facts(
    database: Database, patients: Patients, meant: Mapping[str, frozenset[int] | str] | None
) -> tuple[Facts, dict[str, NDArray[np.int32]]]:
    """All facts of these concepts or of all, and which of their codes each code of the plan stands for."""
    found = _gathered(database, patients.id.astype(np.int64), meant)
    codes, code = np.unique(found["code"], return_inverse=True)
    spoken = _names(database, codes, spoken=True) if meant is None else {}
    words = list(database.words.places)
    names = [spoken.get(int(c), f"OMOP:{c}") if c >= 0 else f"LOCAL:{words[_local(int(c))]}" for c in codes]
    unit = _worded(database, found["unit_concept"], found["unit"])
    answer = _worded(database, found["answer_concept"], found["answer"])
    words = list(database.words.places)
    columns = (found["event"], found["patient"], found["time"], code.astype(np.int32), found["value"], unit, answer)
    facts = Facts(*columns, names, words, words)
    if meant is None:
        return facts, {each: np.array([at], np.int32) for at, each in enumerate(names)}
    place = database.words.place
    numbers = {each: {_local(place(of))} if isinstance(of, str) else of for each, of in meant.items()}
    return facts, {
        each: np.flatnonzero(np.isin(codes, list(wanted))).astype(np.int32) for each, wanted in numbers.items()
    }


def _gathered(database: Database, people: NDArray[np.int64], meant: Mapping[str, Any] | None) -> Piece:
    """Every table's facts, one below the other."""
    concepts = {concept for of in (meant or {}).values() if not isinstance(of, str) for concept in of} - {0, -1}
    local = sorted({of for of in (meant or {}).values() if isinstance(of, str)})
    sought = None if meant is None else (np.array(sorted(concepts), np.int64), local)
    parts = [
        part
        for number, (table, name) in enumerate(_TABLES)
        if database.has(table) and (sought is None or concepts or local)
        for part in _of_table(database, table, name, number, people, sought)
    ]
    return {
        name: np.concatenate([part[name] for part in parts]) if parts else np.zeros(0, kind)
        for name, kind in _COLUMNS.items()
    }


def _of_table(
    database: Database,
    table: str,
    name: str,
    number: int,
    people: NDArray[np.int64],
    sought: tuple[NDArray[np.int64], list[str]] | None,
) -> Iterator[Piece]:
    """A piece of one table's facts at a time, under the concept, and under each other code that is sought."""
    day = {"condition": "condition_start", "drug": "drug_exposure_start"}.get(name, name)
    concept, source, written = f"{name}_concept_id", f"{name}_source_concept_id", f"{name}_source_value"
    measured = name in ("measurement", "observation")
    columns: dict[str, Kind] = {f"{table}_id": "int", "person_id": "int", concept: "int", source: "int"}
    columns |= {f"{day}_datetime": "time", f"{day}_date": "time"}
    if sought and sought[1]:
        columns |= {written: "text"}
    if measured:
        columns |= {"value_as_number": "number", "value_as_concept_id": "int"}
        columns |= {"unit_concept_id": "int", "unit_source_value": "text"}
        columns |= {"value_as_string": "text"} if name == "observation" else {}
    optional = [column for column in columns if column not in (f"{table}_id", "person_id", concept, f"{day}_date")]
    test: dict[str, Any] | None = None
    if sought is not None:
        test = {column: sought[0].tolist() for column in (concept, source) if len(sought[0])}
        test |= {written: sought[1]} if sought[1] else {}
    places = [] if sought is None else [database.words.place(value) for value in sought[1]]
    for piece in database.read(table, columns, test, optional=optional):
        size = len(piece["person_id"])
        none = np.full(size, -1)
        made: Piece = {
            "event": piece[f"{table}_id"] * len(_TABLES) + number,
            "patient": _placed(piece["person_id"], people),
            "time": _either(piece, day),
            "value": piece.get("value_as_number", np.full(size, np.nan)),
            "unit": piece.get("unit_source_value", none.astype(np.int32)),
            "unit_concept": piece.get("unit_concept_id", none),
            "answer": piece.get("value_as_string", none.astype(np.int32)),
            "answer_concept": piece.get("value_as_concept_id", none),
        }
        codes = [(piece[concept], np.ones(size, bool) if sought is None else np.isin(piece[concept], sought[0]))]
        if sought is not None:
            other = piece[source]
            codes.append((other, np.isin(other, sought[0]) & (other != piece[concept])))
            if places:
                codes.append((-2 - piece[written].astype(np.int64), np.isin(piece[written], places)))
        for code, kept in codes:
            at = np.flatnonzero(kept)
            yield {**{column: values[at] for column, values in made.items()}, "code": code[at]}


def _worded(database: Database, concept: NDArray[np.int64], written: NDArray[np.int32]) -> NDArray[np.int32]:
    """Words of what a concept says, or else of what the hospital wrote."""
    distinct, place = np.unique(concept, return_inverse=True)
    names = _names(database, distinct, spoken=False)
    said = np.array([database.words.place(names.get(int(each))) for each in distinct], np.int32)
    if not len(distinct):
        return written
    return np.where(said[place] >= 0, said[place], written).astype(np.int32)


def _whole(pieces: Iterable[Piece]) -> Piece:
    """All pieces of a small table, one below the other."""
    parts = list(pieces)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else _Nothing()


class _Nothing(dict[str, Any]):
    """Columns of a table without a row."""

    def __missing__(self, name: str) -> NDArray[Any]:
        return np.zeros(0, np.int64)
