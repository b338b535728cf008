"""What every reader of a hospital's records offers, and the one that a ``site.yaml`` asks for."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cloister_client.site_file import SiteFile, read_site
from cloister_shared.errors import DataRefused
from cloister_shared.schema import Schema

if TYPE_CHECKING:
    import pandas as pd


ENTRY_POINTS = "cloister.connectors"
"""The group of entry points under which packages of other makers offer connectors."""


class Connector(Protocol):
    """Read-only, and only inside the hospital."""

    @property
    def site(self) -> SiteFile:
        """The hospital's own file."""
        ...

    @property
    def folder(self) -> Path:
        """Where that file is; paths in it, and in cells, are seen from there."""
        ...

    @property
    def source(self) -> str:
        """What is read, in a word: a file's name, an address without a password."""
        ...

    def describe(self) -> tuple[str, ...]:
        """What there is to read: names of columns, or codes.

        Raises:
            DataRefused: the records cannot be read.
        """
        ...

    def rows(self, schema: Schema, also: tuple[str, ...] = ()) -> pd.DataFrame:
        """The plan's columns under the plan's names, one row a record; the index is the row's number, from 1.

        A cell is the hospital's own spelling of a value, or None. Of a series it is an array [k, 3] of hours, the
        channel's number and the value in the plan's unit; of an image a path seen from ``folder``, a tuple of the
        paths of one volume's slices, or an array [channels, *size] of the picture's own size; of a text, a molecule
        and everything else what is written there.

        ``also`` names further columns, such as the split.

        Raises:
            DataRefused: the records or a column are missing, or the site's file and the plan do not agree.
        """
        ...

    def count(self) -> int:
        """How many records there are.

        Raises:
            DataRefused: they cannot be read.
        """
        ...

    def factors(self, schema: Schema) -> dict[str, tuple[float, float]]:
        """For each number feature whose unit differs here: multiply, then add, to reach the plan's unit.

        Raises:
            DataRefused: a unit is not known, or does not measure the same thing.
        """
        ...


def open_records(site_yaml: Path) -> Connector:
    """The connector that a ``site.yaml`` describes.

    Raises:
        DataRefused: there is no such file, it is not text, or no installed package offers its connector.
        PlanRefused: it is malformed.
    """
    site, folder = read_site(site_yaml), site_yaml.parent
    if site.linked:
        from cloister_client.connectors.linked import LinkedConnector

        return LinkedConnector(_opened(site, folder))
    return _opened(site, folder)


def _opened(site: SiteFile, folder: Path) -> Connector:
    """The records themselves."""
    if site.connector:
        return _installed(site.connector.name)(site, folder)
    if site.fhir:
        from cloister_client.connectors.fhir import fhir_connector

        return fhir_connector(site, site.fhir, folder)
    if site.omop:
        from cloister_client.connectors.omop import omop_connector

        return omop_connector(site, site.omop, folder)
    if site.hl7:
        from cloister_client.connectors.hl7 import hl7_connector

        return hl7_connector(site, site.hl7, folder)
    if site.dicom and site.dicom.labels:
        from cloister_client.connectors.dicom import DicomConnector

        return DicomConnector(site, folder)
    from cloister_client.connectors.table import TableConnector

    return TableConnector(site, folder)


def _installed(name: str) -> Callable[[SiteFile, Path], Connector]:
    """What a package that the hospital installed offers under ``name``: called with its site and folder.

    Raises:
        DataRefused: no package does.
    """
    offered = entry_points(group=ENTRY_POINTS)
    if name not in offered.names:
        known = ", ".join(sorted(offered.names)) or "none"
        raise DataRefused(
            f"No installed package has the connector {name}; installed are: {known}.",
            mend="Install its package into the agent's environment, or correct connector.name in site.yaml.",
        )
    return offered[name].load()
