"""What may go wrong in the night, and what must be so in the morning: real processes, TLS on loopback, one fault each.

Every study ends finished or stopped, and says with whom; the budget has what was taken part in and no more; nobody
said two different things; and where every hospital was in every round, the model is the in-process engine's to the bit.
"""

import os
import platform
import resource
import signal
import time
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

import pytest

from cloister_client.membership import own_certificate
from cloister_client.outage import APART
from cloister_simulations.deployment import until

LARGE = 12_000
"""Octets: of all that passes, a model and a masked update alone are larger."""

STAGES = {"keys": "advertise", "training": "training", "opening": "unmask", "evaluation": "evaluate"}
"""Where the first hospital can stand still; ``upload`` and ``between`` are seen from outside."""

ANSWERED = {
    "keys": ("query.advertise", 0),
    "training": ("train", 1),
    "upload": ("train", 1),
    "opening": ("query.unmask", 1),
    "evaluation": ("evaluate", 3),
}
"""What the others have answered in the meantime, in a study of two rounds."""


# --- somebody is killed -----------------------------------------------------------------------------------------
def prepare(night, stage):
    """See to it that the stage, once reached, lasts."""
    if stage == "upload":
        night.ways[night.first]["rounds"].trap("up", LARGE)
    elif stage != "between":
        night.hold(STAGES[stage])


def reach(night, stage, plan):
    """Wait until the study is in the middle of the stage: one hospital is, and the others have done their part."""
    if stage == "between":
        lines = night.store(plan) / "rounds.jsonl"
        deadline = time.monotonic() + night.LONG
        while not lines.exists() and time.monotonic() < deadline:
            time.sleep(0.001)  # it is over in a moment
        return
    if stage == "upload":
        assert night.ways[night.first]["rounds"].caught.wait(night.LONG)
    else:
        night.await_held(STAGES[stage])
    kind, number = ANSWERED[stage]
    until(lambda: night.answered(kind, plan, number) >= set(night.others), night.LONG, f"the others answered {kind}")


def kill(night, target, plan):
    """End a process as a power cut would."""
    if target == "agent":
        night.kill(night.first)
        night.processes[night.first].wait()
    elif target == "coordinator":
        night.kill("coordinator")
        night.processes["coordinator"].wait()
    else:
        pid = night.child(night.first, plan) if target == "child" else night.service(target)
        assert pid, f"there is no {target}"
        os.kill(pid, signal.SIGKILL)


def go_on(night, stage):
    """Whoever stood still does no longer, and whoever is dead is started again, as systemd would."""
    if stage == "upload":
        night.ways[night.first]["rounds"].heal()
    elif stage != "between":
        night.release(STAGES[stage])
    night.revive()


def test_a_night_in_which_everybody_is_killed_once(night):
    falls = {"keys": "control", "training": "child", "upload": "agent"}
    falls |= {"opening": "rounds", "between": "worker", "evaluation": "coordinator"}
    plan = night.offer(night.plan("night"))
    for stage in falls:
        prepare(night, stage)
    night.run(plan)
    for stage, target in falls.items():
        reach(night, stage, plan)
        kill(night, target, plan)
        go_on(night, stage)
    night.finished(plan)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["agent", "child", "rounds", "worker", "control", "coordinator"])
@pytest.mark.parametrize("stage", ["keys", "training", "upload", "opening", "between", "evaluation"])
def test_whoever_is_killed_and_whenever_the_study_finishes_with_everybody(night, stage, target):
    plan = night.offer(night.plan(f"{stage}-{target}"))
    prepare(night, stage)
    night.run(plan)
    reach(night, stage, plan)
    kill(night, target, plan)
    go_on(night, stage)
    night.finished(plan)


