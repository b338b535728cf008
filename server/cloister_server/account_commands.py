"""``cloister-coordinator account`` and ``audit``: who may command the coordinator, and what they did."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cloister_server.desk import HERE, Folder, TokenFile, call, desk
from cloister_shared.errors import KeyBroken

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Accounts: add, renew, remove, list.")

Into = Annotated[Path | None, typer.Option(help="File for the token; NAME.token here, if not given.")]


@app.command()
def add(
    name: str,
    role: Annotated[str, typer.Option(help="operator, researcher, privacy-officer or auditor")],
    into: Into = None,
    consortium: Folder = HERE,
    token_file: TokenFile = None,
) -> None:
    """Make an account and write its token to a file that you alone can read."""
    path = into or Path(f"{name}.token")
    with desk(consortium, token_file) as service:
        from cloister_shared.control_pb2 import AccountRequest

        if path.exists():
            raise KeyBroken(f"{path} exists.", mend="Name another file with --into.")
        reply = call(service.Account, AccountRequest(verb="add", name=name, role=role))
        _hand_over(path, reply.token, f"{name} is {_a(role)}.")


@app.command()
def renew(name: str, into: Into = None, consortium: Folder = HERE, token_file: TokenFile = None) -> None:
    """Give an account a new token; the old one no longer counts."""
    with desk(consortium, token_file) as service:
        from cloister_shared.control_pb2 import AccountRequest

        reply = call(service.Account, AccountRequest(verb="renew", name=name))
        _hand_over(into or Path(f"{name}.token"), reply.token, f"The old token of {name} no longer counts.")


@app.command()
def remove(name: str, consortium: Folder = HERE, token_file: TokenFile = None) -> None:
    """Remove an account; its token no longer counts."""
    with desk(consortium, token_file) as service:
        from cloister_shared.control_pb2 import AccountRequest

        call(service.Account, AccountRequest(verb="remove", name=name))
        typer.echo(f"{name} is removed.")


@app.command("list")
def list_accounts(consortium: Folder = HERE, token_file: TokenFile = None) -> None:
    """List the accounts and their roles."""
    with desk(consortium, token_file) as service:
        from cloister_shared.control_pb2 import AccountRequest

        accounts = call(service.Account, AccountRequest(verb="list")).accounts
        width = max(map(len, accounts))
        for name, role in sorted(accounts.items()):
            typer.echo(f"{name:<{width}}  {role}")


def audit(
    last: Annotated[int, typer.Option(min=1, max=1000, help="How many of the newest entries.")] = 20,
    consortium: Folder = HERE,
    token_file: TokenFile = None,
) -> None:
    """Print the newest entries of the audit log, after every hash of the whole log was checked."""
    with desk(consortium, token_file) as service:
        from cloister_server.pages import audit_page
        from cloister_shared.control_pb2 import AuditRequest

        typer.echo(audit_page(call(service.Audit, AuditRequest(last=last))))


def _hand_over(path: Path, token: str, said: str) -> None:
    from cloister_shared.durable import save_secret

    save_secret(path, token + "\n")
    typer.echo(said)
    typer.echo(f"The token is in {path} and is shown nowhere else: hand it over, and keep no copy.")
    typer.echo("Its owner puts it into $CLOISTER_TOKEN, or gives the file with --token-file.")


def _a(role: str) -> str:
    return f"{'an' if role[0] in 'aeiou' else 'a'} {role}"
