"""``cloister-site studies``, ``show``, ``approve``, ``reject``, ``revoke``: what a study asks, and the answer."""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cloister_shared.console import one_core, plain_errors

if TYPE_CHECKING:
    from cloister_client.offers import Study
    from cloister_client.quote import Quote

Site = Annotated[Path, typer.Option("--site", help="The hospital's site.yaml; the agent's folder lies beside it.")]
Called = Annotated[str, typer.Argument(metavar="STUDY", help="Its name, or the start of its plan's digest.")]
Reason = Annotated[str, typer.Option(help="One line; the consortium reads it.")]
HERE = Path("site.yaml")


def studies(
    site: Site = HERE, offline: Annotated[bool, typer.Option(help="Do not ask the coordinator.")] = False
) -> None:
    """List the studies that this hospital is invited to. What was decided here, and how far each is."""
    with plain_errors():
        from cloister_client.approvals import policy
        from cloister_client.membership import agent_folder, consortium_of
        from cloister_client.offers import studies_of
        from cloister_client.study_text import table

        agent = agent_folder(site)
        consortium_of(agent)
        asked = "" if offline else _caught_up(agent)
        found, broken = studies_of(agent)
        typer.echo(table(agent, found, policy(agent).approvals))
        for sentence in [*broken, *([asked] if asked else [])]:
            typer.secho(fill(sentence, 100), fg="red", err=True)


def show(study: Called, site: Site = HERE) -> None:
    """Show what a study asks, of whom, and what it costs here."""
    one_core()
    with plain_errors():
        from cloister_client.membership import agent_folder
        from cloister_client.offers import called

        agent = agent_folder(site)
        found = called(agent, study)
        _print(agent, site, found, _quote(found, site))
        typer.echo(f"\n{_next(agent, found, site)}")


def approve(
    study: Called,
    officer: Annotated[str, typer.Option(help="Who approves: an officer of this hospital.")],
    key: Annotated[Path, typer.Option(help="The officer's own key file.")],
    site: Site = HERE,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask again.")] = False,
) -> None:
    """Read a study's page and approve it. What binds are the digests of plan, hospitals and quote."""
    one_core()
    with plain_errors():
        from cloister_client.decisions import admissible
        from cloister_client.decisions import approve as approved
        from cloister_client.membership import agent_folder
        from cloister_client.offers import called
        from cloister_shared.envelope import read_identity
        from cloister_shared.errors import BudgetExceeded, ConsentRefused

        agent, identity = agent_folder(site), read_identity(key)
        found = called(agent, study)
        admissible(agent, found)
        quote = _quote(found, site)
        _print(agent, site, found, quote)
        if isinstance(quote, str):
            raise ConsentRefused(f"{found.plan.study} cannot be approved without a quote.", mend=quote)
        if quote.refusal:
            raise BudgetExceeded(f"{found.plan.study} cannot be approved: {quote.refusal}", mend="")
        typer.echo()
        if not yes and not typer.confirm(f"Do you, {officer}, approve this study for {found.offer.consortium}?"):
            raise ConsentRefused("Nothing was approved.", mend="")
        standing = approved(agent, found, officer, identity, quote.digest)
        name, people = found.plan.study, ", ".join(standing.people or standing.waiting)
        if standing.said == "approved":
            typer.echo(f"{name} ({found.digest[:12]}) is approved by {people}.")
            _tell(agent, found)
            typer.echo(
                "It runs when the consortium runs it, while cloister-site start does here. To end it at any time:"
            )
            typer.echo(f"  {_typed('revoke', found, site)} --reason WHY")
        else:
            typer.echo(f"{people} approved {name}; it counts once another officer does:")
            typer.echo(f"  {_typed('approve', found, site)} --officer NAME --key FILE")


def reject(study: Called, reason: Reason, site: Site = HERE) -> None:
    """Say no to a study that is not approved. It may be approved later."""
    _stop(study, "rejected", reason, site)


def revoke(study: Called, reason: Reason, site: Site = HERE) -> None:
    """Take an approval back, from the next message on. The study may be approved again."""
    _stop(study, "revoked", reason, site)


def _stop(study: str, decision: Literal["rejected", "revoked"], reason: str, site: Path) -> None:
    with plain_errors():
        from cloister_client.decisions import account, stop
        from cloister_client.membership import agent_folder
        from cloister_client.offers import called

        agent = agent_folder(site)
        found = called(agent, study)
        stop(agent, found.digest, decision, reason, account())
        after = "Nothing more leaves for it; what was sent before stays sent." if decision == "revoked" else ""
        typer.echo(fill(f"{found.plan.study} ({found.digest[:12]}) is {decision} here. {after}".strip(), 100))
        _tell(agent, found)
        if decision == "revoked" and found.plan.private:
            typer.echo("To free what it reserved of the budget, unless it is to be approved again:")
            typer.echo(f"  {_typed('budget release', found, site)}")


# --- parts -------------------------------------------------------------------------------------------------
def _caught_up(agent: Path) -> str:
    """Hear what is new; why that was not possible, or what was refused."""
    from cloister_client.liaison import catch_up
    from cloister_shared.errors import CloisterError

    try:
        return " ".join(f"Refused: {why}" for why in catch_up(agent))
    except CloisterError as error:
        return f"What stands here may be old. {error}"


def _quote(study: Study, site: Path) -> Quote | str:
    """What it would cost, or why nobody can say."""
    from cloister_client.budget_commands import opened
    from cloister_client.quote import quoted
    from cloister_shared.errors import CloisterError

    try:
        with opened(site) if study.plan.private else nullcontext() as ledger:
            return quoted(study.plan, site, ledger)
    except CloisterError as error:
        return str(error)


def _print(agent: Path, site: Path, study: Study, quote: Quote | str) -> None:
    from cloister_client.approval_page import page
    from cloister_client.approvals import standing
    from cloister_client.membership import consortium_of
    from cloister_client.site_file import read_site

    lines = page(study, consortium_of(agent), read_site(site), standing(agent, study.digest), quote)
    for line, warns in lines:
        if warns:
            typer.secho(line, fg="red", bold=True)
        else:
            typer.echo(line)


def _tell(agent: Path, study: Study) -> None:
    """Now, if the coordinator can be reached; else the agent does it later."""
    from cloister_client.liaison import tell_decision
    from cloister_client.membership import calling
    from cloister_shared.errors import CloisterError

    try:
        with calling(agent) as control:
            tell_decision(agent, control, study.digest)
        typer.echo("The coordinator has been told.")
    except CloisterError as error:
        typer.echo(fill(f"The coordinator could not be told now; the agent will tell it. {error}", 100))


def _next(agent: Path, study: Study, site: Path) -> str:
    from cloister_client.approvals import standing

    if standing(agent, study.digest).said == "approved":
        return f"Next, to end it:\n  {_typed('revoke', study, site)} --reason WHY"
    yes, no = _typed("approve", study, site), _typed("reject", study, site)
    return f"Next, one of:\n  {yes} --officer NAME --key FILE\n  {no} --reason WHY"


def _typed(command: str, study: Study, site: Path) -> str:
    """By the digest, which no other version of the study has."""
    return f"cloister-site {command} {study.digest[:12]}" + (
        "" if site == HERE else f" --site {shlex.quote(str(site))}"
    )
