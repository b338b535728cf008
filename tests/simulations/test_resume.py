"""Killed with SIGKILL at every durable write there is, a run that is resumed ends like one that was not."""

import json
import os
import signal
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cloister_client.ledger import Ledger
from cloister_server.store import Checkpoint, Store
from cloister_shared import durable
from cloister_shared.plan_file import amend
from cloister_simulations import site_folder
from cloister_simulations.federation import Arm, Options, arms_of, compare, plan_for
from cloister_simulations.scenario import Scenario


def in_a_child(work: Callable[[], object]) -> bool:
    """Run in a forked process; False if it was killed. An exception there fails the test here."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


def killing(kills: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process die at its first, second or third durable write, by turns before and after it."""
    nth, before, writes, safe = 1 + kills % 3, kills % 2 == 1, 0, False

    def die_if(now: bool) -> None:
        if now and writes == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **named: Any) -> Any:
            nonlocal writes
            if safe:
                return write(*args, **named)
            writes += 1
            die_if(before and nth > 1)
            done = write(*args, **named)
            die_if(not before or nth == 1)
            return done

        return wrapped

    def in_peace(grant: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*args: Any) -> None:
            nonlocal safe
            safe = True
            grant(*args)
            safe = False

        return wrapped

    # The writes of a ceiling are walked in test_ledger; here they would take half of the time.
    monkeypatch.setattr(site_folder, "grant", in_peace(site_folder.grant))
    monkeypatch.setattr(durable, "replace", around(durable.replace))
    monkeypatch.setattr(Ledger, "commit", around(Ledger.commit))


def final(scenario: Scenario, folder: Path, arm: Arm) -> Checkpoint:
    plan = plan_for(scenario.plan, arm, 0)
    checkpoint = Store(folder / "seed-0" / arm.folder).load(plan.digest)
    assert checkpoint
    return checkpoint


def ledgers(folder: Path, arm: Arm) -> dict[str, list[tuple[Any, ...]]]:
    found = {}
    for path in sorted((folder / "seed-0" / arm.folder / "sites").glob("*/ledger.sqlite")):
        rows = sqlite3.connect(path).execute("SELECT round, noise_multiplier, sample_rate, steps FROM releases")
        found[path.parent.name] = sorted(rows.fetchall())
    return found


KINDS = {
    "federated": {},
    "private": {"rounds": 2},
    "private, of four rounds": {},
    "scaffold": {"strategy": {"name": "scaffold"}},
    "local layers": {
        "task": {"model": "mlp", "hidden": [4], "norm": "batch"},
        "personalisation": {"local_layers": ["norm"]},
    },
    "ditto": {"personalisation": {"ditto": {"lam": 0.5, "steps": 2}}},
}


@pytest.mark.parametrize(
    "kind", ["private", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "private")]
)
def test_killed_at_every_write(small, folder, kind):
    arm = next(arm for arm in arms_of(small) if arm.kind == ("private" if kind.startswith("private") else "federated"))
    changes = KINDS[kind]
    if arm.kind == "federated":
        changes = {
            "privacy": dict.fromkeys(("unit", "epsilon", "delta", "clip_norm")) | {"mechanism": "none"}
        } | changes
    scenario = small.model_copy(update={"plan": amend(small.plan, **changes)})
    straight, killed = folder / "straight", folder / "killed"
    whole = compare(scenario, Options(straight, arms=(arm.kind,))).results[0]

    def work(kills: int) -> None:
        killing(kills, pytest.MonkeyPatch())
        compare(scenario, Options(killed, arms=(arm.kind,), resume=True))

    kills = 0
    while not in_a_child(partial(work, kills)):
        kills += 1
        assert kills < 100
    assert kills >= scenario.plan.rounds  # at least one in every round

    result = json.loads((killed / "seed-0" / arm.folder / "result.json").read_text())
    assert final(scenario, killed, arm).round == scenario.plan.rounds
    done = [record["round"] for record in Store(killed / "seed-0" / arm.folder).rounds()]
    assert done == [*range(1, scenario.plan.rounds + 1)]
    if arm.kind == "private":
        assert result["epsilon"] == whole.epsilon
        assert ledgers(killed, arm) == ledgers(straight, arm)
        assert all(len(rows) == scenario.plan.rounds for rows in ledgers(killed, arm).values())
    else:
        assert final(scenario, killed, arm).model.tobytes() == final(scenario, straight, arm).model.tobytes()
