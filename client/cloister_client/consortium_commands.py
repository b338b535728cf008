"""``cloister-site`` as a member of a consortium: ``enrol``, ``doctor``, ``start``, ``peers``, ``leave`` and others."""

from __future__ import annotations

import shlex
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Annotated

import typer

from cloister_shared.console import one_core, plain_errors

if TYPE_CHECKING:
    from cloister_client.membership import Consortium

Site = Annotated[Path, typer.Option("--site", help="The hospital's site.yaml; the agent's folder lies beside it.")]
HERE = Path("site.yaml")


def enrol(
    invite: Annotated[Path, typer.Argument(metavar="INVITE", help="The file that the consortium handed over.")],
    site: Site = HERE,
    again: Annotated[
        bool, typer.Option("--again", help="It was enrolled before, and its certificate is over.")
    ] = False,
) -> None:
    """Join a consortium with its invite. Keys are made here and stay here; the peers' keys are pinned."""
    with plain_errors():
        from cloister_client import enrolment
        from cloister_client.membership import agent_folder, authority_id, spelled
        from cloister_shared.envelope import key_id

        agent = agent_folder(site)
        done = enrolment.enrol(agent, invite, again=again)
        known = done.known
        for sentence in done.warnings:
            typer.secho(fill(sentence, 100), fg="red", err=True)
        typer.echo(f"{known.site} is enrolled in {known.consortium} until {done.until:%Y-%m-%d}.\n")
        typer.echo("Compare by telephone, with a number that you had before:")
        typer.echo(f"  {f'this hospital, {known.site}':<64}  {spelled(key_id(known.roster[known.site]))}")
        typer.echo(f"  {f'the coordinator of {known.consortium}':<64}  {spelled(key_id(known.signing))}")
        typer.echo(f"  {'its certificate authority':<64}  {spelled(authority_id((agent / 'ca.crt').read_text()))}")
        for name, key in known.roster.items():
            if name != known.site:
                typer.echo(f"  {name:<64}  {spelled(key_id(key))}")
        typer.echo(f"\nDelete the invite, which holds a private key:\n  rm {invite}")
        typer.echo(f"Back up the agent's folder, which holds this hospital's own:\n  {agent}")
        typer.echo(f"Next: {_with('cloister-site doctor', site)}")


def renew(site: Site = HERE) -> None:
    """Get a new certificate for the same key. A running agent does it by itself when a third of the time is left."""
    with plain_errors():
        from cloister_client import enrolment
        from cloister_client.membership import agent_folder

        held = enrolment.renew(agent_folder(site))
        typer.echo(f"The certificate of {held.name} is renewed until {held.not_after:%Y-%m-%d}.")
        typer.echo("An agent that runs takes it when it next connects; nothing else is to be done.")


def peers(
    site: Site = HERE,
    forget: Annotated[str, typer.Option(metavar="NAME", help="Forget the key of a hospital that made a new one.")] = "",
) -> None:
    """List the hospitals whose keys are pinned here. The fingerprints are to be compared by telephone."""
    with plain_errors():
        from cloister_client import membership

        agent = membership.agent_folder(site)
        if forget:
            key = membership.forget(agent, forget)
            typer.echo(
                f"The key {membership.spelled(key)} of {forget} is forgotten. The next study that names it shows"
            )
            typer.echo("it as new: compare its key by telephone before you approve.")
            return
        typer.echo(_peers(membership.consortium_of(agent)))


def doctor(
    site: Site = HERE,
    invite: Annotated[Path | None, typer.Option(help="Before you enrol: try the way with this invite.")] = None,
    json: Annotated[bool, typer.Option("--json", help="For a machine.")] = False,
) -> None:
    """Try network, certificates, clock, disk, records and budget. Each line says what to do."""
    one_core()
    with plain_errors():
        from cloister_client.doctor import examined
        from cloister_client.findings import State, as_json, as_text, in_all

        findings = []
        for finding in examined(site, invite):
            findings.append(finding)
            if not json:
                red = {State.FAILS: "red", State.WARNING: "yellow"}.get(finding.state)
                typer.secho(as_text(finding), fg=red)
        failed = any(finding.state is State.FAILS for finding in findings)
        typer.echo(as_json(findings) if json else f"\n{in_all(findings)} {_after(invite, site, failed=failed)}")
        if failed:
            raise SystemExit(1)


