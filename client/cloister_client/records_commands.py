"""Commands about a hospital's records: what of a plan is found in them, and fetching them from a FHIR server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cloister_shared.console import one_core, plain_errors, read_text

HERE = Path("site.yaml")
Site = Annotated[Path, typer.Option(help="The hospital's site.yaml.")]


def map_(plan: Path, site: Site = HERE) -> None:
    """Propose which column or code here is which feature of a plan, how many records have it, and in what unit.

    Prints what to put into site.yaml; changes nothing. Ends with 1 where something has to be looked at.
    """
    one_core()
    with plain_errors():
        from cloister_client.connectors.connector import open_records
        from cloister_client.mapping import mapped
        from cloister_shared.plan_file import read_plan

        found = mapped(read_plan(read_text(plan), plan.name).table, open_records(site))
        for line in found.lines():
            typer.echo(line)
    if not all(match.sound for match in found.matches):
        raise typer.Exit(1)


def fetch(site: Annotated[Path, typer.Argument(help="The hospital's site.yaml.")] = HERE) -> None:
    """Fill the folder that studies read: from a FHIR server, a database of OMOP, or a DICOMweb server.

    What broke off is gone on with. A study trains without a network, and so cannot ask a server itself.
    """
    with plain_errors():
        from cloister_client.connectors.fhir_export import fetch_export
        from cloister_client.site_file import read_site

        hospital = read_site(site)
        if hospital.omop:
            from cloister_client.connectors.sql import copy_tables

            count = len(copy_tables(hospital.omop, site.parent, hospital.site))
        elif hospital.dicom and hospital.dicom.labels:
            from cloister_client.connectors.dicom import DicomConnector
            from cloister_client.connectors.dicom_web import fetch as fetch_pictures

            count = fetch_pictures(DicomConnector(hospital, site.parent))
            typer.echo(f"{count} new files in {hospital.dicom.folder}.")
            return
        else:
            count = len(fetch_export(hospital, site.parent, typer.echo))
        typer.echo(f"{count} files are in place. Next: cloister-site map PLAN")