@pytest.mark.slow
def test_the_coordinator_is_away_for_three_minutes(night):
    plan = night.offer(night.plan("away"))
    night.hold("training")
    night.run(plan)
    reach(night, "training", plan)
    kill(night, "coordinator", plan)
    back = time.monotonic() + 180
    night.release("training")
    for name in night.sites:  # all of them wait, with what they have to say on disk
        until(lambda name=name: "cannot be reached" in night.log(name), night.LONG, f"{name} misses the coordinator")
    until(lambda: time.monotonic() > back, night.LONG + 20, "three minutes are over")
    night.revive()
    night.finished(plan)


@pytest.mark.slow
def test_a_quorum_that_is_lost_is_waited_for_and_a_stopped_study_goes_on(night):
    plan = night.offer(night.plan("quorum", min_sites=3))
    night.hold("training")
    night.run(plan)
    reach(night, "training", plan)
    kill(night, "agent", plan)
    study = night.wait(plan.study, ["waiting"], night.LONG)
    assert night.first in study.reason
    assert "2 of the 3 hospitals needed" in study.reason
    night.coordinator("study", "stop", plan.study, "--reason", "nobody answers the telephone")
    assert night.wait(plan.study, ["stopped"]).reason == "nobody answers the telephone"
    night.release("training")
    night.revive()
    for name in night.others:  # they wait for no message any more, and keep nothing aside for one
        night.spent_right(name, plan, 0, wasted=1)
    night.coordinator("study", "resume", plan.study)
    night.finished(plan)


# --- the network of one hospital ------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("way", ["poll", "download", "upload"])
def test_a_cut_network_that_heals_loses_nothing(night, way):
    plan, rounds = night.offer(night.plan(f"cut-{way}")), night.ways[night.first]["rounds"]
    if way == "poll":
        until(lambda: rounds.asking == 1, night.LONG, "the hospital asks for messages")
        rounds.cut()
        night.run(plan)
        until(lambda: night.answered("query.enrol", plan) == set(night.others), night.LONG, "the others have enrolled")
    else:
        rounds.trap("up" if way == "upload" else "down", LARGE)
        night.run(plan)
        assert rounds.caught.wait(night.LONG)
        rounds.cut()
        noticed = ("cannot be reached", "ended the connection")
        until(lambda: any(said in night.log(night.first) for said in noticed), night.LONG, "the hospital notices")
    rounds.heal()
    night.finished(plan)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["download", "upload"])
def test_a_network_that_swallows_everything_and_recovers_loses_nothing(night, way):
    plan, rounds = night.offer(night.plan(f"mute-{way}")), night.ways[night.first]["rounds"]
    rounds.trap("up" if way == "upload" else "down", LARGE)
    night.run(plan)
    assert rounds.caught.wait(night.LONG)
    rounds.mute()
    until(lambda: "does not answer" in night.log(night.first), night.LONG, "the hospital gives up waiting")
    rounds.heal()
    night.finished(plan)


@pytest.mark.slow
def test_a_hospital_that_is_away_for_long_misses_a_round_and_comes_back(night):
    plan, (birch, _) = night.offer(night.plan("missed")), night.others
    rounds = night.ways[night.first]["rounds"]
    night.hold("advertise", birch)
    night.hold("unmask", birch)
    night.run(plan)
    night.await_held("advertise", birch)
    given = f"study {plan.digest[:12]}: query.advertise answered"
    until(lambda: given in night.log(night.first), night.LONG, "its key is given")
    rounds.cut()
    night.release("advertise", birch)
    night.await_held("unmask", birch)  # the others' sum is collected
    rounds.heal()
    until(lambda: rounds.asking == 1, night.LONG, "the hospital is back")
    night.release("unmask", birch)
    night.finished(plan, missed={night.first: [1]})
    (first, _) = night.registry.rounds(plan.digest)
    assert "not heard of" in first["rejected"][night.first]


# --- its disk ---------------------------------------------------------------------------------------------------
@contextmanager
def filled_disk(night, ballast):
    """Fill the disk to the last octet."""
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    yield
    ballast.unlink()


