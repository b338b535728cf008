"""cloister_client.ledger: what was spent stays spent, whoever asks again and whatever dies."""

import base64
import json
import math
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloister_client.ceilings import officers_of, pin_officer
from cloister_client.ledger import Cost, Ledger, Release
from cloister_shared import budget
from cloister_shared.budget import Event, merged
from cloister_shared.envelope import new_identity, read_identity, save_roster
from cloister_shared.errors import BudgetExceeded, CloisterError, EnvelopeRefused, LedgerBroken, TicketRefused

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


# --- reserve, settle, recover ------------------------------------------------------------------------------
PART = [Event(10.0, 1.0, 6)]
CEILING = budget.epsilon([Event(10.0, 1.0, 13)], DELTA)
"""Admits two plans of ``PART``, and not three."""


@pytest.fixture
def shared(tmp_path: Path) -> Ledger:
    """A hospital whose ceiling admits two plans of ``PART``."""
    return Ledger(opened(tmp_path / "shared", CEILING))


def steps(events: list[Event]) -> int:
    return sum(event.steps for event in events)


def told(ledger: Ledger) -> list[str]:
    return [entry.what.removeprefix("budget.") for entry in ledger.book.told()]


def test_without_a_ceiling_nothing_is_reserved_or_released(tmp_path):
    ledger = Ledger(opened(tmp_path / "none", None))
    with pytest.raises(BudgetExceeded, match=r"No ceiling is set for the patients .* cloister-site budget ceiling"):
        reserve(ledger)
    with pytest.raises(BudgetExceeded, match="has no open reservation"):
        commit(ledger)
    assert ledger.counted() == []


def test_a_plan_counts_in_full_from_its_reservation_on(shared):
    reserve(shared, "plan-1", PART)
    assert (steps(shared.counted()), steps(shared.spent())) == (6, 0)
    commit(shared)
    assert (steps(shared.counted()), steps(shared.spent())) == (6, 2)
    shared.settle("plan-1")
    assert steps(shared.counted()) == steps(shared.spent()) == 2
    assert told(shared)[-2:] == ["reserved", "closed"]


def test_the_same_plan_is_reserved_once(shared):
    for _ in range(3):
        reserve(shared, "plan-1", PART)
    assert len(shared.reservations()) == 1
    assert told(shared).count("reserved") == 1


def test_other_charges_for_a_reserved_plan_are_refused(shared):
    reserve(shared, "plan-1", PART)
    with pytest.raises(TicketRefused, match="reserved with other charges"):
        reserve(shared, "plan-1", [Event(11.0, 1.0, 6)])
    shared.settle("plan-1")
    with pytest.raises(TicketRefused, match="reserved with other charges"):
        reserve(shared, "plan-1", [Event(11.0, 1.0, 6)])
    assert told(shared).count("refused") == 2


def test_what_was_approved_is_what_is_reserved(shared):
    cost = Cost("plan-1", "first", tuple(PART), 3.0, DELTA, rounds=3)
    for other in (replace(cost, plan="plan-2"), replace(cost, charges=(Event(10.0, 1.0, 5),))):
        with pytest.raises(TicketRefused, match="is not what was approved"):
            shared.reserve(other, approved=cost.digest)
    shared.reserve(cost, approved=cost.digest)


def test_a_plan_that_costs_more_than_it_promises_is_refused(shared):
    with pytest.raises(BudgetExceeded, match=r"would cost epsilon .* here; its plan allows 0\.5"):
        reserve(shared, "plan-1", PART, epsilon=0.5)


def test_a_refusal_says_asked_spent_ceiling_and_what_would_fit(shared):
    reserve(shared, "plan-1", [Event(10.0, 1.0, 8)])
    commit(shared)
    with pytest.raises(BudgetExceeded) as refused:
        reserve(shared, "plan-2", PART)
    one, six, eight = (budget.epsilon([Event(10.0, 1.0, n)], DELTA) for n in (2, 6, 8))
    said = str(refused.value)
    assert f"asks for epsilon {six:.3g}" in said
    assert f"have spent {one:.3g} ({eight:.3g} with what is reserved)" in said
    assert f"the ceiling is {CEILING:.4g} at delta 1e-05" in said
    assert "2 of its 3 rounds with this noise" in said  # 8 and 4 steps of 13, but not 8 and 6
    assert float(said.split("with more noise, at epsilon ")[1].split(". ", 1)[0]) < six
    assert "nothing" not in said
    assert refused.value.abroad
    assert "spent" not in refused.value.abroad  # what other studies cost is the hospital's own affair
    reserve(shared, "plan-2", [Event(10.0, 1.0, 4)])


