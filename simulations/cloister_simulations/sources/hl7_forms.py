"""An invented hospital's records as its interfaces send them: HL7 version 2 messages, and C-CDA documents."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from xml.etree.ElementTree import Element, ElementTree, SubElement, register_namespace

from cloister_simulations.sources.clinical_forms import HOUR, Fact, Invented, Person, Visit

_SYSTEMS = {"LOINC": "LN", "SNOMED": "SCT", "RXNORM": "RXNORM", "ICD10": "I10C"}
_CLASSES = {"IMP": "I", "EMER": "E", "AMB": "O"}
_A_FILE = 200
"""Messages in one file."""


# --- HL7 version 2 -----------------------------------------------------------------------------------------
def write_messages(invented: Invented, folder: Path) -> None:
    """Three messages a visit, each in its file's own way: framed for the wire, with line feeds, in a batch."""
    folder.mkdir(parents=True, exist_ok=True)
    messages = list(_messages(invented))
    for number, first in enumerate(range(0, len(messages), _A_FILE)):
        some = messages[first : first + _A_FILE]
        match number % 3:
            case 0:
                text = "".join("\x0b" + "\r".join(segments) + "\r\x1c\r" for segments in some)
            case 1:
                text = "".join("\n".join(segments) + "\n" for segments in some)
            case _:
                text = "BHS|^~\\&|LAB\r" + "".join("\r".join(segments) + "\r" for segments in some) + "BTS|1\r"
        (folder / f"{number:04d}.hl7").write_bytes(text.encode())


def _messages(invented: Invented) -> Iterator[list[str]]:
    people = {person.id: person for person in invented.people}
    facts: dict[int, list[Fact]] = {}
    for fact in invented.facts:
        facts.setdefault(fact.visit, []).append(fact)
    for visit in invented.visits:
        of = facts.get(visit.id, [])
        head = [_identified(people[visit.person]), _visited(visit)]
        coded = [segment for fact in of if (segment := _listed(fact))]
        # The clock of the ward is one hour before UTC, and its messages say so once.
        yield [_head(visit, "ADT^A03", "+0100"), *head, *coded]
        for fact in of:
            if fact.code.startswith("RXNORM:"):
                order = [f"ORC|NW||{fact.id}||||||{_spelt(fact.time)}", f"RXE||{_concept(fact.code)}|1"]
                yield [_head(visit, "RDE^O11^RDE_O11"), *head, *order]
        results = [f"OBX|{at}|{_result(fact)}" for at, fact in enumerate(_measured(of), start=1)]
        request = f"OBR|1||{visit.id}-lab|PANEL^All results^L|||{_spelt(visit.start)}"
        yield [_head(visit, "ORU^R01^ORU_R01"), *head, request, *results]


def _head(visit: Visit, what: str, zone: str = "") -> str:
    sent = f"{_spelt(visit.end)}{zone}"
    return f"MSH|^~\\&|WARD|HOSPITAL|CLOISTER|HOSPITAL|{sent}||{what}|{visit.id}|P|2.5.1"


def _identified(person: Person) -> str:
    fields = [""] * 31
    fields[0], fields[1], fields[3], fields[5] = "PID", "1", f"{person.id}^^^HOSPITAL^MR~9^^^STATE^SS", "INVENTED^"
    fields[7], fields[8] = person.birth.strftime("%Y%m%d"), {"male": "M", "female": "F"}[person.sex]
    if person.death:
        fields[29], fields[30] = f"{_spelt(person.death)}+0000", "Y"
    return "|".join(fields)


def _visited(visit: Visit) -> str:
    """In UTC by the fields' own zone, whatever that of the message is."""
    fields = [""] * 46
    fields[0], fields[1], fields[2], fields[19] = "PV1", "1", _CLASSES[visit.kind], str(visit.id)
    fields[44], fields[45] = f"{_spelt(visit.start)}+0000", f"{_spelt(visit.end)}+0000"
    return "|".join(fields)


def _concept(code: str) -> str:
    system, _, bare = code.partition(":")
    return f"{bare}^^{_SYSTEMS[system]}"


def _listed(fact: Fact) -> str | None:
    """A diagnosis or a procedure, by the clock of the message's zone."""
    time = _spelt(fact.time + HOUR)
    if fact.code.startswith("ICD10:"):
        return f"DG1|1||{_concept(fact.code)}||{time}|F"
    return f"PR1|1||{_concept(fact.code)}||{time}" if fact.code.startswith("SNOMED:") else None


def _measured(facts: list[Fact]) -> list[Fact]:
    return [fact for fact in facts if fact.code.startswith("LOINC:")]


def _result(fact: Fact) -> str:
    """OBX from its second field on; units as HL7 escapes them."""
    if isinstance(fact.value, str):
        kind, said, unit = "CWE", f"{fact.value}^^SCT", ""
    else:
        kind, said, unit = "NM", repr(fact.value), f"{fact.unit}^^UCUM"
    return f"{kind}|{_concept(fact.code)}|{fact.id}|{said}|{unit}|||||F|||{_spelt(fact.time)}"


# --- C-CDA -------------------------------------------------------------------------------------------------
_V3, _XSI, _SDTC = "urn:hl7-org:v3", "http://www.w3.org/2001/XMLSchema-instance", "urn:hl7-org:sdtc"
_OIDS = {
    "LOINC": "2.16.840.1.113883.6.1",
    "SNOMED": "2.16.840.1.113883.6.96",
    "RXNORM": "2.16.840.1.113883.6.88",
    "ICD10": "2.16.840.1.113883.6.90",
}
_SECTION, _ENTRY = "2.16.840.1.113883.10.20.22.2.", "2.16.840.1.113883.10.20.22.4."
_HOSPITAL = "2.16.840.1.113883.19.5"
_VITAL = ("LOINC:8480-6", "LOINC:8867-4", "LOINC:8310-5", "LOINC:29463-7")


