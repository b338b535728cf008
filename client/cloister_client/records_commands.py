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


def fetch(site: Site = HERE) -> None:
    """Fill the folder of FHIR files from the hospital's own server, by Bulk Data's $export.

    An export that broke off is gone on with.
    """
    with plain_errors():
        from cloister_client.connectors.fhir_export import fetch_export
        from cloister_client.site_file import read_site

        files = fetch_export(read_site(site), site.parent, typer.echo)
        typer.echo(f"{len(files)} files are in place. Next: cloister-site map PLAN")
