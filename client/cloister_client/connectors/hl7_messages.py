"""HL7 version 2 messages to facts: results (ORU), visits with diagnoses and procedures (ADT), prescriptions (RDE, OMP).

python-hl7 takes a message apart; of each segment a few fields are read, by the numbers that the standard gives them.
Its own way to resolve escapes is not used: that one writes what it cannot resolve into a log.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cloister_client.connectors.clinical import EMERGENCY, INPATIENT, OUTPATIENT
from cloister_client.connectors.newest import NOTHING, Answer, Newest, day, moment, number, rank

SYSTEMS = {
    "LN": "LOINC", "LOINC": "LOINC", "SCT": "SNOMED", "SNOMED": "SNOMED", "RXNORM": "RXNORM", "WC": "ATC",
    "I10": "ICD10", "I10C": "ICD10", "ICD10": "ICD10", "ICD-10": "ICD10", "ICD10CM": "ICD10",
    "I9": "ICD9", "I9C": "ICD9", "ICD9": "ICD9", "ICD-9": "ICD9", "ICD9CM": "ICD9",
}  # fmt: skip
"""HL7's table 0396, and what is written in its place; a system that is not here is the hospital's own."""
_CLASSES = {"I": INPATIENT, "B": INPATIENT, "E": EMERGENCY, "O": OUTPATIENT, "R": OUTPATIENT, "C": OUTPATIENT}
_SEXES = {"M": "male", "F": "female", "O": "other", "A": "other"}
_VISITS = ("A01", "A02", "A03", "A04", "A06", "A07", "A08")
_NO_RESULT = ("D", "I", "N", "O", "W", "X")
"""OBX-11: deleted, only asked for, wrong patient, cannot be had."""
_CANCELLED = ("CA", "OC", "CR")
_ESCAPES = {"F": 1, "R": 2, "S": 3, "T": 4}


@dataclass
class _Order:
    """What an OBR or ORC says of what follows it."""

    name: str = ""
    time: str | None = None
    so: bool = True


@dataclass(frozen=True)
class _Message:
    """A message taken apart, its place among others, and what holds for all of it."""

    segments: Any
    rank: str
    zone: str

    def texts(self, segment: Any, field: int, component: int) -> Iterator[str]:
        """One component of each repetition of a field."""
        for said in segment[field] if field < len(segment) else ():
            text: Any = said if isinstance(said, str) else said[component - 1] if component <= len(said) else ""
            if isinstance(said, str) and component > 1:
                text = ""
            while not isinstance(text, str):
                text = text[0] if text else ""
            yield self._plain(text.strip())

    def text(self, segment: Any, field: int, component: int = 1) -> str | None:
        """One component of a field's first repetition; None where it is empty, or "" as HL7 takes a value away."""
        said = next(self.texts(segment, field, component), "")
        return None if said in ("", '""') else said

    def time(self, segment: Any, *fields: int) -> str | None:
        """The first of these fields that holds a time."""
        return next(filter(None, (self.text(segment, field) for field in fields)), None)

    def moment(self, time: str | None) -> str | None:
        """As ISO 8601 has it, in the zone that the message names for times without one."""
        return moment(time, self.zone)

    def _plain(self, text: str) -> str:
        escape, separators = self.segments.esc, self.segments.separators
        if escape not in text:
            return text

        def meant(found: re.Match[str]) -> str:
            sequence = found[1]
            if sequence == "E":
                return escape
            return separators[_ESCAPES[sequence]] if sequence in _ESCAPES else " "

        return re.sub(f"{re.escape(escape)}([^{re.escape(escape)}]*){re.escape(escape)}", meant, text)

    def codes(self, segment: Any, field: int, system: str | None = None) -> list[str]:
        """A coded field's code and its alternate, each with its system."""
        found: list[str] = []
        for at in (1, 4):
            if code := self.text(segment, field, at):
                named = (self.text(segment, field, at + 2) or (system if at == 1 else None) or "").upper()
                found.append(f"{SYSTEMS.get(named, 'LOCAL')}:{code}")
        return found


def take(text: str, told: Newest, authority: str | None) -> None:
    """One message, its segments with carriage returns between them.

    Raises:
        ValueError: it is none.
    """
    import hl7

    try:
        found: Any = hl7.parse("\r".join(line for line in text.split("\r") if not _unwanted(line, text[3:8], told)))
    except (hl7.HL7Exception, LookupError, AssertionError) as fault:
        raise ValueError(type(fault).__name__) from None
    plain = _Message(found, "", "")
    head = found[0]
    sent, what, event = plain.text(head, 7), plain.text(head, 9), plain.text(head, 9, 2)
    if not what:
        raise ValueError
    if not (what in ("ORU", "RDE", "OMP") or (what == "ADT" and event in _VISITS)):
        told.left_out["messages of another kind than results, visits and prescriptions"] += 1
        return
    whole = moment(sent) or ""
    zone = whole[19:] if len(whole) > 19 else ""
    _Reader(_Message(found, rank(sent), zone), told, authority, results=what == "ORU").read()


def _unwanted(line: str, separators: str, told: Newest) -> bool:
    """Whether a segment is a result that nobody asks for, which need not be taken apart: most of a laboratory's are."""
    if not line.startswith("OBX"):
        return False
    fields = line.split(separators[0], 4)
    return len(fields) > 3 and (separators, fields[3]) in told.unwanted