def write_documents(invented: Invented, folder: Path) -> None:
    """A summary of each patient's care."""
    folder.mkdir(parents=True, exist_ok=True)
    register_namespace("", _V3)
    register_namespace("sdtc", _SDTC)
    register_namespace("xsi", _XSI)
    visits: dict[int, list[Visit]] = {}
    facts: dict[int, list[Fact]] = {}
    for visit in invented.visits:
        visits.setdefault(visit.person, []).append(visit)
    for fact in invented.facts:
        facts.setdefault(fact.person, []).append(fact)
    for person in invented.people:
        made = _document(person, visits.get(person.id, []), facts.get(person.id, []))
        ElementTree(made).write(folder / f"{person.id}.xml", encoding="utf-8", xml_declaration=True)


def _add(parent: Element, path: str, **attributes: str) -> Element:
    """The last element of a path that is made below a parent."""
    for tag in path.split("/"):
        parent = SubElement(parent, f"{{{_V3}}}{tag}")
    parent.attrib.update(attributes)
    return parent


def _document(person: Person, visits: list[Visit], facts: list[Fact]) -> Element:
    root = Element(f"{{{_V3}}}ClinicalDocument")
    _add(root, "effectiveTime", value=f"{_spelt(visits[-1].end)}+0000")
    role = _add(root, "recordTarget/patientRole")
    _add(role, "id", root=_HOSPITAL, extension=str(person.id))
    patient = _add(role, "patient")
    _add(patient, "administrativeGenderCode", code={"male": "M", "female": "F"}[person.sex])
    _add(patient, "birthTime", value=person.birth.strftime("%Y%m%d"))
    if person.death:
        SubElement(patient, f"{{{_SDTC}}}deceasedInd", value="true")
        SubElement(patient, f"{{{_SDTC}}}deceasedTime", value=f"{_spelt(person.death)}+0000")
    body = _add(root, "component/structuredBody")
    stays = _section(body, "22.1")
    for visit in visits:
        one = _add(stays, "entry/encounter", classCode="ENC", moodCode="EVN")
        _add(one, "id", root=_HOSPITAL, extension=str(visit.id))
        _add(one, "code", code=visit.kind, codeSystem="2.16.840.1.113883.5.4")
        _period(one, visit.start, visit.end)
    sections: dict[str, Element] = {}
    for fact in facts:
        number = _place(fact)
        if number not in sections:
            sections[number] = _section(body, number)
        _entry(sections[number], number, fact)
    return root


def _section(body: Element, number: str) -> Element:
    section = _add(body, "component/section")
    _add(section, "templateId", root=f"{_SECTION}{number}", extension="2015-08-01")
    return section


def _place(fact: Fact) -> str:
    """The number of the section that such a fact stands in."""
    match fact.code.partition(":")[0]:
        case "ICD10":
            return "5.1"
        case "RXNORM":
            return "1.1"
        case "SNOMED":
            return "7.1"
        case _:
            return "17" if isinstance(fact.value, str) else "4.1" if fact.code in _VITAL else "3.1"


def _entry(section: Element, number: str, fact: Fact) -> None:
    entry = _add(section, "entry")
    match number:
        case "1.1":
            one = _add(entry, "substanceAdministration", classCode="SBADM", moodCode="INT")
            _add(one, "id", root=_HOSPITAL, extension=f"fact-{fact.id}")
            _period(one, fact.time)
            _concept_of(_add(one, "consumable/manufacturedProduct/manufacturedMaterial"), "code", fact.code)
            return
        case "7.1":
            one = _add(entry, "procedure", classCode="PROC", moodCode="EVN")
        case "5.1":
            one = _add(entry, "act/entryRelationship/observation", classCode="OBS", moodCode="EVN")
            _add(one, "templateId", root=f"{_ENTRY}4", extension="2015-08-01")
        case "17":
            one = _add(entry, "observation", classCode="OBS", moodCode="EVN")
        case _:
            one = _add(entry, "organizer/component/observation", classCode="OBS", moodCode="EVN")
    _add(one, "id", root=_HOSPITAL, extension=f"fact-{fact.id}")
    if number == "5.1":
        _add(one, "code", code="55607006", codeSystem=_OIDS["SNOMED"])
        _period(one, fact.time)
        _typed(_concept_of(one, "value", fact.code), "CD")
        return
    _concept_of(one, "code", fact.code)
    # By a clock one hour before UTC.
    _add(one, "effectiveTime", value=f"{_spelt(fact.time + HOUR)}+0100")
    if isinstance(fact.value, str):
        _typed(_concept_of(one, "value", f"SNOMED:{fact.value}"), "CD")
    elif fact.value is not None:
        _typed(_add(one, "value", value=repr(fact.value), unit=fact.unit or "1"), "PQ")


def _period(element: Element, start: int, end: int | None = None) -> None:
    period = _add(element, "effectiveTime")
    _add(period, "low", value=f"{_spelt(start)}+0000")
    if end is not None:
        _add(period, "high", value=f"{_spelt(end)}+0000")


def _concept_of(parent: Element, tag: str, code: str) -> Element:
    system, _, bare = code.partition(":")
    return _add(parent, tag, code=bare, codeSystem=_OIDS[system])


def _typed(element: Element, kind: str) -> None:
    element.set(f"{{{_XSI}}}type", kind)


def _spelt(time: int) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y%m%d%H%M%S")
