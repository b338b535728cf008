"""C-CDA documents (HL7's Consolidated CDA, release 2.1 and before) to facts, by the coded entries of a few sections.

The parser is expat, which Python brings, and nothing that XML has beside elements is let in: a document type, with
which entities would come, is refused before it is read, and so is a depth that no document has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from cloister_client.connectors.clinical import EMERGENCY, INPATIENT, OUTPATIENT
from cloister_client.connectors.newest import NOTHING, Answer, Newest, day, moment, number, rank
from cloister_shared.errors import DataRefused

_V3, _SDTC = "urn:hl7-org:v3}", "urn:hl7-org:sdtc}"
_TYPE = "http://www.w3.org/2001/XMLSchema-instance}type"
_DEEP, _LARGE = 100, 64_000_000
"""Elements within elements, and bytes of one document."""
_SECTION = "2.16.840.1.113883.10.20.22.2."
_SECTIONS = {
    "3": "results", "4": "vital signs", "5": "problems", "22": "encounters", "1": "medications", "7": "procedures",
    "17": "social history",
}  # fmt: skip
_PROBLEM = "2.16.840.1.113883.10.20.22.4.4"
_SYSTEMS = {
    "2.16.840.1.113883.6.1": "LOINC",
    "2.16.840.1.113883.6.96": "SNOMED",
    "2.16.840.1.113883.6.88": "RXNORM",
    "2.16.840.1.113883.6.90": "ICD10",
    "2.16.840.1.113883.6.3": "ICD10",
    "2.16.840.1.113883.6.103": "ICD9",
    "2.16.840.1.113883.6.73": "ATC",
}
_CLASSES = {"IMP": INPATIENT, "ACUTE": INPATIENT, "NONAC": INPATIENT, "EMER": EMERGENCY, "AMB": OUTPATIENT}
_SEXES = {"M": "male", "F": "female", "UN": "other"}
_NOT_SO = ("aborted", "cancelled", "nullified", "held", "new")
_STATEMENTS = ("observation", "procedure", "substanceAdministration", "encounter")


def parsed(content: bytes, where: str) -> Element:
    """The document's root; names without the namespace of HL7.

    Raises:
        DataRefused: it is no XML, no clinical document, too large or too deep, or brings a document type.
    """
    if len(content) > _LARGE:
        raise DataRefused(f"{where} has more than {_LARGE // 1_000_000} MB.", mend="Export one document a file.")
    builder, parser, depth = TreeBuilder(), expat.ParserCreate(namespace_separator="}"), 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > _DEEP:
            raise DataRefused(
                f"{where} has more than {_DEEP} elements within each other.", mend="Take it away: no C-CDA is so deep."
            )
        builder.start(name.removeprefix(_V3), attributes)

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(name.removeprefix(_V3))

    def refuse(*_: object) -> None:
        raise DataRefused(
            f"{where} brings a document type of its own, which could name other files.",
            mend="Take <!DOCTYPE ...> out of the export; C-CDA has none.",
        )

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = builder.data, refuse
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, LookupError, ValueError):  # also of an encoding that nobody knows
        raise DataRefused(f"{where} is no XML.", mend="Export it again: it may have been cut off.") from None
    root = builder.close()
    if root.tag != "ClinicalDocument":
        raise DataRefused(f"{where} is no clinical document of HL7.", mend="Export it as C-CDA, or take it away.")
    return root


def take(root: Element, told: Newest, authority: str | None) -> bool:
    """One document, whose patient it needs: False where it names none."""
    at = rank(_attribute(root.find("effectiveTime"), "value"))
    role = root.find("recordTarget/patientRole")
    name = None if role is None else _identifier(role, told, authority)
    if role is None or name is None:
        return False
    patient = role.find("patient")
    patient = Element("patient") if patient is None else patient
    death = moment(_attribute(patient.find(f"{_SDTC}deceasedTime"), "value"))
    person = told.person(
        at,
        name,
        _SEXES.get(_attribute(patient.find("administrativeGenderCode"), "code") or ""),
        day(_attribute(patient.find("birthTime"), "value")),
        death,
        _attribute(patient.find(f"{_SDTC}deceasedInd"), "value") == "true",
    )
    reader = _Reader(told, at, person)
    reader.stay = reader.encounter(root.find("componentOf/encompassingEncounter"))
    for section in root.iter("section"):
        listed = {template.get("root", "") for template in section.findall("templateId")}
        of = [oid.removeprefix(_SECTION).partition(".")[0] for oid in listed if oid.startswith(_SECTION)]
        if kind := next((_SECTIONS[number] for number in of if number in _SECTIONS), None):
            for entry in section.findall("entry"):
                reader.walk(entry, kind, None)
    return True


def _identifier(role: Element, told: Newest, authority: str | None) -> str | None:
    """The patient's number: of the named authority, else the first."""
    listed = [each for each in role.findall("id") if each.get("extension")]
    if authority is not None:
        listed = [each for each in listed if authority in (each.get("root"), each.get("assigningAuthorityName"))]
    elif listed:
        told.authorities.setdefault("patientRole/id", set()).add(listed[0].get("root", ""))
    return listed[0].get("extension", "").strip() or None if listed else None