def test_the_same_refusals_are_told_once(shared):
    for number in (1, 2, 1, 2):
        with pytest.raises(BudgetExceeded):
            reserve(shared, f"plan-{number}", [Event(1.0, 1.0, 6)], epsilon=100.0)
    assert told(shared).count("refused") == 2
    reserve(shared, "plan-3", PART)
    with pytest.raises(BudgetExceeded):
        reserve(shared, "plan-1", [Event(1.0, 1.0, 6)], epsilon=100.0)
    assert told(shared)[-2:] == ["reserved", "refused"]


def test_a_settled_plan_may_reserve_only_the_rest(shared):
    reserve(shared, "plan-1", PART)
    commit(shared)
    shared.settle("plan-1")
    with pytest.raises(BudgetExceeded, match="has no open reservation"):
        commit(shared, 2, "t2")
    reserve(shared, "plan-1", PART)
    assert steps(list(shared.reservations()[-1].held)) == 4
    assert steps(shared.counted()) == 6
    commit(shared, 2, "t2")
    commit(shared, 3, "t3")
    shared.settle("plan-1")
    reserve(shared, "plan-1", PART)  # nothing is left to reserve, and a resumed run may still ask for its evaluation
    assert len(shared.reservations()) == 2
    with pytest.raises(BudgetExceeded):
        commit(shared, 4, "t4")


def test_a_round_beyond_its_reservation_is_refused_though_the_plans_epsilon_allows_it(shared):
    reserve(shared, "plan-1", [Event(10.0, 1.0, 4)])
    commit(shared, 1, "t1")
    for event in (Event(10.0, 1.0, 3), Event(20.0, 1.0, 1), Event(10.0, 1.0, 1, records=2)):
        with pytest.raises(BudgetExceeded, match="has too little reserved"):
            commit(shared, 2, "t2", event)
    commit(shared, 2, "t2")


@pytest.mark.parametrize("name", ["study of plan-a", "aaaaaaaa"])
def test_a_stale_reservation_is_recovered_by_name_or_digest(shared, name):
    stale, other = "a" * 64, "b" * 64
    shared.reserve(Cost(stale, "study of plan-a", tuple(PART), 3.0, DELTA))
    shared.reserve(Cost(other, "study of plan-b", tuple(PART), 3.0, DELTA))
    with pytest.raises(BudgetExceeded):
        reserve(shared, "plan-3", PART)
    assert shared.recover(name, "the consortium ended it").plan == stale
    entry = shared.book.told()[-1]
    assert (entry.what, entry.said["reason"]) == ("budget.recovered", "the consortium ended it")
    reserve(shared, "plan-3", PART)


@pytest.mark.parametrize("name", ["nobody", "study", "aaa"])
def test_what_to_recover_must_be_one_open_reservation(shared, name):
    for plan in ("a" * 64, "aaaaaaab" * 8):
        shared.reserve(Cost(plan, "study", tuple(PART), 3.0, DELTA))
    with pytest.raises(TicketRefused, match=r"Open now: study \(a{12}\), study"):
        shared.recover(name)
    assert all(one.open for one in shared.reservations())


def test_populations_have_ceilings_of_their_own(shared):
    reserve(shared, "plan-1", PART)
    reserve(shared, "plan-2", PART)
    path = opened(shared.book.path.parent, CEILING, "newborns")
    other = Ledger(path, "newborns")
    reserve(other, "plan-1", PART)
    assert steps(other.counted()) == 6
    assert steps(shared.counted()) == 12


def test_two_studies_may_name_their_runs_alike(shared):
    for plan in ("plan-1", "plan-2"):
        reserve(shared, plan, PART)
        shared.commit(Release(plan, "run-1", 1, f"ticket of {plan}", EVENT), epsilon=3.0, delta=DELTA)
    assert steps(shared.spent()) == 4


