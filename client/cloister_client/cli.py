"""The command of a hospital: ``cloister-site``."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

import typer

from cloister_client import (
    budget_commands,
    consortium_commands,
    lineage_commands,
    model_commands,
    records_commands,
    study_commands,
)
from cloister_shared.console import one_core, plain_errors, read_text

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True, pretty_exceptions_enable=False)

app.add_typer(budget_commands.app, name="budget")


for command in (
    consortium_commands.enrol,
    consortium_commands.doctor,
    consortium_commands.start,
    study_commands.studies,
    study_commands.show,
    study_commands.approve,
    study_commands.reject,
    study_commands.revoke,
    model_commands.predict,
    model_commands.explain,
    consortium_commands.peers,
    consortium_commands.egress,
    consortium_commands.service,
    consortium_commands.renew,
    consortium_commands.leave,
    records_commands.map_,
    records_commands.fetch,
    lineage_commands.lineage,
):
    app.command(command.__name__.rstrip("_"))(command)


@app.callback()
def site() -> None:
    """The agent at a hospital: what it takes part in is decided here, and what leaves is written down here.

    First `enrol` with the consortium's invite, then `doctor`, name an officer and set a ceiling (`budget`), and
    `start`. Studies arrive by themselves: `studies`, `show`, then `approve` or `reject`; `revoke` ends one at any time.
    """


@app.command()
def check(plan: Path, site: Path) -> None:
    """Hold this hospital's table (its site.yaml) against a plan: the data-quality report, for your eyes only."""
    one_core()
    with plain_errors():
        from cloister_client.connectors.connector import open_records
        from cloister_client.dataset import load_dataset
        from cloister_shared.plan_file import read_plan
        from cloister_shared.plan_text import summary, turned_off

        terms = read_plan(read_text(plan), plan.name)
        dataset = load_dataset(open_records(site), terms)
        typer.echo(summary(terms))
        for sentence in turned_off(terms):
            typer.secho(sentence, fg="red", bold=True)
        typer.echo()
        for line in dataset.quality.page().splitlines():
            typer.echo(fill(line, 100, subsequent_indent="    "))
        typer.echo(f"\n{len(dataset.train)} rows would train and {len(dataset.test)} judge the model.")
        if terms.private:
            from cloister_client.privacy import Units
            from cloister_shared.charges import training_event

            unit = terms.privacy.unit or "record"
            event = training_event(terms, len(Units.of(dataset.train, unit)))
            whole = "the noise of all hospitals together is" if terms.shared_noise else "the noise is"
            drawn = "one release" if unit == "site" else f"a {unit} drawn with chance {event.sample_rate:.3g}"
            said = f"{terms.rounds * event.steps} steps, in each {drawn}"
            typer.echo(fill(f"{said}; {whole} {event.noise_multiplier:.3g} times the clip norm.", 100))


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