class _Reader:
    """One message, segment by segment."""

    def __init__(self, message: _Message, told: Newest, authority: str | None, *, results: bool) -> None:
        self._message, self._told, self._authority, self._results = message, told, authority, results
        self._person, self._stay, self._name, self._order = -1, -1, "", _Order()

    def read(self) -> None:
        readers = {
            "PID": self._patient, "PV1": self._visit, "ORC": self._common, "OBR": self._request, "OBX": self._result,
            "DG1": self._diagnosis, "PR1": self._procedure, "RXE": self._medicine, "RXO": self._medicine,
        }  # fmt: skip
        for segment in self._message.segments:
            if reader := readers.get(str(segment[0])):
                reader(segment)

    def _patient(self, segment: Any) -> None:
        said, told = self._message, self._told
        self._name, self._stay, self._order = self._identifier(segment) or "", -1, _Order()
        death = said.moment(said.text(segment, 29))
        sex, birth = _SEXES.get(said.text(segment, 8) or ""), day(said.text(segment, 7))
        self._person = told.person(said.rank, self._name, sex, birth, death, said.text(segment, 30) == "Y")

    def _identifier(self, segment: Any) -> str | None:
        """The patient's number: of the named authority, else the medical record's, else the first; of old, PID-2."""
        said = self._message
        names, kinds = (list(said.texts(segment, 3, at)) for at in (1, 5))
        given = [_authorities(one) for one in segment[3]] if len(segment) > 3 else []
        listed = [entry for entry in zip(names, kinds, given, strict=True) if entry[0]]
        if self._authority is not None:
            return next((name for name, _, by in listed if self._authority in by), None)
        if not listed:
            return said.text(segment, 2)
        name, _, by = next((entry for entry in listed if entry[1] == "MR"), listed[0])
        self._told.authorities.setdefault("PID-3", set()).update(by[:1])
        return name

    def _visit(self, segment: Any) -> None:
        """By its number, or where it has none by when its patient came."""
        said = self._message
        start, end = (said.moment(said.text(segment, field)) for field in (44, 45))
        name = said.text(segment, 19) or (f"{self._name} {start}" if start else None)
        kind = _CLASSES.get(said.text(segment, 2) or "")
        self._stay = self._told.stay(said.rank, self._person, name, kind, start, end)

    def _common(self, segment: Any) -> None:
        said = self._message
        cancelled = said.text(segment, 1) in _CANCELLED
        name = said.text(segment, 3) or said.text(segment, 2) or ""
        self._order = _Order(name, said.time(segment, 15, 9), not cancelled)

    def _request(self, segment: Any) -> None:
        said = self._message
        name = said.text(segment, 3) or said.text(segment, 2) or self._order.name
        self._order = _Order(name, said.time(segment, 7), self._order.so)
        codes = said.codes(segment, 4)
        if self._results and codes:
            so = said.text(segment, 25) not in ("I", "O", "S", "X")
            self._fact(("OBR", name, codes[0]), self._order.time, codes, so=so)

    def _result(self, segment: Any) -> None:
        said = self._message
        codes = said.codes(segment, 3)
        if not any(map(self._told.wants, codes)):
            separators = said.segments.separators
            spelt = f"{separators[1]}{separators[3]}{separators[2]}{said.segments.esc}{separators[4]}"
            self._told.unwanted.add((spelt, str(segment[3]) if len(segment) > 3 else ""))
            return
        time = said.time(segment, 14) or self._order.time
        key = ("OBX", self._order.name, codes[0], said.text(segment, 4), time)
        so = self._order.so and said.text(segment, 11) not in _NO_RESULT
        self._fact(key, time, codes, self._answer(segment) if so else NOTHING, so=so)

    def _answer(self, segment: Any) -> Answer:
        said = self._message
        kind, first = said.text(segment, 2), said.text(segment, 5)
        unit = said.text(segment, 6) or said.text(segment, 6, 2)
        match kind:
            case "SN":
                alone = not (said.text(segment, 5, 3) or said.text(segment, 5, 4))
                return number(said.text(segment, 5, 2)) if alone else math.nan, unit, None
            case "CE" | "CWE" | "CNE" | "CF":
                return math.nan, None, first or said.text(segment, 5, 2)
            case "NM" | "ST" | "TX" | "FT" | "IS" | "ID" | None:
                value = number(first)
                words = None if kind == "NM" else first
                return value, unit if math.isfinite(value) else None, words
            case _:
                return NOTHING

    def _diagnosis(self, segment: Any) -> None:
        self._listed(segment, "DG1", 21)

    def _procedure(self, segment: Any) -> None:
        self._listed(segment, "PR1", 20)

    def _listed(self, segment: Any, what: str, action: int) -> None:
        """A diagnosis or a procedure: of older versions the second field names the system."""
        said = self._message
        if codes := said.codes(segment, 3, said.text(segment, 2)):
            time = said.text(segment, 5)
            self._fact((what, codes[0], time), time, codes, so=said.text(segment, action) != "D")

    def _medicine(self, segment: Any) -> None:
        field = 2 if str(segment[0]) == "RXE" else 1
        if codes := self._message.codes(segment, field):
            key = ("RX", self._order.name, codes[0], self._order.time)
            self._fact(key, self._order.time, codes, so=self._order.so)

    def _fact(
        self, key: tuple[Any, ...], time: str | None, codes: list[str], answer: Answer = NOTHING, *, so: bool = True
    ) -> None:
        when = (self._message.moment(time), time is not None)
        self._told.fact(self._message.rank, key, self._person, self._stay, when, codes, answer, so=so)


def _authorities(identifier: Any) -> list[str]:
    """Who gave out a patient's number: the names and the universal id of its fourth component."""
    by = identifier[3] if not isinstance(identifier, str) and len(identifier) > 3 else ""
    return [part for part in ([by] if isinstance(by, str) else by) if part]
