"""``cloister-sim consortium``: a coordinator and five hospitals as real processes, from first key to last round.

Every step is a command that a person would type; here this machine types all of them. The study runs twice: once as it
would among organisations, and once with noise that can be drawn again, so that the model can be held against
the one that the in-process engine makes of the same plan.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister_client.connectors.connector import open_records
from cloister_client.dataset import load_dataset
from cloister_client.site import Site
from cloister_client.site_file import read_site
from cloister_server.app import Finished, Notice, server_app
from cloister_server.records import Study
from cloister_server.store import Store
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend
from cloister_simulations.deployed_hospital import COMPARED, SEED
from cloister_simulations.deployment import Consortium
from cloister_simulations.engines import in_process
from cloister_simulations.hospitals import build
from cloister_simulations.scenario import read_scenario
from cloister_simulations.site_folder import enrol_all

Say = Callable[[str, float], None]
"""Told what was done, and the seconds that it took."""


@dataclass
class Shown:
    """What the demonstration came to."""

    studies: list[Study] = field(default_factory=list[Study])
    rounds: list[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])
    """Of the first study."""
    spent: dict[str, str] = field(default_factory=dict[str, str])
    """Of each hospital's budget, as its ledger says."""
    difference: float = float("inf")
    """Largest difference between a parameter of the deployed model and of the in-process engine's."""
    parameters: int = 0
    seconds: float = 0.0


def demonstrate(folder: Path, scenario: str, rounds: int, say: Say) -> Shown:
    """Set up the consortium, run both studies, compare; every process is ended at the end.

    Raises:
        CloisterError: a step failed; says which command, and its words.
    """
    shown, began, read = Shown(), time.monotonic(), read_scenario(scenario)
    plan = amend(read.plan, rounds=rounds, study=f"{read.plan.study}-deployed")
    compared = amend(plan, study=f"{read.plan.study}{COMPARED}")
    sites = {read_site(path).site: path for path in build(read.simulation.hospitals, folder / "hospitals")}
    steps = _steps(say)
    with Consortium(folder, sites) as consortium:
        with steps("an authority, keys, a configuration, a first account"):
            consortium.init()
        with steps("the coordinator is up: rounds, control, admin and pages, each under TLS"):
            consortium.start()
        with steps(f"{len(sites)} hospitals enrolled, each with a key of its own; an officer at each signed a ceiling"):
            consortium.everywhere(lambda name: _join(consortium, name, plan))
        with steps("their agents are up"):
            for name in sites:
                consortium.agent(name)
        for terms in (plan, compared):
            with steps(f"{terms.study} is submitted, and approved by an officer at each hospital"):
                consortium.submit(terms)
                consortium.everywhere(lambda name, study=terms.study: consortium.approve(name, study))
            with steps(f"{terms.study}: {rounds} rounds, under the secure sum and differential privacy"):
                consortium.coordinator("study", "run", terms.study)
                shown.studies.append(consortium.wait(terms.study))
        shown.rounds = list(consortium.registry.rounds(plan.digest))
        shown.spent = {name: _line(consortium.site(name, "budget", "show"), "Spent") for name in sites}
        deployed = consortium.model(compared)
    with steps("the same study by the in-process engine"):
        here = trained_here(compared, sites, folder / "in-process")
    shown.difference, shown.parameters = float(np.abs(deployed - here).max()), deployed.size
    shown.seconds = time.monotonic() - began
    return shown


def told(shown: Shown, folder: Path) -> str:
    """What came out, for a terminal of 100 columns."""
    first = shown.studies[0]
    lines = [f"\n{study.name}: {study.state}. {study.reason}" for study in shown.studies]
    lines.append("\nround  took part  seconds  loss (mean over hospitals)")
    for record in shown.rounds:
        loss = record["numbers"].get("loss")
        seen = "" if loss is None else f"{loss:.4f}"
        lines.append(f"{record['round']:5d}  {len(record['answered']):9d}  {record['seconds']:7.2f}  {seen}")
    lines.append("\nspent at each hospital, by its own ledger, on both studies:")
    lines += [f"  {site}: {spent}" for site, spent in sorted(shown.spent.items())]
    same = "the same, bit for bit" if shown.difference == 0 else f"{shown.difference:.3g} apart"
    lines += [
        f"\nThe model of the compared study, {shown.parameters} parameters, and the in-process engine's: {same}.",
        f"All of it took {shown.seconds:.0f} s.",
        f"\nLook at {folder}: consortium/ is the coordinator's, hospitals/ has a folder for each hospital.",
        f"  cloister-coordinator study watch {first.name} --consortium {folder / 'consortium'}",
        "  cloister-site studies --site HOSPITAL/site.yaml        what its people saw and signed",
        "  cloister-site egress --site HOSPITAL/site.yaml         every message that left",
    ]
    return "\n".join(fill(line, 100, subsequent_indent="    ") if len(line) > 100 else line for line in lines)


def trained_here(
    plan: StudyPlan, sites: Mapping[str, Path], folder: Path, notice: Notice = lambda record: None
) -> NDArray[np.float32]:
    """The model that the in-process engine makes of a plan, with noise from ``SEED``."""
    enrol_all(folder, list(sites), plan)
    ended: list[Finished] = []
    opened = {
        name: Site(plan, load_dataset(open_records(path), plan), folder / "sites" / name, noise_seed=SEED)
        for name, path in sites.items()
    }
    in_process(server_app(plan, Store(folder), ended.append, notice), opened, ())
    return ended[0].checkpoint.model


def _line(page: str, term: str) -> str:
    return next(line.removeprefix(term).strip() for line in page.splitlines() if line.startswith(term))


def _join(consortium: Consortium, name: str, plan: StudyPlan) -> None:
    consortium.enrol(name)
    if plan.private:
        # Both studies must fit; what is left over shows in the budget.
        consortium.grant(name, epsilon=3 * (plan.privacy.epsilon or 0.0), delta=plan.privacy.delta or 1e-5)


@contextmanager
def _step(say: Say, what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    say(what, time.monotonic() - began)


def _steps(say: Say) -> Callable[[str], Any]:
    return lambda what: _step(say, what)
