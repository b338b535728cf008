"""The control stream while the agent runs: it hears of studies, tells what was decided while it was away, renews."""

import threading
import time
from datetime import timedelta

import pytest

from cloister_client import liaison
from cloister_client.approvals import Approvals
from cloister_client.control import Control
from cloister_client.decisions import approve, stop
from cloister_client.enrolment import due
from cloister_client.liaison import catch_up, keep_in_touch
from cloister_client.membership import own_certificate
from cloister_client.offers import studies_of, study_of
from cloister_shared.certificates import Kind, public_key, read_key
from cloister_shared.envelope import new_identity, read_identity
from cloister_shared.errors import LinkLost, StudyRefused


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(liaison, "_LONGEST", 0.3)
    monkeypatch.setattr(liaison, "_LOOK", 0.1)


@pytest.fixture
def in_touch():
    """``in_touch(agent)``: the thread of a running agent."""
    begun = []

    def begin(agent):
        stop_ = threading.Event()
        thread = threading.Thread(target=keep_in_touch, args=(agent, stop_), daemon=True)
        thread.start()
        begun.append((stop_, thread))

    yield begin
    for stop_, thread in begun:
        stop_.set()
        thread.join(10)
        assert not thread.is_alive()


def until(found, seconds=15.0):
    """Wait for what another thread brings about."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if said := found():
            return said
        time.sleep(0.02)
    raise AssertionError("it did not come about")


def yes(hospital, digest):
    key = hospital.folder / "ada.key"
    if not key.exists():
        hospital.officer("ada", ceiling=False)
    approve(hospital.agent, study_of(hospital.agent, digest), "ada", read_identity(key), "")


@pytest.fixture
def three(coordinator, enrolled):
    return [enrolled(name) for name in ("alder", "birch", "cedar")]


@pytest.fixture
def submit(coordinator, plan_text):
    def submitted():
        version = len(coordinator.consortium.registry.studies()) + 1
        return coordinator.submit(plan_text + f"version: {version}\n", "alder", "birch", "cedar")

    return submitted


def test_a_study_arrives_by_itself(coordinator, three, submit, in_touch):
    in_touch(three[0].agent)
    before = submit()
    until(lambda: Approvals(three[0].agent).standing(before) == "offered")
    after = submit()  # while the stream stands
    until(lambda: Approvals(three[0].agent).standing(after) == "offered")
    until(lambda: study_of(three[0].agent, after).news.state == "submitted")


def test_a_decision_made_while_the_coordinator_is_away_is_told_when_it_is_back(coordinator, three, submit, in_touch):
    alder, digest = three[0], submit()
    catch_up(alder.agent)
    coordinator.stop()
    try:
        in_touch(alder.agent)
        yes(alder, digest)
        assert Approvals(alder.agent).require(digest)
        with pytest.raises(LinkLost):
            catch_up(alder.agent)
    finally:
        coordinator.start()
    until(lambda: coordinator.said(digest) == {"alder": "approved"})


def test_a_decision_made_while_the_stream_stands_is_told(coordinator, three, submit, in_touch):
    alder, digest = three[0], submit()
    in_touch(alder.agent)
    until(lambda: Approvals(alder.agent).standing(digest) == "offered")
    yes(alder, digest)
    until(lambda: coordinator.said(digest) == {"alder": "approved"})
    stop(alder.agent, digest, "revoked", "", "account root")
    until(lambda: coordinator.said(digest) == {"alder": "revoked"})
    yes(alder, digest)
    until(lambda: coordinator.said(digest) == {"alder": "approved"})


def test_a_decision_that_the_coordinator_does_not_take_is_told_once(
    coordinator, three, submit, in_touch, monkeypatch, caplog
):
    alder, digest, told = three[0], submit(), []

    def refused(self, envelope):
        told.append(envelope)
        raise StudyRefused("The study is over.")

    monkeypatch.setattr(Control, "decide", refused)
    in_touch(alder.agent)
    until(lambda: Approvals(alder.agent).standing(digest) == "offered")
    yes(alder, digest)
    until(lambda: "approved could not be told: The study is over." in caplog.text)
    time.sleep(0.5)  # five looks
    assert len(told) == 1


def test_the_stream_comes_back_after_the_coordinator_does(coordinator, three, submit, in_touch):
    in_touch(three[0].agent)
    first = submit()
    until(lambda: Approvals(three[0].agent).standing(first) == "offered")
    coordinator.stop()
    coordinator.start()
    second = submit()
    until(lambda: Approvals(three[0].agent).standing(second) == "offered")


def test_an_offer_that_is_refused_is_logged_and_the_next_one_is_heard(coordinator, three, submit, in_touch, caplog):
    own = coordinator.consortium.signing
    object.__setattr__(coordinator.consortium, "signing", new_identity(three[0].folder / "thief.key"))
    forged = submit()
    object.__setattr__(coordinator.consortium, "signing", own)
    honest = submit()
    in_touch(three[0].agent)
    until(lambda: Approvals(three[0].agent).standing(honest) == "offered")
    assert Approvals(three[0].agent).standing(forged) == "unknown"
    assert f"study {forged[:12]} refused: The offer is signed by a key that is not pinned here" in caplog.text


def test_a_certificate_that_is_nearly_over_is_renewed_and_used(coordinator, three, submit, in_touch):
    alder = three[0]
    public = public_key(read_key(alder.agent / "agent.key"))
    made = coordinator.consortium.authority.issue(public, Kind.SITE, "alder", timedelta(minutes=2))
    (alder.agent / "agent.crt").write_bytes(made)
    assert due(own_certificate(alder.agent))
    in_touch(alder.agent)
    until(lambda: not due(own_certificate(alder.agent)))
    digest = submit()
    until(lambda: Approvals(alder.agent).standing(digest) == "offered")


def test_an_expelled_hospital_is_told_so_once_and_goes_on_asking(coordinator, three, in_touch, caplog):
    coordinator.expel("alder")
    in_touch(three[0].agent)
    until(lambda: "is revoked" in caplog.text)
    time.sleep(1)
    assert caplog.text.count("The certificate of alder is revoked") == 1


def test_a_person_hears_what_is_new_without_an_agent(coordinator, three, submit):
    digest = submit()
    assert not any(digest[:12] in why for why in catch_up(three[0].agent))
    assert digest in [study.digest for study in studies_of(three[0].agent)[0]]


def test_a_person_is_told_what_was_refused(coordinator, three, submit):
    own = coordinator.consortium.signing
    object.__setattr__(coordinator.consortium, "signing", new_identity(three[0].folder / "thief.key"))
    submit()
    object.__setattr__(coordinator.consortium, "signing", own)
    assert any("signed by a key that is not pinned" in why for why in catch_up(three[0].agent))


def test_everything_passes_through_a_proxy(coordinator, three, submit, proxy, in_touch):
    alder = three[0]
    alder.says(proxy=proxy.url)
    digest = submit()
    in_touch(alder.agent)
    until(lambda: Approvals(alder.agent).standing(digest) == "offered")
    assert set(proxy.places) == {coordinator.consortium.settings.control}
