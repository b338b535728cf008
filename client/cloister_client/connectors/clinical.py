"""Dated records of patients, as FHIR and OMOP both have them: one form in columns, which ``select`` makes rows of.

A time is in whole seconds from 1970 UTC, ``NEVER`` where there is none. A fact is anything with a code and a time: a
measurement, a diagnosis, a medicine, a procedure. One that has several codes stands there once for each, with the
same ``event``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister_client.site_file import Coded
from cloister_shared.errors import DataRefused
from cloister_shared.schema import (
    Binary,
    BooleanFeature,
    CategoryFeature,
    Classes,
    Effect,
    Labels,
    Mask,
    NumberFeature,
    Quantity,
    Schema,
    SeriesFeature,
    Survival,
    target_columns,
)

NEVER = np.iinfo(np.int64).min
EARLIEST, LATEST = -3_786_912_000, 4_796_668_800
"""1850 and 2122: a time outside is a slip of the pen."""
INPATIENT, EMERGENCY, OUTPATIENT = range(3)
OF_PATIENT = ("LOCAL:age", "LOCAL:sex", "LOCAL:stay", "LOCAL:death", "LOCAL:readmission")
"""Codes that are answered from patients and encounters, not from facts."""

Times = NDArray[np.int64]
Places = NDArray[np.int32]


@dataclass(frozen=True)
class Patients:
    """One entry a patient."""

    id: NDArray[np.object_]
    sex: NDArray[np.object_]
    """male, female, other, or None."""
    birth: Times
    death: Times
    dead: NDArray[np.bool_]
    """Also where nobody wrote down when."""


@dataclass(frozen=True)
class Encounters:
    """One entry an encounter; ``patient`` is a place in ``Patients``."""

    id: NDArray[np.object_]
    patient: Places
    start: Times
    end: Times
    kind: Places

    def __getitem__(self, kept: NDArray[Any]) -> Encounters:
        return Encounters(self.id[kept], self.patient[kept], self.start[kept], self.end[kept], self.kind[kept])

    def __len__(self) -> int:
        return len(self.id)


@dataclass(frozen=True)
class Facts:
    """One entry a fact and code; ``code``, ``unit`` and ``answer`` are places in the lists beside, -1 is none."""

    event: NDArray[np.int64]
    patient: Places
    time: Times
    code: Places
    value: NDArray[np.float64]
    """NaN where the answer is no number."""
    unit: Places
    answer: Places
    codes: list[str]
    units: list[str]
    answers: list[str]

    def __getitem__(self, kept: NDArray[Any]) -> Facts:
        return Facts(
            self.event[kept],
            self.patient[kept],
            self.time[kept],
            self.code[kept],
            self.value[kept],
            self.unit[kept],
            self.answer[kept],
            self.codes,
            self.units,
            self.answers,
        )

    def __len__(self) -> int:
        return len(self.event)


@dataclass(frozen=True)
class Records:
    """What a hospital's clinical system holds of the codes that a plan asks for."""

    patients: Patients
    encounters: Encounters
    facts: Facts
    meant: Mapping[str, NDArray[np.int32]]
    """Which of ``facts.codes`` a code of the plan or of site.yaml stands for."""
    left_out: dict[str, int] = field(default_factory=dict[str, int])
    """What could not be used, in words, and how often."""

    def stand_for(self, code: str) -> NDArray[np.int32]:
        """Which of ``facts.codes`` this one stands for; of what was not asked for, by its spelling alone."""
        found = self.meant.get(code)
        return meanings([code], self.facts.codes)[code] if found is None else found


def sound(
    patients: Patients, encounters: Encounters, facts: Facts, meant: Mapping[str, Any], left_out: dict[str, int]
) -> Records:
    """Records without what cannot be used, which is counted; patients of neither or an unknown place are -1."""
    kept = _kept(encounters.patient, encounters.start, "encounters", left_out)
    with np.errstate(over="ignore"):
        backwards = kept & (encounters.end != NEVER) & (encounters.end < encounters.start)
    _count(left_out, "encounters that end before they begin", backwards)
    kept &= ~backwards
    encounters = encounters[np.flatnonzero(kept)]
    facts = facts[_kept(facts.patient, facts.time, "facts", left_out)]
    return Records(patients, encounters, facts, meant, {said: count for said, count in left_out.items() if count})


def _kept(patient: Places, time: Times, what: str, left_out: dict[str, int]) -> NDArray[np.bool_]:
    unknown, undated = patient < 0, time == NEVER
    impossible = ~undated & ((time < EARLIEST) | (time >= LATEST))
    _count(left_out, f"{what} of no known patient", unknown)
    _count(left_out, f"{what} without a time", undated & ~unknown)
    _count(left_out, f"{what} in an impossible year", impossible & ~unknown)
    return ~(unknown | undated | impossible)


