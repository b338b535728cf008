"""``cloister-sim consortium``: a coordinator and a scenario's hospitals as real processes, first key to last round.

Every step is a command that a person would type; here this machine types all of them. The study's noise can be drawn
again, so that the model can be held against the one that the in-process engine makes of the same plan; with noise as it
is among organisations no two runs are alike, and there is nothing to hold it against.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
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
from cloister_shared.errors import PlanRefused
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend
from cloister_simulations.deployed_hospital import COMPARED, SEED
from cloister_simulations.deployment import CommandFailed, Consortium
from cloister_simulations.engines import in_process
from cloister_simulations.hospitals import build
from cloister_simulations.scenario import read_scenario
from cloister_simulations.site_folder import enrol_all

_AGENTS = ("agent", "audit", "invite", "ledger", "officer", "officers", "site")
"""Of a hospital's folder, what enrolment, officers and the agent leave there, by the names' beginnings."""

Say = Callable[[str, float], None]
"""Told what was done, and the seconds that it took."""


@dataclass
class Shown:
    """What the demonstration came to."""

    study: Study
    plan: StudyPlan
    sites: Mapping[str, Path]
    rounds: list[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])
    spent: dict[str, str] = field(default_factory=dict[str, str])
    """Of each hospital's budget, as its ledger says."""
    difference: float | None = None
    """Largest difference between a parameter of the deployed model and of the in-process engine's, if compared."""
    parameters: int = 0
    seconds: float = 0.0


def demonstrate(folder: Path, scenario: str, rounds: int, say: Say, *, fresh: bool = False) -> Shown:
    """Set up the consortium, run the study, compare; every process is ended at the end.

    ``fresh``: noise as it is among organisations, and so without comparison.

    Raises:
        CloisterError: a step failed; says which command, and its words.
    """
    began, read = time.monotonic(), read_scenario(scenario)
    if read.simulation.pretrained:
        raise PlanRefused(
            f"{read.name} begins from public weights, which nobody hands out here.",
            mend=f"Run it by cloister-sim run {scenario}, or take pretrained out.",
        )
    plan = amend(read.plan, rounds=rounds, study=f"{read.plan.study[:50]}{'-deployed' if fresh else COMPARED}")
    built = build(read.simulation.hospitals, folder / "hospitals")
    sites = {read_site(path).site: own(path, folder / "hospitals") for path in built}
    steps = _steps(say)
    with ThreadPoolExecutor(1) as beside, Consortium(folder, sites) as consortium:
        # Of the hospitals' tables and the plan alone, so that it need not wait for the consortium.
        here = None if fresh else beside.submit(trained_here, plan, sites, folder / "in-process")
        with steps("an authority, keys, a configuration, a first account"):
            consortium.init()
        with steps("the coordinator is up: rounds, control, admin and pages, each under TLS"):
            consortium.start()
        officer = "; an officer at each signed a ceiling" if plan.private else " and an officer"
        with steps(f"{len(sites)} hospitals enrolled, each with a key of its own{officer}"):
            consortium.everywhere(lambda name: _join(consortium, name, plan))
        with steps("their agents are up"):
            for name in sites:
                consortium.agent(name)
        with steps(f"{plan.study} is submitted, and approved by an officer at each hospital"):
            consortium.submit(plan)
            consortium.everywhere(lambda name: consortium.approve(name, plan.study))
        with steps(f"{plan.study}: {rounds} {'round' if rounds == 1 else 'rounds'}{_under(plan)}"):
            consortium.coordinator("study", "run", plan.study)
            shown = Shown(consortium.wait(plan.study, seconds=rounds * plan.round_timeout), plan, sites)
            if shown.study.state != "finished":
                raise CommandFailed(f"{plan.study} is {shown.study.state}. {shown.study.reason}")
        shown.rounds = list(consortium.registry.rounds(plan.digest))
        if plan.private:
            spent = consortium.everywhere(lambda name: _line(consortium.site(name, "budget", "show"), "Spent"))
            shown.spent = dict(zip(sites, spent, strict=True))
        deployed = consortium.model(plan)
        shown.parameters = deployed.size
        if here:
            with steps("the same study by the in-process engine, which had begun beside it"):
                shown.difference = float(np.abs(deployed - here.result()).max())
    shown.seconds = time.monotonic() - began
    return shown


def told(shown: Shown, folder: Path) -> str:
    """What came out, for a terminal of 100 columns."""
    lines = ["", fill(f"{shown.study.name}: {shown.study.state}. {shown.study.reason}", 100)]
    lines.append("\nround  took part  seconds  loss (mean over hospitals)")
    for record in shown.rounds:
        loss = record["numbers"].get("loss")
        seen = "" if loss is None else f"{loss:.4f}"
        lines.append(f"{record['round']:5d}  {len(record['answered']):9d}  {record['seconds']:7.2f}  {seen}")
    if shown.spent:
        lines.append("\nspent at each hospital, by its own ledger:")
        lines += [f"  {site}: {spent}" for site, spent in sorted(shown.spent.items())]
    if shown.difference is not None:
        same = "the same, bit for bit" if shown.difference == 0 else f"{shown.difference:.3g} apart"
        lines.append(f"\nThe model, {shown.parameters} parameters, and the in-process engine's: {same}.")
        if shown.plan.private:
            seeded = "To compare them, noise was drawn from a seed that is public: of patients it would protect nobody."
            lines.append(fill(f"{seeded} --fresh-noise draws it as hospitals do.", 100))
    lines += [
        f"\nAll of it took {shown.seconds:.0f} s.",
        f"\nLook at {folder}:",
        "consortium/ is the coordinator's, hospitals/ has a folder for each hospital.",
        f"  cloister-coordinator study watch {shown.study.name} \\\n      --consortium {folder / 'consortium'}",
        "  cloister-site studies --site HOSPITAL/site.yaml        what its people saw and signed",
        "  cloister-site egress --site HOSPITAL/site.yaml         every message that left",
    ]
    return "\n".join(lines)


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


def own(site_yaml: Path, hospitals: Path) -> Path:
    """A hospital's ``site.yaml`` in a folder of its own: keys and ledgers of a demonstration lie beside nobody's own.

    What was not built there is seen from there: the records are linked, and nothing of an agent's is.
    """
    if site_yaml.is_relative_to(hospitals):
        return site_yaml
    place = hospitals / read_site(site_yaml).site
    place.mkdir(parents=True, exist_ok=True)
    for beside in site_yaml.resolve().parent.iterdir():
        if beside.name.split(".")[0] not in _AGENTS and not (place / beside.name).exists():
            (place / beside.name).symlink_to(beside)
    return Path(shutil.copyfile(site_yaml, place / "site.yaml"))


def _under(plan: StudyPlan) -> str:
    """What protects the rounds."""
    under = ["the secure sum"] * plan.aggregation.secure_sum + ["differential privacy"] * plan.private
    return f", under {' and '.join(under)}" if under else ""


def _line(page: str, term: str) -> str:
    return next(line.removeprefix(term).strip() for line in page.splitlines() if line.startswith(term))


def _join(consortium: Consortium, name: str, plan: StudyPlan) -> None:
    consortium.enrol(name)
    consortium.officer(name)
    if plan.private:
        # What is left over shows in the budget.
        consortium.grant(name, epsilon=2 * (plan.privacy.epsilon or 0.0), delta=plan.privacy.delta or 1e-5)


@contextmanager
def _step(say: Say, what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    say(what, time.monotonic() - began)


def _steps(say: Say) -> Callable[[str], Any]:
    return lambda what: _step(say, what)
