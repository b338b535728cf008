"""HL7 messages and C-CDA documents that are broken in one way each, beside the cases of ``malformed_records``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from malformed_records import SECRET, Case, Files, judged

_RESULTS, _SUMMARY = "results.hl7", "p3.xml"
_PATIENTS = 8


# --- sound records -----------------------------------------------------------------------------------------
def sound(form: str) -> Files:
    """Files that nothing is wrong with: one of messages, or a document for each patient."""
    if form == "hl7":
        return {_RESULTS: "".join(_message(n) for n in range(_PATIENTS))}
    return {f"p{n}.xml": _document(n) for n in range(_PATIENTS)}


def _message(n: int) -> str:
    died = "20200120000000|Y" if n % 2 else "|"
    segments = [
        f"MSH|^~\\&|LAB|HOSPITAL|||20200114090000||ORU^R01^ORU_R01|{n}|P|2.5.1|||||||",
        f"PID|1||p{n}^^^HOSPITAL^MR||NAME{n}^GIVEN||19{50 + n}0304|M|{'|' * 20}{died}",
        f"PV1|1|I|{'|' * 16}e{n}{'|' * 25}20200110080000|20200114080000",
        f"OBR|1||o{n}|24323-8^Panel^LN|||20200110090000",
        f"OBX|1|NM|2160-0^Creatinine^LN||1.{n}|mg/dL^^UCUM|||||F|||20200110090{n}00",
        f"OBX|2|ST|2345-7^Glucose^LN||9{n}|mg/dL||||||||20200110090000",
        "NTE|1||As the laboratory says",
    ]
    return "\r".join([*segments, *(["DG1|1||E11.9^Diabetes^I10C||201911|F"] if n == 1 else [])]) + "\r"


def _document(n: int) -> str:
    died = '<sdtc:deceasedInd value="true"/><sdtc:deceasedTime value="20200120"/>' if n % 2 else ""
    problem = (
        '<component><section><templateId root="2.16.840.1.113883.10.20.22.2.5.1"/><entry><act><entryRelationship>'
        '<observation moodCode="EVN"><templateId root="2.16.840.1.113883.10.20.22.4.4"/><code code="55607006"/>'
        '<effectiveTime><low value="201911"/></effectiveTime>'
        '<value xsi:type="CD" code="E11.9" codeSystem="2.16.840.1.113883.6.90"/></observation></entryRelationship>'
        "</act></entry></section></component>"
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<ClinicalDocument xmlns="urn:hl7-org:v3" xmlns:sdtc="urn:hl7-org:sdtc"'
        ' xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><effectiveTime value="20200114"/>'
        f'<recordTarget><patientRole><id root="1.2.3" extension="p{n}"/><patient>'
        f'<administrativeGenderCode code="M"/><birthTime value="19{50 + n}0304"/>{died}'
        f'</patient></patientRole></recordTarget><componentOf><encompassingEncounter><id root="1.2" extension="e{n}"/>'
        '<code code="IMP"/><effectiveTime><low value="20200110080000"/><high value="20200114080000"/></effectiveTime>'
        "</encompassingEncounter></componentOf><component><structuredBody><component><section>"
        '<templateId root="2.16.840.1.113883.10.20.22.2.3.1"/><text>As people read it</text><entry><organizer>'
        f'<component><observation moodCode="EVN"><id root="1.2.4" extension="o{n}"/>'
        '<code code="2160-0" codeSystem="2.16.840.1.113883.6.1"/><statusCode code="completed"/>'
        f'<effectiveTime value="20200110090000"/><value xsi:type="PQ" value="1.{n}" unit="mg/dL"/></observation>'
        f"</component></organizer></entry></section></component>{problem if n == 1 else ''}"
        "</structuredBody></component></ClinicalDocument>"
    )


# --- how to break them -------------------------------------------------------------------------------------
def swap(file: str, old: str, new: str, count: int = 1) -> Callable[[Files], Any]:
    """Other words in the place of some, which have to be there."""

    def change(files: Files) -> None:
        assert old in files[file], old
        files[file] = files[file].replace(old, new, count)

    return change


def instead(file: str, content: str | bytes) -> Callable[[Files], Any]:
    return lambda files: files.update({file: content})


def encoded(file: str, encoding: str, old: str, new: str) -> Callable[[Files], Any]:
    def change(files: Files) -> None:
        swap(file, old, new, -1)(files)
        files[file] = files[file].encode(encoding)

    return change


def _separated(files: Files) -> None:
    for ours, theirs in (("|", "$"), ("^", "%"), ("&", "@")):
        files[_RESULTS] = files[_RESULTS].replace(ours, theirs)


def _framed(files: Files) -> None:
    whole = files.pop(_RESULTS).split("MSH|")[1:]
    files["wire.HL7"] = "".join(f"\x0bMSH|{message}\x1c\r" for message in whole)


def _batched(files: Files) -> None:
    files[_RESULTS] = f"FHS|^~\\&|LAB\rBHS|^~\\&|LAB\r{files[_RESULTS]}BTS|8\rFTS|1\r"


def _corrected(files: Files) -> None:
    files["a.hl7"] = _message(0).replace("|1.0|", "|1500.0|").replace("20200114090000", "20200113090000")


def _taken_back(files: Files) -> None:
    files[_RESULTS] = files[_RESULTS].replace("|1.0|", "|1500.0|")
    files["a.hl7"] = _message(0).replace("||||F|", "||||D|").replace("20200114090000", "20200115")


OBX = "|1.0|mg/dL^^UCUM|||||F|||20200110090000"
_ENTITIES = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
_LAUGHS = f'<?xml version="1.0"?><!DOCTYPE d [<!ENTITY e0 "ha">{_ENTITIES}]><d>&e11;</d>'
_PASSWD = '<?xml version="1.0"?><!DOCTYPE d [<!ENTITY x SYSTEM "file:///etc/passwd">]><d>&x;</d>'
_FETCHED = (
    '<?xml version="1.0"?><!DOCTYPE d SYSTEM "http://127.0.0.1:9/d.dtd"><ClinicalDocument xmlns="urn:hl7-org:v3"/>'
)
_PARAMETER = '<?xml version="1.0"?><!DOCTYPE d [<!ENTITY % x SYSTEM "file:///etc/passwd"> %x;]><d/>'
_ROOT = '<ClinicalDocument xmlns="urn:hl7-org:v3">'
_PQ = 'value="1.3" unit="mg/dL"'
CASES = (
    # messages: files
    Case("text that is no message", "hl7", instead("x.hl7", f"Dear {SECRET},\nyour results\n"), "no segment"),
    Case("segments before the first MSH", "hl7", instead("x.hl7", f"PID|1||{SECRET}\r"), "before the first MSH"),
    Case("empty file", "hl7", instead("x.hl7", b"")),
    Case("no file of HL7 at all", "hl7", lambda files: files.update({"x.txt": files.pop(_RESULTS)}), "no file of HL7"),
    Case("bytes that are not UTF-8", "hl7", encoded(_RESULTS, "latin-1", "NAME0", "É"), "neither UTF-8"),
    Case("Latin letters, as MSH-18 says", "hl7", lambda files: [swap(_RESULTS, "|2.5.1|||||||", "|2.5.1||||||8859/1|")(
         files), encoded(_RESULTS, "latin-1", "NAME0", "É")(files)]),
    Case("framing of the wire", "hl7", _framed),
    Case("line feeds", "hl7", swap(_RESULTS, "\r", "\n", -1)),
    Case("carriage returns and line feeds", "hl7", swap(_RESULTS, "\r", "\r\n", -1)),
    Case("a batch in a file", "hl7", _batched),
    Case("message cut off in its head", "hl7", instead("x.hl7", "MSH|"), "is no message"),
    Case("head and nothing else", "hl7", instead("x.hl7", "MSH"), "is no message"),
    Case("head without a kind", "hl7", swap(_RESULTS, "ORU^R01^ORU_R01", ""), "is no message"),
    Case("one separator for everything", "hl7", swap(_RESULTS, "MSH|^~\\&|", "MSH||||||"), "is no message"),
    Case("other separators", "hl7", _separated),
    Case("line break in a text", "hl7", swap(_RESULTS, "As the", f"As\r{SECRET} the"), "no segment"),
    Case("message cut off in a result", "hl7", lambda files: files.update({_RESULTS: files[_RESULTS][:-90]})),
    Case("acknowledgement", "hl7", swap(_RESULTS, "ORU^R01^ORU_R01", "ACK"), used="messages of another kind"),
    Case("visit that is cancelled", "hl7", swap(_RESULTS, "ORU^R01^ORU_R01", "ADT^A11"), used="another kind"),
    Case("segment that no standard has", "hl7", swap(_RESULTS, "NTE|", "ZZZ|")),
    # messages: fields
    Case("patient without a number", "hl7", swap(_RESULTS, "|p0^^^HOSPITAL^MR|", "||"),
         used="facts of no known patient: 1"),
    Case("no message that names a patient", "hl7", swap(_RESULTS, "PID|", "ZID|", -1), "names no patient"),
    Case("numbers of two authorities", "hl7", swap(_RESULTS, "p0^^^HOSPITAL", "p0^^^CLINIC"), "from 2 authorities"),
    Case("numbers of two authorities, one named", "hl7", swap(_RESULTS, "p0^^^HOSPITAL^MR",
         "x9^^^CLINIC^MR~p0^^^HOSPITAL"), site="authority: HOSPITAL"),
    Case("authority that nobody is of", "hl7", lambda files: None, "of the authority", site="authority: ELSEWHERE"),
    Case("birth date that is a name", "hl7", swap(_RESULTS, "19500304", SECRET), "age: missing value"),
    Case("number that is a name", "hl7", swap(_RESULTS, "|1.0|", f"|{SECRET}|"), used="with no number: 1"),
    Case("number with too many digits", "hl7", swap(_RESULTS, "|1.0|", f"|{'9' * 400}|"), used="with no number: 1"),
    Case("result without a unit", "hl7", swap(_RESULTS, "mg/dL^^UCUM", ""), "come without a unit"),
    Case("result in a unit of another kind", "hl7", swap(_RESULTS, "mg/dL^^UCUM", "umol/L"), "umol/L"),
    Case("unit that is a name", "hl7", swap(_RESULTS, "mg/dL^^UCUM", SECRET), "a unit that is not known"),
    Case("result of a wrong patient", "hl7", swap(_RESULTS, OBX, OBX.replace("|F|", "|W|")), used="nothing was: 1"),
    Case("result that a later message corrects", "hl7", _corrected),
    Case("result that a later message takes back", "hl7", _taken_back, used="nothing was: 1"),
    Case("result in an impossible year", "hl7", swap(_RESULTS, OBX, OBX.replace("|2020", "|0203")),
         used="facts in an impossible year: 1"),
    Case("time that is a name", "hl7", swap(_RESULTS, OBX, f"|1.0|mg/dL|||||F|||{SECRET}"),
         used="facts without a time: 1"),
    Case("result without a time", "hl7", lambda files: [swap(_RESULTS, OBX, "|1.0|mg/dL|||||F")(files),
         swap(_RESULTS, "LN|||20200110090000", "LN")(files)]),
    Case("visit without a number", "hl7", swap(_RESULTS, "|e0|", "||")),
    Case("visit that ends before it begins", "hl7", swap(_RESULTS, "20200114080000", "20190114"),
         used="encounters that end before they begin: 1"),
    Case("escape without an end", "hl7", swap(_RESULTS, "|1.0|", f"|\\{SECRET}|"), used="with no number: 1"),
    Case("escape that asks for a thousand million spaces", "hl7", swap(_RESULTS, "|1.0|", "|\\.sp1000000000\\|"),
         used="with no number: 1"),
    Case("picture in a result", "hl7", swap(_RESULTS, "|NM|2160-0^Creatinine^LN||1.0|",
         f"|ED|2160-0^Creatinine^LN||^IM^PNG^Base64^{SECRET}|"), used="with no number: 1"),
    Case("field of twenty thousand components", "hl7", swap(_RESULTS, "|1.0|", f"|1.0{'^' * 20_000}|")),
    Case("death that nobody dated", "hl7", swap(_RESULTS, "|20200120000000|Y", "||Y"), "died: missing target"),
    # documents
    Case("document cut off", "ccda", lambda files: files.update({_SUMMARY: files[_SUMMARY][:900]}), "is no XML"),
    Case("text that is no document", "ccda", instead("x.xml", f"Dear {SECRET}"), "is no XML"),
    Case("another kind of document", "ccda", instead("x.xml", "<html><body/></html>"), "no clinical document"),
    Case("entities that grow to a hundred thousand million", "ccda", instead("x.xml", _LAUGHS), "document type"),
    Case("entity that is a file of this machine", "ccda", instead("x.xml", _PASSWD), "document type"),
    Case("document type from the network", "ccda", instead("x.xml", _FETCHED), "document type"),
    Case("entity within the document type", "ccda", instead("x.xml", _PARAMETER), "document type"),
    Case("elements within elements, without an end", "ccda", instead("x.xml", f"{_ROOT}{'<a>' * 200_000}"),
         "within each other"),
    Case("entity that nobody declared", "ccda", swap(_SUMMARY, "As people", "&x; As people"), "is no XML"),
    Case("encoding that nobody knows", "ccda", swap(_SUMMARY, "UTF-8", "KLINGON-1"), "is no XML"),
    Case("UTF-16", "ccda", encoded(_SUMMARY, "utf-16", "UTF-8", "UTF-16")),
    Case("stylesheet and inclusion", "ccda", swap(_SUMMARY, "?>\n", '?><?xml-stylesheet href="file:///etc/passwd"?>'
         "<!-- a word -->")),
    Case("document without a patient", "ccda", swap(_SUMMARY, "recordTarget>", "other>", -1),
         used="documents of no known patient: 1"),
    Case("value that is a name", "ccda", swap(_SUMMARY, _PQ, f'value="{SECRET}" unit="mg/dL"'), used="no number: 1"),
    Case("value that is not known", "ccda", swap(_SUMMARY, _PQ, 'nullFlavor="UNK"'), used="no number: 1"),
    Case("value without a unit", "ccda", swap(_SUMMARY, _PQ, 'value="1.3"'), "come without a unit"),
    Case("value in a unit that is a name", "ccda", swap(_SUMMARY, _PQ, f'value="1.3" unit="{SECRET}"'), "is not known"),
    Case("time that is a name ", "ccda", swap(_SUMMARY, '<effectiveTime value="20200110090000"/>',
         f'<effectiveTime value="{SECRET}"/>'), used="facts without a time: 1"),
    Case("result that was only asked for", "ccda", swap(_SUMMARY, 'moodCode="EVN"', 'moodCode="RQO"')),
    Case("result that is denied", "ccda", swap(_SUMMARY, 'moodCode="EVN"', 'moodCode="EVN" negationInd="true"'),
         used="nothing was: 1"),
    Case("numbers of two authorities ", "ccda", swap(_SUMMARY, 'root="1.2.3"', 'root="9.9.9"'), "from 2 authorities"),
    Case("birth time that is a name", "ccda", swap(_SUMMARY, "19530304", SECRET), "age: missing value"),
)  # fmt: skip


def written(case: Case, folder: Path) -> Path:
    """The case on disk; the path of its site.yaml."""
    files = sound(case.form)
    case.break_it(files)
    (folder / "records").mkdir(parents=True)
    for name, content in files.items():
        (folder / "records" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    own = f"  {case.site}\n" if case.site else ""
    (folder / "site.yaml").write_text(f"site: st-marys\nhl7:\n  path: records\n{own}", encoding="utf-8")
    return folder / "site.yaml"


def fault(case: Case, folder: Path) -> str:
    """What is wrong with what becomes of a case; "" where it ends as it should."""
    return judged(case, written(case, folder))
