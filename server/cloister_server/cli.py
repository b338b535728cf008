"""The command of a consortium: ``cloister-coordinator``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cloister_server import account_commands, study_commands
from cloister_server.desk import HERE, Folder, TokenFile, call, desk
from cloister_shared.console import one_core, plain_errors, read_text

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True, pretty_exceptions_enable=False)

app.add_typer(study_commands.app, name="study")
app.add_typer(account_commands.app, name="account")
app.command()(account_commands.audit)


@app.callback()
def coordinator() -> None:
    """The coordinator of a consortium of hospitals.

    `init` makes the consortium's folder, once; `start` runs the service. The other commands talk to the running
    service, from this machine or from one that has a copy of coordinator.yaml and ca.crt.
    """


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="To be made: keys, records and the audit log go here.")] = HERE,
    name: Annotated[str, typer.Option(help="Of the consortium, as hospitals are told.")] = "consortium",
    host: Annotated[str, typer.Option(help="Where hospitals find this machine: coordinator.example.org")] = "localhost",
    rounds_port: Annotated[int, typer.Option(help="Public: Flower's rounds.")] = 8443,
    control_port: Annotated[int, typer.Option(help="Public: enrolment, studies, decisions.")] = 8444,
    admin_port: Annotated[int, typer.Option(help="On this machine only: these commands.")] = 8445,
    pages_port: Annotated[int, typer.Option(help="On this machine only: pages for a browser.")] = 8446,
    database: Annotated[
        str, typer.Option(help="postgresql+psycopg://USER:PASSWORD@HOST/NAME; a file in the folder, if not given.")
    ] = "",
) -> None:
    """Make a consortium: its certificate authority, keys, settings and first account."""
    with plain_errors():
        from cloister_server.folder import DATABASE, is_loopback, settings_for
        from cloister_server.folder import init as make

        settings = settings_for(name, host, rounds_port, control_port, admin_port, database or DATABASE, pages_port)
        token = make(folder, settings)
        typer.echo(f"{settings.name} is made, in {folder}. Back up the folder; whoever can read it is the consortium.")
        typer.echo(f"  hospitals dial     {settings.rounds} and {settings.control}")
        typer.echo(f"  these commands     {settings.admin}, on this machine")
        typer.echo(f"  pages to read      https://{settings.pages}, on this machine, with an account and its token")
        typer.echo(f"  your account       officer, an operator; its token is in {token}")
        if is_loopback(host):
            typer.echo(
                "Only this machine can reach it. For hospitals elsewhere, init with --host NAME, in a new folder."
            )
        option = "" if folder == HERE else f" --consortium {folder}"
        typer.echo("Next:")
        typer.echo(f"  cloister-coordinator start {folder}")
        typer.echo(f"  cloister-coordinator account add NAME --role researcher{option}   (who submits studies)")
        typer.echo(f'  cloister-coordinator invite "St Mary\'s"{option} > st-marys.invite')


@app.command()
def start(folder: Annotated[Path, typer.Argument(envvar="CLOISTER_CONSORTIUM", show_envvar=False)] = HERE) -> None:
    """Run the service until it is told to stop (Ctrl-C, or SIGTERM)."""
    one_core()
    with plain_errors():
        from cloister_server import coordinator as service  # pyright: ignore[reportAttributeAccessIssue]

        service.start(folder)


@app.command()
def invite(
    hospital: Annotated[str, typer.Argument(help='Its name, as everybody will read it: "St Mary\'s"')],
    hours: Annotated[int, typer.Option(min=1, max=720, help="After which the invite ends.")] = 72,
    consortium: Folder = HERE,
    token_file: TokenFile = None,
) -> None:
    """Print an invite: a file that lets one hospital enrol, once. Send it to a file with > NAME.invite."""
    with desk(consortium, token_file) as service:
        from cloister_shared.control_pb2 import InviteRequest

        reply = call(service.Invite, InviteRequest(hospital=hospital, hours=hours))
        typer.echo(reply.invite, nl=False)
        ends = json.loads(reply.invite)["expires"][:16].replace("T", " ")
        for line in (
            f"An invite for {hospital}: single use, until {ends} UTC. An earlier one no longer counts.",
            "It holds a key: hand it over as you would a password, and keep no copy.",
            "The hospital types: cloister-site enrol FILE",
        ):
            typer.echo(line, err=True)


@app.command()
def hospitals(consortium: Folder = HERE, token_file: TokenFile = None) -> None:
    """List the hospitals: who is invited, enrolled or expelled, and who is there now."""
    with desk(consortium, token_file) as service:
        from cloister_server.pages import hospitals_page
        from cloister_shared.control_pb2 import HospitalsRequest

        typer.echo(hospitals_page(call(service.Hospitals, HospitalsRequest()).hospitals))


@app.command()
def expel(
    hospital: str,
    reason: Annotated[str, typer.Option(help="For the audit log.")],
    consortium: Folder = HERE,
    token_file: TokenFile = None,
) -> None:
    """End a hospital's membership: its certificate is revoked at once, and its open invite with it."""
    with desk(consortium, token_file) as service:
        from cloister_shared.control_pb2 import ExpelRequest

        call(service.Expel, ExpelRequest(hospital=hospital, reason=reason))
        typer.echo(f"{hospital} is expelled: its certificates are revoked, and no port answers to them.")
        typer.echo("Studies with it go on without it while enough hospitals are left. A new invite lets it enrol anew.")


@app.command()
def check(plan: Path) -> None:
    """Read a study plan and print what it promises, or what is wrong with it."""
    one_core()
    with plain_errors():
        from cloister_shared.plan_file import read_plan
        from cloister_shared.plan_text import summary, turned_off

        terms = read_plan(read_text(plan), plan.name)
        typer.echo(summary(terms))
        for sentence in turned_off(terms):
            typer.secho(sentence, fg="red", bold=True)


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
