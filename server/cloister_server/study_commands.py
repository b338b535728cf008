"""``cloister-coordinator study``: put a plan to hospitals, run it once enough approve, and watch it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cloister_server.desk import HERE, Folder, TokenFile, call, desk
from cloister_shared.console import one_core, plain_errors, read_text
from cloister_shared.errors import PlanRefused

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Studies: submit, list, run, watch, stop, resume.")

Study = Annotated[str, typer.Argument(help="Its name, or how its digest begins.")]
Reason = Annotated[str, typer.Option(help="For the hospitals and the audit log.")]


@app.command()
def submit(
    plan: Path,
    hospitals: Annotated[str, typer.Option(help="Names, with commas between; all that are enrolled, if none.")] = "",
    hospital: Annotated[list[str] | None, typer.Option(help="One name, even with a comma; may be repeated.")] = None,
    consortium: Folder = HERE,
    token_file: TokenFile = None,
) -> None:
    """Offer a plan to hospitals. Nothing runs before their people approve it."""
    with plain_errors():
        text = read_text(plan)
        if len(text.encode()) > 256 * 1024:
            raise PlanRefused(f"{plan} has more than 256 KB.", mend="Give the path of a plan in YAML.")
    with desk(consortium, token_file) as service:
        from cloister_server.pages import decisions_lines
        from cloister_shared.control_pb2 import SubmitRequest

        named = [*(name.strip() for name in hospitals.split(",") if name.strip()), *(hospital or ())]
        study = call(service.Submit, SubmitRequest(plan=text, file=plan.name, hospitals=named))
        typer.echo(f"{study.name} is offered, as {study.digest[:16]}.")
        for line in decisions_lines(study):
            typer.echo(line)
        typer.echo("Each hospital reads it with cloister-site studies and answers with cloister-site approve.")
        typer.echo(f"Then an operator types: cloister-coordinator study run {study.digest[:12]}")


@app.command("list")
def list_studies(consortium: Folder = HERE, token_file: TokenFile = None) -> None:
    """List the studies and what was decided upon them."""
    with desk(consortium, token_file) as service:
        from cloister_server.pages import studies_page
        from cloister_shared.control_pb2 import ListRequest

        typer.echo(studies_page(call(service.List, ListRequest()).studies))


@app.command()
def run(study: Study, reason: Reason = "", consortium: Folder = HERE, token_file: TokenFile = None) -> None:
    """Begin a study that enough hospitals approved."""
    _steer("run", study, reason, consortium, token_file)


@app.command()
def stop(study: Study, reason: Reason = "", consortium: Folder = HERE, token_file: TokenFile = None) -> None:
    """Stop a study. What it reached is kept; `resume` goes on from there."""
    _steer("stop", study, reason, consortium, token_file)


@app.command()
def resume(study: Study, reason: Reason = "", consortium: Folder = HERE, token_file: TokenFile = None) -> None:
    """Go on with a study that was stopped, from its last whole round."""
    _steer("resume", study, reason, consortium, token_file)


@app.command()
def watch(study: Study, consortium: Folder = HERE, token_file: TokenFile = None) -> None:
    """Follow a study, round by round, until it is finished or stopped."""
    with desk(consortium, token_file) as service:
        from cloister_server.pages import round_line, state_line
        from cloister_shared.control_pb2 import WatchRequest

        said = ""
        for reply in service.Watch(WatchRequest(study=study)):
            for each in reply.history:
                typer.echo(round_line(each, reply.rounds))
            if (line := state_line(reply)) != said:
                typer.echo(line)
                said = line


@app.command()
def readiness(
    study: Study,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    consortium: Folder = HERE,
) -> None:
    """Show what the hospitals hold, as they told it before training. On the coordinator's own machine."""
    with plain_errors():
        from cloister_server.folder import open_records, read_settings, record
        from cloister_server.readiness import as_json, of_study, page

        registry = open_records(consortium, read_settings(consortium))
        try:
            found, plan, table = of_study(registry, consortium, study)
        finally:
            registry.close()
        record(consortium, "the machine", "operator", "study readiness", found.digest, "done")
        if not json:
            typer.echo(f"{found.name} {found.digest[:16]}: what the hospitals hold\n")
        typer.echo(as_json(plan, table) if json else page(plan, table))


@app.command()
def export(
    study: Study,
    out: Annotated[Path, typer.Option(help="A new folder for the model.")] = Path("model"),
    consortium: Folder = HERE,
) -> None:
    """Write the final model of a finished study, signed, with its card. On the coordinator's own machine."""
    one_core()
    with plain_errors():
        from cloister_server.export import export as exported

        made = exported(consortium, study, out)
        typer.echo(f"The model of {made.study} ({made.digest[:12]}) is in {out}, signed by the consortium.")
        typer.echo(f"For other programs: {made.portable}.")
        typer.echo(f"A hospital of the consortium uses it with: cloister-site predict {out} ROWS.csv")


def _steer(verb: str, study: str, reason: str, consortium: Path, token_file: Path | None) -> None:
    with desk(consortium, token_file) as service:
        from cloister_server.pages import state_line
        from cloister_shared.control_pb2 import SteerRequest

        done = call(service.Steer, SteerRequest(study=study, verb=verb, reason=reason))
        typer.echo(state_line(done))
        if verb == "stop":
            typer.echo(f"To go on: cloister-coordinator study resume {done.digest[:12]}")
        else:
            typer.echo(f"To follow it: cloister-coordinator study watch {done.digest[:12]}")
