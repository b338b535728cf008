"""``cloister-site predict`` and ``explain``: a released model at work inside the hospital."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Annotated

import typer

from cloister_shared.console import one_core, plain_errors

if TYPE_CHECKING:
    from cloister_client.dataset import NewRows
    from cloister_client.released import Released

ModelFolder = Annotated[Path, typer.Argument(metavar="MODEL", help="The folder that was exported.")]
Data = Annotated[Path, typer.Argument(metavar="DATA", help="CSV or Parquet with the plan's columns, or a site.yaml.")]
SiteYaml = Annotated[Path, typer.Option("--site", help="The hospital's site.yaml; the agent's folder lies beside it.")]
Pinned = Annotated[
    Path | None, typer.Option(help="A roster of keys that may sign models; the pinned consortium's, if not given.")
]
State = Annotated[Path | None, typer.Option(help="The hospital's folder of the study, for layers that it kept.")]
HERE = Path("site.yaml")


def predict(
    model: ModelFolder,
    data: Data,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("predictions.csv"),
    site: SiteYaml = HERE,
    pinned: Pinned = None,
    state: State = None,
) -> None:
    """Score new rows with a released model: calibrated here, and unusual rows marked. Nothing leaves the hospital."""
    one_core()
    with plain_errors():
        released, rows = _opened(model, data, site, pinned, state)
        from cloister_client.predict import predict as scored
        from cloister_client.predict import told

        for line in told(released, scored(released, rows, out)):
            typer.echo(fill(line, 100))


def explain(
    model: ModelFolder,
    data: Data,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("explanation.csv"),
    site: SiteYaml = HERE,
    pinned: Pinned = None,
    state: State = None,
) -> None:
    """Say which features each row's score rests on, and which the model rests on at this hospital."""
    one_core()
    with plain_errors():
        released, rows = _opened(model, data, site, pinned, state)
        from cloister_client.explain import of_model, write
        from cloister_shared.outcomes.outcome import title

        write(released, rows, out)
        typer.echo(
            fill(f"How far each feature moved each row's score is in {out}, which its owner alone can read.", 100)
        )
        metric = title(released.network.objective.outcome.headline)
        if weights := of_model(released):
            typer.echo(f"\n{metric} on this hospital's held-out rows is worse by so much without a feature:")
            wide = max(map(len, weights))
            for name, lost in list(weights.items())[:20]:
                typer.echo(f"  {name:<{wide}}  {lost:+.4f}")
        else:
            typer.echo("Which features the model rests on cannot be told: too few held-out rows here.")


def _opened(model: Path, data: Path, site: Path, pinned: Path | None, state: Path | None) -> tuple[Released, NewRows]:
    from cloister_client.membership import agent_folder, consortium_of
    from cloister_client.offers import study_folder
    from cloister_client.released import open_released, read_new
    from cloister_shared.envelope import read_roster
    from cloister_shared.model_file import read

    if pinned:
        roster = read_roster(pinned)
    else:
        known = consortium_of(agent_folder(site))
        roster = {known.consortium: known.signing}
    found = read(model, roster)
    kept = state or study_folder(site.parent / "agent", found.manifest.digest)
    return open_released(found, site, kept), read_new(data, site, found.plan.table)
