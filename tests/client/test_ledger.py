"""cloister_client.ledger: what was spent stays spent, whoever asks again and whatever dies."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cloister_client.ceilings import officers_of, pin_officer
from cloister_client.ledger import Cost, Ledger, Release
from cloister_shared import budget
from cloister_shared.budget import Event, merged
from cloister_shared.envelope import read_identity
from cloister_shared.errors import BudgetExceeded, CloisterError, TicketRefused

EVENT = Event(noise_multiplier=10.0, sample_rate=1.0, steps=2)
DELTA = 1e-5
ONE, TWO, THREE = (budget.epsilon([EVENT] * rounds, DELTA) for rounds in (1, 2, 3))


CHARGES = [Event(10.0, 1.0, 6), Event(10.0, 1.0, 2, purpose="statistics"), Event(20.0, 1.0, 1, purpose="statistics")]
"""What plan-1 has reserved: more than any of these tests spends, so that the plan's own epsilon is the end."""


def opened(folder: Path, epsilon: float | None = 4.0, population: str = "patients") -> Path:
    """A hospital's folder with an officer, and a ceiling if there is an ``epsilon``; the ledger's path."""
    folder.mkdir(exist_ok=True)
    ledger = Ledger(folder / "ledger.sqlite", population)
    if "ada" not in officers_of(folder):
        pin_officer(ledger.book, "ada", folder / "ada.key")
    if epsilon:
        ledger.set_ceiling(epsilon, DELTA, officer="ada", identity=read_identity(folder / "ada.key"))
    ledger.close()
    return folder / "ledger.sqlite"


def reserve(ledger: Ledger, plan: str = "plan-1", charges: list[Event] = CHARGES, epsilon: float = 4.0) -> None:
    ledger.reserve(Cost(plan, f"study of {plan}", tuple(merged(charges)), epsilon, DELTA, rounds=3))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = opened(tmp_path)
    ledger = Ledger(path)
    reserve(ledger)
    ledger.close()
    return path


def commit(ledger: Ledger, number: int = 1, ticket: str = "t1", event: Event = EVENT, epsilon: float = 3.0) -> None:
    ledger.commit(Release("plan-1", "run-1", number, ticket, event), epsilon=epsilon, delta=DELTA)


def in_a_child(work: Callable[[], None]) -> int:
    """The signal or status that ended a process which did ``work`` and then ended itself with SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_commitment_outlives_its_handle(path):
    ledger = Ledger(path)
    commit(ledger, 1, "t1")
    commit(ledger, 0, "t0", Event(20.0, 1.0, 1, purpose="statistics"))
    ledger.close()
    assert Ledger(path).history("plan-1") == [EVENT, Event(20.0, 1.0, 1, purpose="statistics")]


def test_the_file_is_flushed_at_every_commitment(path):
    """synchronous = FULL with a write-ahead log: SQLite calls fsync before a commit returns."""
    ledger = Ledger(path)
    assert ledger.book.database.execute("PRAGMA synchronous").fetchone() == (2,)
    assert ledger.book.database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_process_killed_right_after_a_commitment_has_spent_it(path):
    assert in_a_child(lambda: commit(Ledger(path))) == -signal.SIGKILL
    ledger = Ledger(path)
    assert ledger.history("plan-1") == [EVENT]
    commit(ledger)  # the same ticket again: nothing had left the hospital
    assert ledger.history("plan-1") == [EVENT]
    with pytest.raises(TicketRefused):
        commit(ledger, ticket="another")


def test_a_process_killed_within_a_commitment_leaves_no_lock_and_no_event(path, monkeypatch):
    def die(*_: object) -> float:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0.0

    with monkeypatch.context() as patched:
        patched.setattr(budget, "epsilon", die)
        assert in_a_child(lambda: commit(Ledger(path))) == -signal.SIGKILL
    ledger = Ledger(path)
    assert ledger.history("plan-1") == []
    commit(ledger)
    assert ledger.history("plan-1") == [EVENT]


def test_the_same_ticket_costs_once(path):
    ledger = Ledger(path)
    for _ in range(3):
        commit(ledger, epsilon=ONE)
    assert ledger.history("plan-1") == [EVENT]


def test_another_ticket_for_the_same_round_is_refused(path):
    ledger = Ledger(path)
    commit(ledger)
    with pytest.raises(TicketRefused, match="Round 1 was already answered for another model"):
        commit(ledger, ticket="t2")
    assert ledger.history("plan-1") == [EVENT]


def test_a_round_may_hold_one_event_of_each_purpose(path):
    ledger = Ledger(path)
    commit(ledger)
    commit(ledger, ticket="t2", event=Event(10.0, 1.0, 2, purpose="statistics"))
    assert [event.purpose for event in ledger.history("plan-1")] == ["training", "statistics"]


def test_the_plans_epsilon_is_the_end(path):
    """Two rounds fit to the last digit; the third would pass the cap, and leaves no trace."""
    ledger = Ledger(path)
    commit(ledger, 1, "t1", epsilon=TWO)
    commit(ledger, 2, "t2", epsilon=TWO)
    with pytest.raises(BudgetExceeded, match=rf"Round 3 would take epsilon to {THREE:.4g}; the plan allows {TWO:.4g}"):
        commit(ledger, 3, "t3", epsilon=TWO)
    assert ledger.history("plan-1") == [EVENT, EVENT]
    commit(ledger, 3, "t3", epsilon=THREE)


def test_two_handles_see_one_budget(path):
    one, other = Ledger(path), Ledger(path)
    commit(one, 1, "t1", epsilon=TWO)
    commit(other, 2, "t2", epsilon=TWO)
    assert one.history("plan-1") == other.history("plan-1") == [EVENT, EVENT]
    for ledger in (one, other):
        with pytest.raises(BudgetExceeded):
            commit(ledger, 3, "t3", epsilon=TWO)
        with pytest.raises(TicketRefused):
            commit(ledger, 2, "t1", epsilon=TWO)


def test_processes_that_race_cannot_both_have_the_last_of_the_budget(path, monkeypatch):
    """Each of eight asks for a round of its own, while the others think; only two fit."""
    Ledger(path).close()
    price = budget.epsilon

    def slowly(history: list[Event], delta: float) -> float:
        time.sleep(0.03)
        return price(history, delta)

    monkeypatch.setattr(budget, "epsilon", slowly)
    children = []
    for number in range(1, 9):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                commit(Ledger(path), number, f"t{number}", epsilon=TWO)
                status = 0
            except CloisterError:
                status = 3
            finally:
                os._exit(status)
        children.append(child)
    ended = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert ended == [0, 0, 3, 3, 3, 3, 3, 3]
    assert Ledger(path).history("plan-1") == [EVENT, EVENT]
