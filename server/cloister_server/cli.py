"""The command of a consortium: ``cloister-coordinator``."""

from __future__ import annotations

from pathlib import Path

import typer

from cloister_shared.console import one_core, plain_errors, read_text

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def coordinator() -> None:
    """The coordinator of a consortium of hospitals.

    This version checks study plans. Running a study between organisations (enrolment, mutual TLS, approvals) is
    still to come; `cloister-sim run` runs the same coordinator and hospital code on one machine.
    """


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
