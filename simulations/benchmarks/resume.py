"""Kill the coordinator and its hospitals at a random moment of every round, then resume.

A fresh process imports everything once and forks each run from there. A child is killed (SIGKILL) at a
random moment after the line of the round before appears in ``rounds.jsonl``; a second child resumes and
ends the run. Without privacy the final model must equal the uninterrupted one bit for bit. With it, each
hospital's epsilon must equal the uninterrupted run's, and its ledger must hold one event a round. All
hospitals live in the killed process, so each of them is killed too, wherever it was.

    python simulations/benchmarks/resume.py    prints what was survived as JSON
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import statistics
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from figures import Figure, in_fresh_process, progress

from cloister_client.connectors.connector import open_records
from cloister_client.dataset import Dataset, load_dataset
from cloister_client.ledger import Ledger
from cloister_server.store import Store
from cloister_shared import budget
from cloister_shared.charges import training_event
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend
from cloister_simulations.federation import Arm, Options, plan_for, run_federated
from cloister_simulations.hospitals import build
from cloister_simulations.scenario import read_scenario

ROUNDS, REPEATS, PATIENCE = 5, 3, 60.0
ARMS = {"plain": Arm("federated"), "private": Arm("private", 3.0)}


def figures() -> list[Figure]:
    progress(f"resume: {len(ARMS) * ROUNDS * REPEATS} runs killed and resumed")
    found: dict[str, tuple[int, int]] = in_fresh_process(__file__)
    words = {"plain": "same model", "private": "same epsilon"}
    return [
        Figure(
            f"resume.{arm}",
            f"{survived} of {tried} kills, {words[arm]}",
            survived / tried,
            "all",
            survived == tried == ROUNDS * REPEATS,
        )
        for arm, (survived, tried) in found.items()
    ]


@dataclass(frozen=True)
class Ended:
    """What is compared of a finished run. With privacy no two models are alike, so the model is left out."""

    round: int
    model: str
    epsilons: dict[str, float]
    events: dict[str, int]
    """How many its ledger holds, for each hospital."""


def measure(folder: Path) -> dict[str, tuple[int, int]]:
    """For each arm: kills survived, kills tried."""
    scenario, chance = read_scenario("breast-cancer"), random.Random(0)
    plans = {name: amend(plan_for(scenario.plan, arm, 0), rounds=ROUNDS) for name, arm in ARMS.items()}
    paths = build(scenario.simulation.hospitals, folder / "hospitals")
    datasets = {path.parent.name: load_dataset(open_records(path), plans["plain"]) for path in paths}
    _warm(plans["private"], datasets)
    found: dict[str, tuple[int, int]] = {}
    for name, plan in plans.items():
        whole = folder / name / "whole"
        assert _wait(_start(plan, datasets, whole)) == 0
        wanted = ended(plan, whole)
        assert all(events == ROUNDS for events in wanted.events.values())
        duration = statistics.median(record["seconds"] for record in Store(whole).rounds())
        survived, tried = 0, 0
        for number in [number for number in range(1, ROUNDS + 1) for _ in range(REPEATS)]:
            place = folder / name / f"{number}-{tried}"
            while not _killed_in(number, plan, datasets, place, chance.uniform(0, duration)):
                place = place.with_name(place.name + "-again")
            tried += 1
            survived += _wait(_start(plan, datasets, place)) == 0 and ended(plan, place) == wanted
        found[name] = survived, tried
    return found


def _warm(plan: StudyPlan, datasets: dict[str, Dataset]) -> None:
    """Pay for slow imports and calibration once. No gradient is taken: torch's engine does not fork."""
    import opacus.grad_sample
    import opacus.optimizers  # noqa: F401

    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0).step()
    for dataset in datasets.values():
        training_event(plan, len(dataset.train))


def _start(plan: StudyPlan, datasets: dict[str, Dataset], folder: Path) -> int:
    """Fork a child that begins or resumes the run in ``folder``; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        run_federated(plan, datasets, Arm("federated"), folder, Options(folder, resume=True), lambda *_: None)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _wait(child: int) -> int:
    """The child's exit code; negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _killed_in(number: int, plan: StudyPlan, datasets: dict[str, Dataset], folder: Path, after: float) -> bool:
    """Kill a new run ``after`` seconds of round ``number``; False if it was done before that."""
    child, began = _start(plan, datasets, folder), time.monotonic()
    while not _begun(number, folder) and time.monotonic() - began < PATIENCE:
        time.sleep(0.0005)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    return _wait(child) == -signal.SIGKILL


def _begun(number: int, folder: Path) -> bool:
    """Whether a round has begun: the study is open and the lines of the rounds before are written."""
    checkpoint, lines = folder / "checkpoint.safetensors", folder / "rounds.jsonl"
    return checkpoint.exists() and number - 1 <= (lines.read_bytes().count(b"\n") if lines.exists() else 0)


def ended(plan: StudyPlan, folder: Path) -> Ended:
    """Read back what a finished run left on disk."""
    checkpoint = Store(folder).load(plan.digest)
    assert checkpoint
    model = "" if plan.private else hashlib.sha256(checkpoint.model.tobytes()).hexdigest()
    epsilons: dict[str, float] = {}
    events: dict[str, int] = {}
    for path in sorted(folder.glob("sites/*/ledger.sqlite")):
        ledger = Ledger(path)
        history = ledger.history(plan.digest)
        ledger.close()
        epsilons[path.parent.name] = budget.epsilon(history, plan.privacy.delta or 0.0)
        events[path.parent.name] = len(history)
    return Ended(checkpoint.round, model, epsilons, events)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(Path(scratch))))