def test_processes_that_reserve_at_once_cannot_both_have_the_last_of_the_budget(shared, monkeypatch):
    path, fits = shared.book.path, budget.fits
    shared.close()

    def slowly(*given: object) -> bool:
        time.sleep(0.03)
        return fits(*given)

    monkeypatch.setattr(budget, "fits", slowly)
    children = []
    for number in range(6):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                reserve(Ledger(path), f"plan-{number}", PART)
                status = 0
            except BudgetExceeded:
                status = 3
            finally:
                os._exit(status)
        children.append(child)
    assert sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children) == [0, 0, 3, 3, 3, 3]
    ledger = Ledger(path)
    assert steps(ledger.counted()) == 12
    assert told(ledger).count("refused") == 4


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(4)), closed=st.sets(st.sampled_from(range(4))))
def test_the_order_of_studies_is_irrelevant(tmp_path_factory, order, closed):
    folder = tmp_path_factory.mktemp("order")
    ledger = Ledger(opened(folder, 4.0))
    noises = (8.0, 10.0, 12.0, 16.0)
    for at in order:
        reserve(ledger, f"plan-{at}", [Event(noises[at], 1.0, 4)])
        ledger.commit(Release(f"plan-{at}", "r", 1, "t", Event(noises[at], 1.0, 1)), epsilon=4.0, delta=DELTA)
    for at in closed:
        ledger.settle(f"plan-{at}")
    wanted = [Event(noise, 1.0, 1 if at in closed else 4) for at, noise in enumerate(noises)]
    assert ledger.counted() == merged(wanted)
    assert ledger.price(ledger.counted(), DELTA) == pytest.approx(budget.epsilon(wanted, DELTA), rel=1e-12)
    ledger.close()


# --- the ceiling -------------------------------------------------------------------------------------------
def signed(ledger: Ledger, epsilon: float = 1.0) -> None:
    folder = ledger.book.path.parent
    ledger.set_ceiling(epsilon, DELTA, officer="ada", identity=read_identity(folder / "ada.key"), reason="the board")


def edit(ledger: Ledger, statement: str, *values: object) -> None:
    """Somebody with an SQL shell."""
    ledger.book.database.execute(statement, values)


def test_a_ceiling_is_numbered_signed_and_logged(shared):
    signed(shared, 2.0)
    ceiling = shared.ceiling()
    assert (ceiling.version, ceiling.epsilon, ceiling.officer, ceiling.reason) == (2, 2.0, "ada", "the board")
    entries = [entry for entry in shared.book.told() if entry.what == "budget.ceiling"]
    assert [(entry.said["version"], entry.said["epsilon"]) for entry in entries] == [(1, CEILING), (2, 2.0)]


def test_a_ceiling_below_what_is_spent_blocks_even_what_is_reserved(shared):
    reserve(shared, "plan-1", PART)
    commit(shared)
    signed(shared, ONE / 2)
    with pytest.raises(BudgetExceeded, match=r"would pass the ceiling .* that ada set"):
        commit(shared, 2, "t2")
    with pytest.raises(BudgetExceeded, match="What would fit: nothing"):
        reserve(shared, "plan-2", PART)
    signed(shared, CEILING)
    commit(shared, 2, "t2")


def test_a_ceiling_that_equals_a_plan_admits_it_to_its_last_round(tmp_path):
    """At another order than the usual one, which stays when the same ceiling is signed again."""
    each = Event(0.6, 0.001, 10)
    whole = budget.epsilon([replace(each, steps=50)], DELTA)
    ledger = Ledger(opened(tmp_path / "all", whole))
    assert ledger.order(ledger.ceiling()) == budget.order_of(whole, DELTA)
    reserve(ledger, "plan-1", [replace(each, steps=50)], epsilon=whole)
    assert ledger.order(ledger.ceiling()) != budget.order_of(whole, DELTA)
    for number in range(1, 6):
        if number == 3:
            signed(ledger, whole)
        commit(ledger, number, f"t{number}", each, epsilon=whole)
    with pytest.raises(BudgetExceeded):
        reserve(ledger, "plan-2", [each])


def test_another_key_signs_no_ceiling(shared, tmp_path):
    eve = new_identity(tmp_path / "eve.key")
    for officer in ("ada", "eve"):
        with pytest.raises(EnvelopeRefused, match=f"not the key that .*officers.json pins for {officer}"):
            shared.set_ceiling(9.0, DELTA, officer=officer, identity=eve)
    assert shared.ceiling().version == 1


