"""``cloister-site lineage``: which studies used the rows of patients who withdrew."""

from __future__ import annotations

import json
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloister_shared.console import one_core, plain_errors

if TYPE_CHECKING:
    from cloister_client.lineage_text import Answer

HERE = Path("site.yaml")


def lineage(
    site: Annotated[Path, typer.Option(help="The hospital's site.yaml; the record lies beside it.")] = HERE,
    patients: Annotated[
        Path | None, typer.Option(metavar="FILE", help="One id a line; the opt_outs of site.yaml, if not given.")
    ] = None,
    by_patient: Annotated[bool, typer.Option("--by-patient", help="Each patient, by the line of the list.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For a program.")] = False,
) -> None:
    """Say which studies and models used rows of patients who withdrew, in which rounds, and what bounds it.

    Prints no id. Asks nobody outside the hospital and tells nobody.
    """
    one_core()
    with plain_errors():
        from cloister_client.lineage_text import page, values

        found = _answer(site, patients)
        if as_json:
            typer.echo(json.dumps(values(found, by_patient=by_patient), indent=1))
        else:
            typer.echo(page(found, by_patient=by_patient))


def _answer(site: Path, patients: Path | None) -> Answer:
    from cloister_client import book, lineage_book
    from cloister_client.ledger import Ledger
    from cloister_client.lineage_answer import traces, unrecorded
    from cloister_client.lineage_text import Answer
    from cloister_client.opt_outs import listed, read_opt_outs
    from cloister_client.site_file import read_site
    from cloister_shared.errors import DataRefused

    terms, folder = read_site(site), site.parent
    if patients is None and terms.opt_outs is None:
        raise DataRefused(
            f"{site} names no list of patients who withdrew.",
            mend="Write opt_outs: FILE into it, one id a line, or give --patients FILE.",
        )
    source = patients or folder / str(terms.opt_outs)
    try:
        ids = listed(source)
    except UnicodeDecodeError:
        raise DataRefused(f"{source} is no text.", mend="Write one patient's id a line, in UTF-8.") from None
    once = {line: id_ for id_, line in {id_: line for line, id_ in reversed(ids.items())}.items()}
    opted_out = read_opt_outs(terms, folder)
    with ExitStack() as opened:
        ledger = None
        if book.begun(folder / "ledger.sqlite"):
            ledger = opened.enter_context(closing(Ledger(folder / "ledger.sqlite", terms.population)))
        found, without = [], list[str]()
        if lineage_book.begun(folder):
            record = opened.enter_context(closing(lineage_book.LineageBook(folder)))
            found, without = traces(record, folder / "agent", once, ledger), unrecorded(record, ledger)
        elif ledger:
            without = sorted({f"{one.study} ({one.plan[:12]})" for one in ledger.reservations() if one.spent})
    allowed = frozenset(line for line, id_ in once.items() if id_ not in opted_out)
    return Answer(source.name, tuple(sorted(once)), allowed, found, without)