def _count(left_out: dict[str, int], said: str, where: NDArray[np.bool_]) -> None:
    left_out[said] = left_out.get(said, 0) + int(where.sum())


# --- codes -------------------------------------------------------------------------------------------------
def asked(schema: Schema, own: Coded, site: str) -> dict[str, tuple[str, ...]]:
    """The codes by which each feature, channel and outcome is found here, under its name.

    Raises:
        DataRefused: one has no code, or site.yaml speaks of what the plan does not have.
    """
    wanted: dict[str, str | None] = {}
    for feature in schema.features:
        if isinstance(feature, SeriesFeature):
            wanted |= {f"{feature.name}.{channel.name}": channel.code for channel in feature.channels}
        elif isinstance(feature, NumberFeature | CategoryFeature | BooleanFeature):
            wanted[feature.name] = feature.code
        else:
            raise DataRefused(
                f"{feature.name} is of kind {feature.kind}, which clinical records do not hold.",
                mend="Give the hospital's table, in which each record names it.",
            )
    match schema.target:
        case Binary(name=name, code=code) | Classes(name=name, code=code) | Quantity(name=name, code=code):
            wanted[name] = code
        case Survival(name=name, code=code):
            wanted[name] = code
        case Labels() | Mask() | Effect():
            raise DataRefused(
                f"An outcome of kind {schema.target.kind} is not made from clinical records.",
                mend="Give the hospital's table, with the outcome in a column.",
            )
        case _:
            wanted |= dict.fromkeys(target_columns(schema.target), None)
    for name in (*own.codes, *own.units):
        if name not in wanted:
            raise DataRefused(
                f"site.yaml of {site} speaks of {name}, which the plan does not.",
                mend="Use the plan's names on the left side of codes and units; a channel's is SERIES.CHANNEL.",
            )
    found = {name: own.codes.get(name) or ((code,) if code else ()) for name, code in wanted.items()}
    if without := [name for name, codes in found.items() if not codes]:
        raise DataRefused(
            f"The plan gives no code for {', '.join(without[:5])}, and clinical records are found by it.",
            mend=f'Have the plan give a code, or write codes: {{{without[0]}: ["LOINC:..."]}} in site.yaml.',
        )
    return found


def all_codes(schema: Schema, found: Mapping[str, tuple[str, ...]]) -> frozenset[str]:
    """Every code that facts are looked for by."""
    return frozenset({code for codes in found.values() for code in codes} | set(schema.anchor.having)) - set(OF_PATIENT)


def stands_for(wanted: str, code: str) -> bool:
    """Whether what is coded ``code`` is meant by ``wanted``: the same, or of the ICD one further down."""
    if code == wanted:
        return True
    system, _, within = wanted.partition(":")
    bare = code.replace(".", "")
    return system in ("ICD9", "ICD10") and len(within) >= 3 and bare.startswith(wanted.replace(".", ""))


def meanings(wanted: Iterable[str], codes: list[str]) -> dict[str, NDArray[np.int32]]:
    """For each code asked for, the places in ``codes`` of those that it stands for."""
    return {
        each: np.array([at for at, code in enumerate(codes) if stands_for(each, code)], np.int32) for each in wanted
    }


# --- times as people write them ----------------------------------------------------------------------------
def seconds(texts: list[Any] | NDArray[Any]) -> Times:
    """Times of ISO 8601, also of a day, a month or a year alone, which is its first moment; NEVER for all else."""
    import pandas as pd

    parsed = pd.to_datetime(pd.Series(texts, dtype=object), format="ISO8601", utc=True, errors="coerce")
    whole = parsed.to_numpy(dtype="datetime64[s]").astype(np.int64)
    return np.where(parsed.isna().to_numpy(), NEVER, whole)


_SHORT = {4: "-07-01", 7: "-15"}


def births(texts: list[Any]) -> Times:
    """Days of birth; of a year or a month alone, its middle."""
    return seconds([text + _SHORT.get(len(text), "") if isinstance(text, str) else None for text in texts])


def ages(birth: Times, at: Times) -> NDArray[np.float64]:
    """Whole years, as people count them: one more on each birthday."""
    import pandas as pd

    born, then = (pd.DatetimeIndex(times.astype("datetime64[s]")) for times in (birth, at))
    before = (then.month * 100 + then.day < born.month * 100 + born.day).astype(float)
    years = np.asarray(then.year, float) - np.asarray(born.year, float) - np.asarray(before, float)
    return np.where((birth == NEVER) | (years < 0), np.nan, years)


NO = re.compile(r"false|no|n|f|SNOMED:373067005|LOINC:LA32-8|373067005|LA32-8", re.IGNORECASE)
"""Answers that say that it is not so."""
