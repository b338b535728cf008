"""A consortium of invented hospitals for the figures: every process is real, and training costs next to nothing."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import yaml
from processes import children, words

from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend, read_plan
from cloister_simulations.deployment import HOSPITAL, OFFICER, CommandFailed, Consortium, until
from cloister_simulations.site_folder import Hospital, invented_names, write

FEATURES, PATIENTS = 30, 60


def plan_of(study: str, sites: int, rounds: int, **changes: object) -> StudyPlan:
    """A plan of one small local step and no noise, under the secure sum; ``changes`` as of ``amend``."""
    numbers = [{"name": f"x{at}", "kind": "number", "range": [-5, 5]} for at in range(FEATURES)]
    terms = {
        "study": study,
        "title": "Invented numbers",
        "task": {"name": "tabular", "model": "logistic"},
        "table": {"features": numbers, "target": {"name": "y", "positive": 1, "negative": 0}},
        "cohort": {"min_sites": max(3, sites - 1), "max_sites": sites, "min_patients": 20},
        "rounds": rounds,
        "strategy": {"name": "fedavg"},
        "aggregation": {"secure_sum": True, "weights": "equal"},
        "training": {"learning_rate": 0.1, "batch_size": 8, "local_steps": 1},
        "privacy": {"mechanism": "none"},
        "evaluation": {"holdout": 0.25},
    }
    return amend(read_plan(yaml.safe_dump(terms), study), **changes)


@contextmanager
def consortium(sites: int, hospital: str = HOSPITAL, agents: bool = True) -> Generator[Consortium, None, None]:
    """A coordinator that is up, and hospitals that are enrolled and have an officer; all is gone after the block.

    Whatever a process leaves among its temporary files is in ``temporary``.
    """
    with TemporaryDirectory(prefix="cloister-") as scratch:
        folder = Path(scratch)
        made = Consortium(folder, dict(_tables(folder / "hospitals", sites)), hospital)
        temporary(made).mkdir()
        made.environment["TMPDIR"] = str(temporary(made))
        with made:
            made.init()
            made.start()
            made.everywhere(lambda name: _join(made, name))
            for name in made.sites if agents else ():
                made.agent(name)
            yield made


def temporary(of: Consortium) -> Path:
    """Where its processes put their temporary files."""
    return of.folder / "tmp"


def agree(of: Consortium, plan: StudyPlan) -> None:
    """Submit a plan, and approve it everywhere."""
    of.submit(plan)
    of.everywhere(lambda name: of.approve(name, plan.study))


def run(of: Consortium, plan: StudyPlan, seconds: float) -> None:
    """Run a plan that is agreed upon to its end.

    Raises:
        CommandFailed: it does not finish in so many seconds; its own words follow.
    """
    of.coordinator("study", "run", plan.study)
    finish(of, plan, seconds)


def begin(of: Consortium, plan: StudyPlan) -> int:
    """Let a plan that is agreed upon be run; the process of its worker."""
    of.coordinator("study", "run", plan.study)
    until(lambda: bool(services(of, "worker")), 30, f"{plan.study} has a worker")
    return service(of, "worker")


def finish(of: Consortium, plan: StudyPlan, seconds: float) -> None:
    """Wait for the end of a study that runs.

    Raises:
        CommandFailed: it does not finish in so many seconds; its own words follow.
    """
    ended = of.wait(plan.study, seconds=seconds)
    if ended.state != "finished":
        raise CommandFailed(f"{plan.study} is {ended.state}: {ended.reason}")


def records(of: Consortium, plan: StudyPlan) -> list[Mapping[str, Any]]:
    """What the coordinator keeps of each round, in order."""
    return list(of.registry.rounds(plan.digest))


def between(found: Sequence[Mapping[str, Any]]) -> list[float]:
    """Seconds from the record of one round to the next: all that a round takes, the checkpoint too."""
    at = [moment(record) for record in found]
    return [later - earlier for earlier, later in pairwise(at)]


def moment(record: Mapping[str, Any]) -> float:
    """When a round was recorded, in seconds as ``time.time`` counts them."""
    return datetime.fromisoformat(record["at"]).timestamp()


def service(of: Consortium, name: str) -> int:
    """The process of the coordinator called ``rounds``, ``control``, ``pages`` or ``worker``.

    Raises:
        CommandFailed: there is none, or more than one.
    """
    found = services(of, name)
    if len(found) != 1:
        raise CommandFailed(f"The coordinator has {len(found)} processes called {name}.")
    return found[0]


def services(of: Consortium, name: str) -> list[int]:
    """All its processes of that name."""
    of_ours = ["cloister_server.coordinator", name]
    return [pid for pid in children(of.processes["coordinator"].pid) if words(pid)[2:4] == of_ours]


def _tables(folder: Path, sites: int) -> Generator[tuple[str, Path], None, None]:
    """Patients of numbers without meaning: half of them ill, who have a little more of everything."""
    for at, name in enumerate(invented_names(sites)):
        rng, ill = np.random.default_rng(at), np.arange(PATIENTS) % 2
        numbers = (rng.normal(size=(PATIENTS, FEATURES)) + ill[:, None] / 5).clip(-5, 5).round(3)
        table = pd.DataFrame(numbers, columns=[f"x{column}" for column in range(FEATURES)]).assign(y=ill)
        yield name, write(Hospital(name, table), folder / name, "table.csv")


def _join(of: Consortium, name: str) -> None:
    of.enrol(name)
    of.site(name, "budget", "officer", OFFICER, "--key", str(of.key(name)))
