"""``cloister-site budget``: what the patients' privacy has cost, what is left, and who said so."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloister_shared.console import one_core, plain_errors, read_text

if TYPE_CHECKING:
    from cloister_client.ledger import Ledger

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="The hospital's privacy budget, over all studies.")

Site = Annotated[Path, typer.Option("--site", help="The hospital's site.yaml; the ledger lies beside it.")]
Population = Annotated[str, typer.Option(help="Whose budget; the one of site.yaml, if not given.")]
HERE = Path("site.yaml")


@contextmanager
def opened(site: Path, population: str = "", *, new: bool = False) -> Generator[Ledger, None, None]:
    """The hospital's ledger; only ``new`` may begin one.

    Raises:
        BudgetExceeded: there is none yet.
        LedgerBroken: it cannot be read, or is gone.
    """
    from cloister_client.book import begun
    from cloister_client.ledger import Ledger
    from cloister_client.site_file import read_site
    from cloister_shared.errors import BudgetExceeded

    terms, path = read_site(site), site.parent / "ledger.sqlite"
    if not new and not begun(path):
        raise BudgetExceeded(
            f"{terms.site} has no privacy budget yet.",
            mend="Name an officer (cloister-site budget officer), who sets a ceiling (cloister-site budget ceiling).",
        )
    ledger = Ledger(path, population or terms.population)
    try:
        yield ledger
    finally:
        ledger.close()


@app.command()
def officer(name: str, site: Site = HERE, key: Path | None = None) -> None:
    """Name an officer who may set ceilings: make their key (or take theirs) and pin its public half."""
    with plain_errors():
        from cloister_client.ceilings import pin_officer
        from cloister_shared.envelope import key_id

        path = key or Path(f"{name}.key")
        with opened(site, new=True) as ledger:
            public = pin_officer(ledger.book, name, path).public
        typer.echo(f"{name} is an officer of this hospital; key {key_id(public)}, pinned in officers.json.")
        typer.echo(f"{path} is theirs alone: move it off this machine, and give it to `budget ceiling` with --key.")


@app.command()
def ceiling(
    epsilon: Annotated[float, typer.Option(help="Of everything that is ever released about one patient.")],
    delta: Annotated[float, typer.Option(help="As 1e-6; well below one over the number of patients.")],
    officer: Annotated[str, typer.Option(help="Who signs.")],
    key: Annotated[Path, typer.Option(help="The officer's key file.")],
    site: Site = HERE,
    population: Population = "",
    reason: str = "",
) -> None:
    """Set or change the ceiling: signed, numbered, and written to the ledger and the audit log."""
    with plain_errors():
        from cloister_shared.envelope import read_identity

        identity = read_identity(key)
        with opened(site, population, new=True) as ledger:
            made = ledger.set_ceiling(epsilon, delta, officer=officer, identity=identity, reason=reason)
            typer.echo(
                f"Ceiling {made.version} of the {made.population}: epsilon {made.epsilon:g} at delta {made.delta:g},"
                f" signed by {made.officer}."
            )
            counted = ledger.price(ledger.counted(), delta)
            if counted > epsilon:
                typer.echo(f"Epsilon {counted:.3g} is spent or reserved already: nothing more may be released.")


@app.command()
def show(site: Site = HERE, population: Population = "") -> None:
    """What is spent, reserved and left, and by which study."""
    with plain_errors():
        from cloister_client.budget_text import standing

        with opened(site, population) as ledger:
            typer.echo(standing(ledger))


@app.command()
def history(site: Site = HERE) -> None:
    """What happened to the budget, in order, from the audit log."""
    with plain_errors():
        from cloister_client.budget_text import happened

        with opened(site) as ledger:
            typer.echo("\n".join(happened(entry) for entry in ledger.book.told()))


@app.command()
def quote(plan: Path, site: Site = HERE) -> None:
    """What a plan would cost here: epsilon, rounds, hours, GB. Approval binds what is quoted."""
    one_core()
    with plain_errors():
        from cloister_client.quote import quoted
        from cloister_shared.plan_file import read_plan

        terms = read_plan(read_text(plan), plan.name)
        with opened(site) if terms.private else nullcontext() as ledger:
            found = quoted(terms, site, ledger)
        typer.echo(found.page)
        if found.refusal:
            raise SystemExit(1)


@app.command()
def release(study: str, site: Site = HERE, population: Population = "", reason: str = "") -> None:
    """Give back what a study has reserved and will not use: its name, or the start of its plan's digest.

    What it has spent stays spent. The study may reserve the rest anew, if that still fits.
    """
    with plain_errors(), opened(site, population) as ledger:
        ended, delta = ledger.recover(study, reason), 1e-5
        if found := ledger.ceiling():
            delta = found.delta
        typer.echo(
            f"{ended.study} ({ended.plan[:12]}) has reserved nothing any more; of epsilon"
            f" {ledger.price(ended.held, delta):.3g} it had spent {ledger.price(ended.spent, delta):.3g}."
        )


@app.command()
def export(site: Site = HERE) -> None:
    """The whole ledger as JSON, with the head of the audit log: keep the head where this machine cannot reach."""
    with plain_errors():
        from cloister_client.budget_text import exported

        with opened(site) as ledger:
            typer.echo(json.dumps(exported(ledger), indent=1))