def start(site: Site = HERE) -> None:
    """Run the agent until it is stopped. It answers the studies that are approved here, and hears of new ones."""
    run(site)


def run(site: Path, program: str = "cloister_client.child") -> None:
    """``start``; ``program`` is the module that trains, and simulations alone name another."""
    one_core()
    with plain_errors():
        import logging
        from threading import Event, Thread

        from cloister_client.membership import agent_folder, consortium_of, running

        agent = agent_folder(site)
        known = consortium_of(agent)
        from cloister_client.agent import run_agent
        from cloister_client.liaison import keep_in_touch

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        logging.getLogger("cloister.site").info("%s of %s; Ctrl-C ends me", known.site, known.consortium)
        stop, second = Event(), running(agent)
        thread = Thread(target=keep_in_touch, args=(agent, stop), name="control", daemon=True)
        if not second:  # a second agent is refused below, and takes nothing from the first
            thread.start()
        try:
            run_agent(agent.parent, stop, program)
        finally:
            stop.set()
            if not second:
                thread.join(10)


def service(
    site: Site = HERE,
    system: Annotated[bool, typer.Option("--system/--user", help="For the machine, or for this account.")] = False,
    memory: Annotated[str, typer.Option(help="Most that agent and training may use, as systemd writes it.")] = "16G",
    gpu: Annotated[bool, typer.Option("--gpu", help="Let it use a GPU.")] = False,
) -> None:
    """Print a systemd unit for the agent. It says how to install it; no root is needed."""
    with plain_errors():
        from cloister_client.membership import agent_folder, consortium_of
        from cloister_client.service import unit

        known = consortium_of(agent_folder(site))
        typer.echo(unit(site, known.site, system=system, memory=memory, gpu=gpu), nl=False)


def egress(site: Site = HERE) -> None:
    """List every message that left this hospital. When, for which study, how large, what kinds of values."""
    with plain_errors():
        from cloister_client.egress import told
        from cloister_client.membership import agent_folder

        typer.echo(told(agent_folder(site) / "egress.jsonl"))


def leave(
    site: Site = HERE,
    yes: Annotated[bool, typer.Option("--yes", help="Revoke every study and delete the agent's folder.")] = False,
) -> None:
    """How to remove everything. Deletes nothing without --yes, and the budget's record never."""
    with plain_errors():
        from cloister_client import leaving
        from cloister_client.membership import agent_folder

        agent = agent_folder(site)
        typer.echo(leaving.left(agent) if yes else leaving.page(agent))


# --- parts -------------------------------------------------------------------------------------------------
def _peers(known: Consortium) -> str:
    from cloister_client.membership import spelled
    from cloister_shared.envelope import key_id

    lines = [f"{'Hospital':<64}  Key"]
    for name, key in known.roster.items():
        lines.append(f"{name:<64}  {spelled(key_id(key))}" + ("  this one" if name == known.site else ""))
    lines += [
        f"{f'(the coordinator of {known.consortium})':<64}  {spelled(key_id(known.signing))}",
        "",
        "A key that is pinned is never replaced by what arrives. A hospital that made a new one tells you by",
        "telephone; then: cloister-site peers --forget NAME",
    ]
    return "\n".join(lines)


def _after(invite: Path | None, site: Path, *, failed: bool) -> str:
    if failed:
        return "Mend what fails from the top, and run it again."
    if invite is not None:
        return f"Next: {_with(f'cloister-site enrol {invite}', site)}"
    return f"Next: {_with('cloister-site start', site)}"


def _with(command: str, site: Path) -> str:
    return command if site == HERE else f"{command} --site {shlex.quote(str(site))}"