@pytest.mark.parametrize(("epsilon", "delta"), [(-1.0, DELTA), (0.0, DELTA), (1.0, 0.0), (1.0, 0.5), (math.nan, DELTA)])
def test_a_ceiling_that_is_none_is_refused(shared, epsilon, delta):
    with pytest.raises(BudgetExceeded, match="cannot be set"):
        shared.set_ceiling(epsilon, delta, officer="ada", identity=read_identity(shared.book.path.parent / "ada.key"))
    assert shared.ceiling().version == 1


def test_a_ceiling_whose_officer_is_no_longer_pinned_is_void(shared):
    save_roster(shared.book.path.parent / "officers.json", {})
    with pytest.raises(EnvelopeRefused, match=r"not pinned here\. Have a pinned officer sign"):
        reserve(shared, "plan-1", PART)


def changed(envelope: str, **changes: object) -> str:
    held = json.loads(envelope)
    payload = json.loads(base64.b64decode(held["payload"])) | changes
    return json.dumps(held | {"payload": base64.b64encode(json.dumps(payload).encode()).decode()})


@pytest.mark.parametrize("kind", ["edited", "older", "another hospital's", "another population's", "another purpose"])
def test_a_ceiling_that_was_not_signed_for_its_place_is_refused(shared, tmp_path, kind):
    folder = shared.book.path.parent
    signed(shared, 2.0)
    first, second = (row[0] for row in shared.book.rows("SELECT envelope FROM ceilings ORDER BY version"))
    ada = read_identity(folder / "ada.key")
    match kind:
        case "edited":
            forged = changed(second, epsilon=20.0)
        case "older":
            forged = first
        case "another hospital's":  # where the same officer is pinned
            (tmp_path / "other").mkdir()
            for name in ("ada.key", "officers.json"):
                shutil.copy(folder / name, tmp_path / "other" / name)
            other = Ledger(tmp_path / "other" / "ledger.sqlite")
            signed(other, 20.0)
            signed(other, 20.0)
            forged = other.book.rows("SELECT envelope FROM ceilings ORDER BY version DESC LIMIT 1")[0][0]
        case "another population's":
            newborns = Ledger(folder / "ledger.sqlite", "newborns")
            signed(newborns, 20.0)
            signed(newborns, 20.0)
            forged = newborns.book.rows("SELECT envelope FROM ceilings WHERE population = 'newborns'")[1][0]
        case _:
            forged = ada.sign("advert", base64.b64decode(json.loads(second)["payload"]))
    edit(shared, "UPDATE ceilings SET envelope = ? WHERE population = 'patients' AND version = 2", forged)
    with pytest.raises(EnvelopeRefused):
        reserve(shared, "plan-1", PART)
    with pytest.raises(LedgerBroken, match="lacks a reservation or a ceiling that was logged"):
        Ledger(shared.book.path)


# --- edited, copied, damaged -------------------------------------------------------------------------------
EDITS = {
    "a release made smaller": "UPDATE releases SET steps = 1",
    "a release made quieter": "UPDATE releases SET noise_multiplier = 90.0",
    "a release taken out": "DELETE FROM releases",
    "a reservation made smaller": "UPDATE reservations SET held = '[]', charges = '[]'",
    "a reservation taken out": "DELETE FROM reservations",
    "a reservation made nonsense": "UPDATE reservations SET held = '[{}]'",
    "a reservation made no JSON": "UPDATE reservations SET held = 'x'",
    "a reservation closed": "UPDATE reservations SET open = 0 WHERE plan = 'plan-2'",
    "a reservation opened": "UPDATE reservations SET open = 1 WHERE plan = 'plan-1'",
    "a reservation added": "INSERT INTO reservations VALUES (9, 'patients', 'p', 's', '[]', '[]', 1)",
    "the newest ceiling taken out": "DELETE FROM ceilings WHERE version = 2",
    "an entry taken out": "DELETE FROM entries WHERE number = (SELECT max(number) FROM entries)",
    "an entry made no JSON": "UPDATE entries SET said = 'x'",
    "an entry changed": "UPDATE entries SET said = '{}' WHERE what = 'budget.reserved'",
}


