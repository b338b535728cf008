"""Connector ``hl7``: a folder of HL7 version 2 messages (.hl7) and of C-CDA documents (.xml)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from cloister_client.connectors import ccda, hl7_messages
from cloister_client.connectors.clinical import Records, stands_for
from cloister_client.connectors.coded import CodedConnector
from cloister_client.connectors.newest import Newest
from cloister_client.site_file import Hl7Folder, SiteFile
from cloister_shared.errors import DataRefused

_ENDINGS = (".hl7", ".xml")
_AROUND = ("FHS", "BHS", "BTS", "FTS")
"""Segments of files and batches, which hold messages and say nothing of a patient."""
_LATIN = re.compile(rb"8859/(1[0-6]?|[2-9])\b")


def hl7_connector(site: SiteFile, terms: Hl7Folder, folder: Path) -> CodedConnector:
    """Of the folder that ``site.yaml`` names."""
    where = folder / terms.path
    return CodedConnector(
        site, folder, terms, lambda: f"{where.name} (HL7)", partial(_records, site.site, terms, where)
    )


def _records(site: str, terms: Hl7Folder, folder: Path, wanted: frozenset[str] | None) -> Records:
    """The records of these codes, or of all.

    Raises:
        DataRefused: the folder cannot be read, or is not HL7.
    """
    told = Newest(lambda code: wanted is None or any(stands_for(each, code) for each in wanted))
    for path in _files(site, folder):
        where = f"{site}: {path.name}"
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataRefused(
                f"{where} cannot be read ({type(error).__name__}).", mend="Give the agent's account the right to."
            ) from None
        if path.suffix.lower() == ".xml":
            if not ccda.take(ccda.parsed(content, where), told, terms.authority):
                told.left_out["documents of no known patient"] += 1
            continue
        for number, message in enumerate(_messages(content, where), start=1):
            _take(message, f"{where} message {number}", told, terms.authority)
    for place, several in told.authorities.items():
        if len(several) > 1:
            raise DataRefused(
                f"{site}: the patients' numbers in {place} come from {len(several)} authorities, and two of them may"
                " give one number to two patients.",
                mend="Name the one whose numbers are meant in site.yaml: hl7: {path: ..., authority: NAME}.",
            )
    if not told.chart.patients:
        of = " of the authority that hl7.authority names" if terms.authority else ""
        raise DataRefused(
            f"{site}: {folder.name} names no patient{of}.",
            mend="PID-3 of a message, or id of a document's patientRole, has to hold the patient's number.",
        )
    return told.chart.records(wanted, dict(told.left_out), told.gone)


def _files(site: str, folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataRefused(
            f"{site}: there is no folder {folder.name}.",
            mend="Correct hl7.path in site.yaml; it is read beside that file.",
        )
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in _ENDINGS)
    if not found:
        raise DataRefused(
            f"{site}: {folder.name} holds no file of HL7.", mend=f"Put files there that end in {' or '.join(_ENDINGS)}."
        )
    return found


def _messages(content: bytes, where: str) -> Iterator[str]:
    """The messages of a file, with carriage returns between segments whatever stood there, and no framing bytes.

    Raises:
        DataRefused: there is something else in it.
    """
    text = _text(content, where).replace("\r\n", "\r")
    text = text if "\r" in text else text.replace("\n", "\r")
    lines = [line.strip() for line in re.split("[\r\x0b\x1c]", text)]
    message: list[str] = []
    for line in filter(None, lines):
        if not re.match(r"[A-Z][A-Z0-9]{2}(?![A-Za-z0-9])", line):
            raise DataRefused(
                f"{where} has a line that is no segment of HL7 version 2.",
                mend="Export the messages as they are sent; a line break in a text is written \\.br\\.",
            )
        if line.startswith("MSH") or line[:3] in _AROUND:
            if message:
                yield "\r".join(message)
            message = [line] if line.startswith("MSH") else []
        elif message:
            message.append(line)
        else:
            raise DataRefused(f"{where} has a segment before the first MSH.", mend="Every message begins with its MSH.")
    if message:
        yield "\r".join(message)


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        if named := _LATIN.search(content.partition(b"\r")[0].partition(b"\n")[0]):
            return content.decode(f"iso8859_{named[1].decode()}", errors="replace")
        raise DataRefused(
            f"{where} is neither UTF-8 nor says in MSH-18 what it is.", mend="Export it in UTF-8."
        ) from None


def _take(message: str, where: str, told: Newest, authority: str | None) -> None:
    try:
        hl7_messages.take(message, told, authority)
    except ValueError:
        raise DataRefused(
            f"{where} is no message of HL7 version 2.",
            mend="MSH-1 and MSH-2 name the separators (MSH|^~\\&|), and MSH-9 says what it is (ORU^R01).",
        ) from None
