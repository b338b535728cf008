"""Connector ``fhir``: FHIR R4 from a folder, as Bulk Data's NDJSON or as bundles, each plain or gzipped.

orjson reads and a few elements are taken; fhir.resources, which checks every rule of FHIR and takes a hundred times
as long, looks at the first of each kind, and at whatever has another shape than it should.
"""

from __future__ import annotations

import gc
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from cloister_client.connectors.clinical import Records, stands_for
from cloister_client.connectors.coded import CodedConnector
from cloister_client.connectors.fhir_resources import KINDS, READ, Clinic, named_in
from cloister_client.connectors.gathering import Chart
from cloister_client.site_file import FhirFolder, SiteFile
from cloister_shared.errors import DataRefused

_ENDINGS = (".ndjson", ".ndjson.gz", ".jsonl", ".json", ".json.gz")
_SAMPLE = 3
"""Resources of each kind that fhir.resources looks at."""


def fhir_connector(site: SiteFile, terms: FhirFolder, folder: Path) -> CodedConnector:
    """Of the folder that ``site.yaml`` names."""
    where = folder / terms.path
    return CodedConnector(site, folder, terms, lambda: f"{where.name} (FHIR)", partial(_records, site.site, where))


def _records(site: str, folder: Path, wanted: frozenset[str] | None) -> Records:
    """The records of these codes, or of all.

    Raises:
        DataRefused: the folder cannot be read, or is not FHIR.
    """

    def keeps(code: str) -> bool:
        return wanted is None or any(stands_for(each, code) for each in wanted)

    clinic, reader = Clinic(keeps), _Reader(site)
    # Plain values that hold no circle: looking for circles in them would take a third of the time.
    looking = gc.isenabled()
    gc.disable()
    try:
        for path in _files(site, folder):
            reader.read(path, clinic)
        clinic.finish()
    finally:
        if looking:
            gc.enable()
    if not clinic.patients:
        raise DataRefused(
            f"{site}: {folder.name} holds no Patient.",
            mend="Export Patient and Encounter beside the others, into the folder that fhir.path names.",
        )
    chart = Chart(clinic.people, clinic.patients, clinic.stays, clinic.encounters, clinic.facts)
    return chart.records(wanted, {"resources that say that nothing was": clinic.states})


def _files(site: str, folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataRefused(
            f"{site}: there is no folder {folder.name}.",
            mend="Correct fhir.path in site.yaml; it is read beside that file. cloister-site fetch fills it.",
        )
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(_ENDINGS))
    if not found:
        raise DataRefused(
            f"{site}: {folder.name} holds no file of FHIR.",
            mend=f"Put files there that end in {', '.join(_ENDINGS)}.",
        )
    return found


class _Reader:
    """Files, line by line; what goes wrong is told by file and line."""

    def __init__(self, site: str) -> None:
        self._site = site
        self._seen: dict[str, int] = {}

    def read(self, path: Path, clinic: Clinic) -> None:
        import orjson

        where, number = f"{self._site}: {path.name}", 0
        try:
            with _opened(path) as file:
                if ".json" in path.suffixes and ".jsonl" not in path.suffixes:
                    self._bundle(orjson.loads(file.read()), where, clinic)
                    return
                take, loads = self._take, orjson.loads
                for line in file:
                    number += 1
                    if line.strip():
                        take(loads(line), where, number, clinic)
        except orjson.JSONDecodeError:
            line = f" line {number}" if number else ""
            raise DataRefused(
                f"{where}{line} is not JSON.", mend="Export the file again: it may have been cut off."
            ) from None
        except (OSError, EOFError, zlib.error) as error:
            raise DataRefused(
                f"{where} cannot be read ({type(error).__name__}).", mend="Export the file again."
            ) from None

    def _bundle(self, bundle: Any, where: str, clinic: Clinic) -> None:
        if not isinstance(bundle, dict) or "resourceType" not in bundle:
            raise DataRefused(f"{where} is no resource of FHIR.", mend="Export it as FHIR R4, or take it away.")
        if bundle["resourceType"] != "Bundle":
            self._take(bundle, where, 1, clinic)
            return
        try:
            entries: Iterable[Any] = [entry["resource"] for entry in bundle.get("entry") or () if "resource" in entry]
            names = named_in(bundle)
        except (KeyError, TypeError, AttributeError, ValueError):
            self._doubt(bundle, f"{where}")
        for number, resource in enumerate(entries, start=1):
            self._take(resource, where, number, clinic, names)

    def _take(
        self, resource: Any, where: str, number: int, clinic: Clinic, names: dict[str, str] | None = None
    ) -> None:
        try:
            kind = resource["resourceType"]
            if kind == "Bundle":
                self._bundle(resource, f"{where} line {number}", clinic)
                return
            if kind in KINDS and (seen := self._seen.get(kind, 0)) < _SAMPLE:
                self._seen[kind] = seen + 1
                if faults := _faults(resource):
                    self._refuse(where, number, kind, faults)
            clinic.take(resource, names)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            self._doubt(resource, where, number)

    def _doubt(self, resource: Any, where: str, number: int = 1) -> NoReturn:
        kind = resource.get("resourceType") if isinstance(resource, dict) else None
        kind = kind if kind in KINDS or kind == "Bundle" else "no resource"
        self._refuse(where, number, kind, _faults(resource) if kind != "no resource" else [])

    def _refuse(self, where: str, number: int, kind: str, faults: list[str]) -> NoReturn:
        said = f"is {kind} of FHIR" if kind == "no resource" else f"is no {kind} as FHIR R4 has it"
        shown = f": {', '.join(faults[:3])}" if faults else ""
        raise DataRefused(
            f"{where} line {number} {said}{shown}.", mend="Correct the export; FHIR R4 is read, and no other release."
        )


def _opened(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path), 1 << 20)  # pyright: ignore[reportArgumentType, reportReturnType]
    return path.open("rb", 1 << 20)


def _faults(resource: dict[str, Any]) -> list[str]:
    """The elements among those read that are not as FHIR has them, by their names alone."""
    from fhir.resources.R4B import get_fhir_model_class
    from pydantic import ValidationError

    try:
        get_fhir_model_class(resource["resourceType"]).model_validate(resource)
    except ValidationError as error:
        return list(dict.fromkeys(_elements(error)))
    except Exception as fault:  # whatever it meets in a resource of another shape
        return [f"its shape ({type(fault).__name__})"]
    return []


def _elements(error: Any) -> Iterator[str]:
    for fault in error.errors(include_url=False, include_input=False, include_context=False):
        path = [str(part) for part in fault["loc"] if part != "root"]
        if fault["type"] != "extra_forbidden" and (not path or path[0] in READ):
            yield ".".join(path) or "its values"