@pytest.mark.parametrize("kind", EDITS)
def test_an_edited_database_is_refused(shared, kind):
    signed(shared, 2 * CEILING)
    reserve(shared, "plan-1", PART)
    commit(shared)
    shared.settle("plan-1")
    reserve(shared, "plan-2", PART)
    path = shared.book.path
    shared.close()
    Ledger(path).close()
    with sqlite3.connect(path) as database:
        database.execute(EDITS[kind])
    database.close()
    with pytest.raises(
        LedgerBroken, match=r"is not as it was logged|lacks a|holds a r|is not the ledger that audit.jsonl tells of"
    ):
        Ledger(path)


def test_an_old_copy_of_the_database_is_refused(shared, tmp_path):
    path = shared.book.path
    shared.close()
    shutil.copy(path, tmp_path / "backup.sqlite")
    ledger = Ledger(path)
    reserve(ledger, "plan-1", PART)
    ledger.close()
    shutil.copy(tmp_path / "backup.sqlite", path)
    with pytest.raises(LedgerBroken, match=r"is not the ledger that audit\.jsonl tells of, or an old copy"):
        Ledger(path)


def test_a_database_that_is_gone_is_not_begun_anew(shared):
    path = shared.book.path
    shared.close()
    path.unlink()
    with pytest.raises(LedgerBroken, match=r"is missing, and audit\.jsonl tells of it"):
        Ledger(path)
    assert not path.exists()


def test_another_hospitals_database_is_refused(shared, tmp_path):
    other = opened(tmp_path / "other", 2.0)
    path = shared.book.path
    shared.close()
    shutil.copy(other, path)
    with pytest.raises(LedgerBroken, match=r"is not the ledger that audit\.jsonl tells of"):
        Ledger(path)


@pytest.mark.parametrize("held", [b"", b"not a database, and long enough to be taken for one" * 40])
def test_a_file_that_is_no_ledger_is_a_sentence(tmp_path, held):
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(held)
    if not held:  # as SQLite leaves it where it was killed before it wrote anything
        Ledger(path).close()
        return
    with pytest.raises(LedgerBroken, match="cannot be used as a ledger"):
        Ledger(path)


def test_a_ledger_of_an_earlier_version_is_a_sentence(tmp_path):
    with sqlite3.connect(tmp_path / "ledger.sqlite") as database:
        database.execute("CREATE TABLE releases (number INTEGER PRIMARY KEY)")
    with pytest.raises(LedgerBroken, match=r"is not a ledger of this version\. Move it away"):
        Ledger(tmp_path / "ledger.sqlite")


# --- killed ------------------------------------------------------------------------------------------------
@pytest.fixture
def kills(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "simulations" / "benchmarks"))
    import ledger_kills  # pyright: ignore[reportMissingImports]

    return ledger_kills


def test_killed_at_every_durable_write_nothing_is_unaccounted_and_nothing_lost(kills):
    found = kills.walk()
    assert [kill for kill in found if kill.wrong] == []
    points = {kill.point for kill in found}
    assert len(found) > 100
    assert {
        "BEGIN IMMEDIATE",
        "COMMIT",
        "INSERT INTO releases",
        "INSERT INTO reservations",
        "INSERT INTO ceilings",
    } < points
    assert {"UPDATE reservations SET", "within a line", "before fsync", "after fsync", "after replace", "none"} < points


def test_the_walk_notices_a_byte_that_left_unpaid(kills, tmp_path):
    place = tmp_path / "life"
    kills.life(place)
    (place / "settled").unlink()
    assert kills.wrong_after(place, tmp_path / "copy") == ""
    with sqlite3.connect(place / "ledger.sqlite") as database:
        database.execute("DELETE FROM releases WHERE round = 3")
    assert kills.wrong_after(place, tmp_path / "copy")


def test_the_walk_notices_budget_that_is_lost(kills, tmp_path, monkeypatch):
    place = tmp_path / "life"
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "settle", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert in_a_child(lambda: kills.life(place)) == -signal.SIGKILL
    monkeypatch.setattr(Ledger, "recover", lambda *_: None)
    assert "not free" in kills.wrong_after(place, tmp_path / "copy")