class _Reader:
    """The entries of one document."""

    def __init__(self, told: Newest, at: str, person: int) -> None:
        self._told, self._rank, self._person, self.stay = told, at, person, -1

    def walk(self, element: Element, section: str, time: str | None) -> None:
        """An entry and what it holds; ``time`` is that of what it stands in."""
        if element.tag in ("reference", "text", "participant", "author", "informant"):
            return
        time = _time(element) or time
        if element.tag in _STATEMENTS:
            self._statement(element, section, time)
        for part in element:
            self.walk(part, section, time)

    def _statement(self, element: Element, section: str, time: str | None) -> None:
        moods = ("EVN", "INT", None) if element.tag == "substanceAdministration" else ("EVN", None)
        if element.get("moodCode") not in moods:
            return
        if element.tag == "encounter":
            if section == "encounters":
                self.encounter(element)
            return
        concepts, answer = [element.find("code")], NOTHING
        if element.tag == "substanceAdministration":
            concepts = [element.find("consumable/manufacturedProduct/manufacturedMaterial/code")]
        elif element.tag == "observation" and section in ("problems", "encounters"):
            if _PROBLEM not in [template.get("root") for template in element.findall("templateId")]:
                return
            concepts = list(element.findall("value"))
        elif element.tag == "observation":
            answer = _answer(element.find("value"))
        codes = [code for concept in concepts if concept is not None for code in _codes(concept)]
        so = element.get("negationInd") != "true" and _attribute(element.find("statusCode"), "code") not in _NOT_SO
        names = tuple((each.get("root"), each.get("extension")) for each in element.findall("id") if each.get("root"))
        if codes:
            key = (element.tag, names or answer, codes[0], time)
            when = (moment(time), time is not None)
            self._told.fact(self._rank, key, self._person, self.stay, when, codes, answer, so=so)

    def encounter(self, element: Element | None) -> int:
        """The number of an encounter of the patient; -1 of none."""
        named = None if element is None else element.find("id")
        if element is None or named is None:
            return -1
        code = element.find("code")
        said = [] if code is None else [code.get("code"), *(other.get("code") for other in code.findall("translation"))]
        kind = next((_CLASSES[each] for each in said if each in _CLASSES), None)
        end = moment(_attribute(element.find("effectiveTime/high"), "value"))
        name = named.get("extension") or named.get("root")
        return self._told.stay(self._rank, self._person, name, kind, moment(_time(element)), end)


def _attribute(element: Element | None, name: str) -> str | None:
    return None if element is None else (element.get(name) or "").strip() or None


def _time(element: Element) -> str | None:
    """When something was, or began."""
    for time in element.findall("effectiveTime"):
        if said := _attribute(time, "value") or _attribute(time.find("low"), "value"):
            return said
    return None


def _codes(concept: Element) -> Iterator[str]:
    for each in (concept, *concept.findall("translation")):
        if code := _attribute(each, "code"):
            yield f"{_SYSTEMS.get(each.get('codeSystem', ''), 'LOCAL')}:{code}"


def _answer(value: Element | None) -> Answer:
    if value is None or value.get("nullFlavor"):
        return NOTHING
    match value.get(_TYPE, "").rpartition(":")[2]:
        case "PQ" | "INT" | "REAL":
            said = number(_attribute(value, "value"))
            unit = _attribute(value, "unit")
            return said, unit if math.isfinite(said) else None, None
        case "CD" | "CE" | "CO" | "CV":
            return math.nan, None, _attribute(value, "code") or _attribute(value, "displayName")
        case "BL":
            return math.nan, None, _attribute(value, "value")
        case "ST" | "ED":
            return math.nan, None, (value.text or "").strip() or None
        case _:
            return NOTHING