@contextmanager
def forbidden_disk(night, plan):
    """Let agent and training process write no more, as far as they see for want of room."""
    processes = night.processes[night.first].pid, night.child(night.first, plan)
    for pid in processes:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    yield
    for pid in processes:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def with_a_full_disk(night, plan, full):
    """A round that was paid for, whose answer the disk did not take, is answered when it does."""
    night.hold("training")
    night.run(plan)
    reach(night, "training", plan)
    with full:
        night.release("training")
        until(lambda: "cannot be written" in night.log(night.first), night.LONG, "the hospital misses its disk")
    night.finished(plan)


@pytest.mark.slow
def test_a_disk_that_is_full_loses_nothing_once_there_is_room(night):
    with night.small_disk(night.first, 32 * 2**20) as ballast:
        plan = night.offer(night.plan("disk-full"))
        with_a_full_disk(night, plan, filled_disk(night, ballast))


@pytest.mark.slow
def test_files_that_may_not_grow_lose_nothing_once_they_may(night):
    plan = night.offer(night.plan("disk-limit"))
    with_a_full_disk(night, plan, forbidden_disk(night, plan))


# --- its clock --------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(("off", "said"), [("+10m", "10 minutes ahead of"), ("-10m", "10 minutes behind")])
def test_a_clock_that_is_ten_minutes_off_is_told_and_stops_nothing(night, off, said):
    if (found := find_spec("libfaketime")) is None or found.origin is None or platform.machine() != "x86_64":
        pytest.skip("libfaketime is not there, or not made for this processor")
    library = Path(found.origin).parent / "vendor/libfaketime/src/libfaketime.so.1"
    night.end(night.first)
    night.agent(
        night.first,
        {"LD_PRELOAD": str(library), "FAKETIME": off, "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"},
    )
    try:
        assert APART < 600
        until(lambda: said in night.log(night.first), night.LONG, "the hospital is told of its clock")
        plan = night.offer(night.plan(f"clock-{'ahead' if off[0] == '+' else 'behind'}"))
        night.run(plan)
        night.finished(plan)
    finally:
        night.end(night.first)


# --- its certificate ------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_certificate_that_is_about_to_end_is_renewed_in_mid_study(night):
    plan = night.offer(night.plan("renewed"))
    night.hold("training")
    night.run(plan)
    reach(night, "training", plan)
    night.certify(night.first, 60)
    night.ways[night.first]["control"].cut()  # so that it connects anew, and looks
    night.ways[night.first]["control"].heal()
    until(lambda: (own_certificate(night.own(night.first)).not_after - datetime.now(UTC)).days > 300, 50, "renewal")
    night.release("training")
    night.finished(plan)


@pytest.mark.slow
def test_a_certificate_that_ended_stops_the_hospital_until_it_enrols_again(night):
    plan = night.offer(night.plan("expired", min_sites=3))
    night.hold("training")
    night.run(plan)
    reach(night, "training", plan)
    night.ways[night.first]["control"].cut()  # or it would be renewed
    night.certify(night.first, 5)
    night.processes[night.first].wait(night.LONG)
    assert "certificate" in (end := night.log(night.first).splitlines()[-1])
    assert "enrol" in end
    night.ways[night.first]["control"].heal()
    study = night.wait(plan.study, ["waiting"], night.LONG)
    assert night.first in study.reason
    night.release("training")
    night.rejoin(night.first)
    night.finished(plan)


@pytest.mark.slow
def test_a_hospital_that_is_expelled_stops_and_the_others_finish(night):
    plan = night.offer(night.plan("expelled"))
    night.hold("training")
    night.run(plan)
    reach(night, "training", plan)
    night.coordinator("expel", night.first, "--reason", "it left the consortium")
    night.release("training")
    assert night.processes[night.first].wait(night.LONG) == 1
    assert "revoked" in night.log(night.first).splitlines()[-1]
    night.wait(plan.study)
    night.site(night.first, "budget", "release", plan.study)  # nobody is there any more who would hear of the end
    night.finished(plan, missed={night.first: [1, 2]}, wasted=1)
