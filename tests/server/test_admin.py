"""The admin port: who may do what, what is refused and why, and what is written down."""

import json
import re
import threading
import time
from datetime import UTC, datetime, timedelta
from queue import Queue

import grpc
import pytest

from cloister_server import admin
from cloister_server.access import MAY
from cloister_server.records import Role
from cloister_shared import audit
from cloister_shared.agreement import read_offer
from cloister_shared.certificates import Kind, Revocations, bearer, public_key
from cloister_shared.control_pb2 import (
    AccountRequest,
    AuditRequest,
    ExpelRequest,
    HelloRequest,
    HospitalsRequest,
    InviteRequest,
    ListRequest,
    SteerRequest,
    SubmitRequest,
    WatchRequest,
)
from cloister_shared.control_pb2_grpc import AdminStub, ControlStub
from cloister_shared.enrolment import read_invite
from cloister_shared.envelope import key_id, read_roster
from cloister_shared.errors import AccessRefused
from cloister_shared.versions import spoken

DENIED, FAILED = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.FAILED_PRECONDITION
UNKNOWN, TOO_OFTEN = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED


# --- accounts and roles ------------------------------------------------------------------------------------
WHO_MAY = [
    # method, request: operator, researcher, privacy officer, auditor
    ("Invite", InviteRequest(hospital="Oak"), "o"),
    ("Hospitals", HospitalsRequest(), "opa"),
    ("Expel", ExpelRequest(hospital="Nobody"), "o"),
    ("Submit", SubmitRequest(plan="study: x"), "r"),
    ("Steer", SteerRequest(study="none", verb="run"), "o"),
    ("Steer", SteerRequest(study="none", verb="stop"), "op"),
    ("Steer", SteerRequest(study="none", verb="resume"), "o"),
    ("Steer", SteerRequest(study="none", verb="delete"), "o"),
    ("List", ListRequest(), "orpa"),
    ("Watch", WatchRequest(study="none"), "orpa"),
    ("Account", AccountRequest(verb="add", name="x", role="god"), "o"),
    ("Account", AccountRequest(verb="renew", name="nobody"), "o"),
    ("Account", AccountRequest(verb="remove", name="nobody"), "o"),
    ("Account", AccountRequest(verb="list"), "o"),
    ("Account", AccountRequest(verb="promote", name="officer"), "o"),
    ("Audit", AuditRequest(), "pa"),
]
"""Requests that change nothing even where they are let through."""


@pytest.mark.parametrize("role", list(Role))
def test_each_role_may_do_what_it_is_for_and_nothing_else(world, role):
    desk = world.desk(role)
    for method, asked, letters in WHO_MAY:
        try:
            world.whole(getattr(desk, method), asked)
            said = ""
        except grpc.RpcError as error:
            said = f"{error.code().name} {error.details()}"
        by_role = re.search(rf"^PERMISSION_DENIED a {role} is {role}, who may not", said)
        assert (by_role is None) == (role[0] in letters), (method, asked, said)
    assert {method for method, _, _ in WHO_MAY} == set(vars(AdminStub(world.admin_channel()))), "every method is tried"


def test_every_role_is_in_the_table_and_none_both_submits_and_runs():
    assert set(MAY) == set(Role)
    assert not any({"submit", "run"} <= actions for actions in MAY.values())
    assert not any(MAY[Role.AUDITOR] & {"invite", "expel", "submit", "run", "stop", "resume", "account"})


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", "Bearer wrong")],
        [("authorization", "Bearer ")],
        [("authorization", "Basic {token}")],
        [("authorization", "{token}")],
        [("authorization", "Bearer {token}"), ("authorization", "Bearer {token}")],
        [("authorization", "Bearer " + "x" * 4000)],
        [("x-token", "{token}")],
    ],
    ids=["none", "wrong", "empty", "another scheme", "bare", "two", "long", "elsewhere"],
)
def test_whoever_shows_no_token_of_an_account_is_nobody(world, metadata):
    token = world.token("operator")
    shown = [(key, value.replace("{token}", token)) for key, value in metadata]
    stub = AdminStub(world.admin_channel())
    world.refused(lambda asked: stub.List(asked, metadata=shown, timeout=20), ListRequest(), UNKNOWN)
    assert '"outcome":"refused: no account has the token"' in world.log
    assert token not in world.log
    assert "wrong" not in world.log


def test_a_token_goes_with_its_account(world):
    world.token("auditor")
    stale = world.desk("auditor")
    stale.List(ListRequest())
    reply = world.desk().Account(AccountRequest(verb="renew", name="a auditor"))
    world.refused(stale.List, ListRequest(), UNKNOWN)
    fresh = world.desk_with(reply.token)
    fresh.List(ListRequest())
    world.desk().Account(AccountRequest(verb="remove", name="a auditor"))
    world.refused(fresh.List, ListRequest(), UNKNOWN)


def test_accounts_are_made_with_a_role_and_listed_without_a_token(world):
    token = world.desk().Account(AccountRequest(verb="add", name="Ada", role="researcher")).token
    assert len(token) >= 43
    listed = world.desk().Account(AccountRequest(verb="list"))
    assert dict(listed.accounts) == {"officer": "operator", "a operator": "operator", "Ada": "researcher"}
    assert listed.token == ""
    world.refused(world.desk().Account, AccountRequest(verb="add", name="Ada", role="auditor"), DENIED)
    world.refused(world.desk().Account, AccountRequest(verb="add", name="a/b", role="auditor"), DENIED)
    assert token not in world.log
    assert "add: Ada: researcher" in world.log


def test_an_operator_is_always_left(world):
    said = world.refused(world.desk().Account, AccountRequest(verb="remove", name="a operator"), DENIED)
    assert "cannot remove itself" in said
    world.desk().List(ListRequest())


def test_wrong_tokens_are_limited_and_right_ones_pass(world):
    wrong = world.desk_with("wrong")
    for _ in range(10):
        world.refused(wrong.List, ListRequest(), UNKNOWN)
    said = world.refused(wrong.List, ListRequest(), TOO_OFTEN)
    assert re.search(r"Wait \d+ s\.$", said)
    world.desk().List(ListRequest())
    assert world.log.count("no account has the token") == 10, "nobody fills the log by trying"


def test_an_account_that_calls_too_often_is_told_how_long_to_wait(world):
    desk = world.desk("auditor")
    said = set()
    for _ in range(80):
        try:
            desk.Hospitals(HospitalsRequest())
        except grpc.RpcError as error:
            said.add((error.code(), error.details()))
            break
    assert said == {(TOO_OFTEN, "a auditor calls too often. Wait 1 s.")}
    world.desk().Hospitals(HospitalsRequest())


# --- the port ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.org:0"])
def test_the_port_stays_on_this_machine(world, address):
    with pytest.raises(AccessRefused, match="admin_on_network: true"):
        admin.serve(world.consortium, world.nodes, address)


def test_the_port_is_on_the_network_where_the_settings_say_so(world):
    from dataclasses import replace

    settings = world.consortium.settings.model_copy(update={"admin_on_network": True})
    admin.serve(replace(world.consortium, settings=settings), world.nodes, "0.0.0.0:0").stop(0)


def test_a_hospital_s_certificate_is_no_account(world):
    oak = world.enrol("Oak")
    from cloister_shared.certificates import key_pem

    ca = world.consortium.authority.certificate
    credentials = grpc.ssl_channel_credentials(ca, key_pem(oak.key), oak.certificate)
    with grpc.secure_channel(world.admin, credentials) as channel:
        world.refused(lambda asked: AdminStub(channel).List(asked, timeout=20), ListRequest(), UNKNOWN)
        with pytest.raises(grpc.RpcError) as caught:
            ControlStub(channel).Hello(HelloRequest(version=spoken()), timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


# --- hospitals ---------------------------------------------------------------------------------------------
def test_an_invite_is_all_that_a_hospital_needs(world):
    reply = world.desk().Invite(InviteRequest(hospital="St Mary's", hours=2))
    invite = read_invite(reply.invite)
    assert (invite.consortium, invite.hospital) == ("North", "St Mary's")
    assert (invite.rounds, invite.control) == ("localhost:8443", "localhost:8444")
    assert invite.ca == world.consortium.authority.certificate.decode()
    assert invite.signing == world.consortium.signing.public
    held = bearer(invite.certificate.encode())
    assert (held.kind, held.name) == (Kind.INVITE, "St Mary's")
    assert timedelta(hours=1.9) < held.not_after - datetime.now(UTC) <= timedelta(hours=2)
    assert datetime.fromisoformat(invite.expires) == held.not_after
    assert invite.key not in repr(invite)
    assert json.dumps(invite.key)[1:-1] not in world.log


@pytest.mark.parametrize(("name", "hours"), [("", 1), ("a/b", 1), ("x" * 61, 1), ("Oak\nAsh", 1), ("Oak", 721)])
def test_an_odd_invite_is_refused(world, name, hours):
    world.refused(world.desk().Invite, InviteRequest(hospital=name, hours=hours), DENIED)
    assert world.consortium.registry.invites() == {}


def test_hospitals_are_listed_as_they_stand(world):
    oak, gone = world.enrol("Oak"), world.enrol("Gone")
    world.invite("Elm")
    world.desk().Expel(ExpelRequest(hospital="Gone", reason="left"))
    world.site(oak).Hello(HelloRequest(version=spoken()), timeout=20)
    found = {each.name: each for each in world.desk().Hospitals(HospitalsRequest()).hospitals}
    assert {name: (each.standing, each.online) for name, each in found.items()} == {
        "Oak": ("enrolled", True),
        "Gone": ("expelled", False),
        "Elm": ("invited", False),
    }
    assert (found["Oak"].key_id, found["Oak"].version) == (key_id(oak.identity.public), spoken())
    assert abs(found["Oak"].seen - time.time()) < 60
    assert found["Oak"].not_after == bearer(oak.certificate).not_after.timestamp()
    assert gone.identity.public


def test_expulsion_revokes_and_forgets_and_is_written_down(world):
    oak = world.enrol("Oak")
    world.desk().Expel(ExpelRequest(hospital="Oak", reason="left the consortium"))
    assert bearer(oak.certificate).serial in Revocations(world.consortium.folder)
    assert public_key(oak.key) not in world.nodes.known
    assert '"about":"Oak: left the consortium"' in world.log
    assert "Nobody" in world.refused(world.desk().Expel, ExpelRequest(hospital="Nobody"), DENIED)


@pytest.mark.parametrize("mended_by", ["expel", "start"])
def test_an_expulsion_that_was_cut_short_is_finished(world, mended_by):
    """The records say it, and a crash came before the list was written."""
    oak = world.enrol("Oak")
    world.consortium.registry.expel("Oak")
    assert bearer(oak.certificate).serial not in Revocations(world.consortium.folder)
    if mended_by == "expel":
        world.desk().Expel(ExpelRequest(hospital="Oak", reason="again"))
        assert public_key(oak.key) not in world.nodes.known
    else:
        admin.serve(world.consortium, world.nodes, "127.0.0.1:0").stop(0)
    assert bearer(oak.certificate).serial in Revocations(world.consortium.folder)


# --- studies -----------------------------------------------------------------------------------------------
def test_a_study_is_offered_to_all_that_are_enrolled(world):
    oak, ash = world.enrol("Oak"), world.enrol("Ash")
    world.invite("Elm")
    said = world.desk("researcher").Submit(SubmitRequest(plan=world.plan, file="/home/ada/plan.yaml"))
    assert (said.name, said.state, said.rounds) == ("three-numbers", "submitted", 3)
    assert dict(said.decisions) == {"Oak": "", "Ash": ""}
    study = world.consortium.registry.study(said.digest)
    offer, plan = read_offer(study.offer, world.consortium.signing.public)
    assert (offer.consortium, offer.digest, offer.file) == ("North", said.digest, "plan.yaml")
    assert (offer.plan, plan.digest, offer.submitted_by) == (world.plan, said.digest, "a researcher")
    assert offer.roster == {"Oak": oak.identity.public, "Ash": ash.identity.public}
    assert read_roster(world.consortium.folder / "studies" / said.digest[:16] / "roster.json") == offer.roster


def test_a_plan_is_read_strictly_and_its_fault_has_a_line(world):
    plan = world.plan.replace("rounds: 3", "round: 3")
    said = world.refused(
        world.desk("researcher").Submit,
        SubmitRequest(plan=plan, file="plan.yaml"),
        grpc.StatusCode.INVALID_ARGUMENT,
    )
    assert "plan.yaml line 9: round = 3 is not a known key. Did you mean rounds?" in said
    assert world.consortium.registry.studies() == []


@pytest.mark.parametrize(
    ("octets", "code"),
    [(300_000, grpc.StatusCode.INVALID_ARGUMENT), (10_000_000, TOO_OFTEN)],
)
def test_a_huge_plan_is_refused_and_the_service_lives_on(world, octets, code):
    desk = world.desk("researcher")
    world.refused(desk.Submit, SubmitRequest(plan="# " + "x" * octets, file="plan.yaml"), code)
    desk.List(ListRequest())


def test_a_plan_with_hundreds_of_faults_is_refused_in_what_a_header_holds(world):
    faults = world.plan + "".join(f"unknown-{n}-{'é' * 20}: 1\n" for n in range(500))
    said = world.refused(
        world.desk("researcher").Submit, SubmitRequest(plan=faults, file="p"), grpc.StatusCode.INVALID_ARGUMENT
    )
    assert said.endswith(" ...")


def test_hospitals_are_named_rightly_and_are_as_many_as_the_plan_says(world):
    for name in ("Oak", "Ash", "Elm", "Yew"):
        world.enrol(name)
    submit = world.desk("researcher").Submit

    def asked(*names: str) -> SubmitRequest:
        return SubmitRequest(plan=world.plan, file="plan.yaml", hospitals=names)

    assert "2 to 3 hospitals; 4 are enrolled" in world.refused(submit, asked(), FAILED)
    assert "1 are named" in world.refused(submit, asked("Oak", "Oak"), FAILED)
    assert "Not enrolled: Elder" in world.refused(submit, asked("Oak", "Elder"), FAILED)
    assert set(submit(asked("Oak", "Yew")).decisions) == {"Oak", "Yew"}


def test_the_same_plan_is_not_offered_twice(world):
    for name in ("Oak", "Ash", "Elm"):
        world.enrol(name)
    digest = world.submit("Oak", "Ash")
    again = SubmitRequest(plan=world.plan + "# the same\n", file="plan.yaml", hospitals=["Oak", "Elm"])
    assert "submitted before" in world.refused(world.desk("researcher").Submit, again, FAILED)
    roster = read_roster(world.consortium.folder / "studies" / digest[:16] / "roster.json")
    assert set(roster) == {"Oak", "Ash"}, "the roster of the first is as it was"


def test_a_study_runs_once_enough_hospitals_approve(world):
    members = {name: world.enrol(name) for name in ("Oak", "Ash", "Elm")}
    digest, run = world.submit(), SteerRequest(study="three-numbers", verb="run")
    said = world.refused(world.desk().Steer, run, FAILED)
    assert "asks for 2 hospitals that approve, and 0 did; not decided: Ash, Elm, Oak." in said
    world.decide(members["Oak"], digest)
    world.decide(members["Ash"], digest, "rejected")
    said = world.refused(world.desk().Steer, run, FAILED)
    assert "1 did; not decided: Elm; rejected: Ash." in said
    world.decide(members["Elm"], digest)
    assert world.desk().Steer(run).state == "running"
    assert re.findall(r'"outcome":"(\w+)[^"]*","role":"operator"},"what":"run"', world.log) == [
        "refused",
        "refused",
        "done",
    ]


def test_an_expelled_hospital_s_approval_no_longer_counts(world):
    members = {name: world.enrol(name) for name in ("Oak", "Ash")}
    digest = world.submit()
    for member in members.values():
        world.decide(member, digest)
    world.desk().Expel(ExpelRequest(hospital="Ash", reason="left"))
    said = world.refused(world.desk().Steer, SteerRequest(study=digest, verb="run"), FAILED)
    assert "1 did; no longer enrolled: Ash." in said


def test_a_study_is_stopped_and_resumed_from_the_states_that_allow_it(world):
    members = [world.enrol(name) for name in ("Oak", "Ash")]
    digest, desk = world.submit(), world.desk()

    def steer(verb: str, reason: str = "") -> str:
        done = desk.Steer(SteerRequest(study=digest[:8], verb=verb, reason=reason))
        return f"{done.state} {done.reason}"

    for member in members:
        world.decide(member, digest)
    assert "is submitted" in world.refused(lambda verb: steer(verb), "resume", FAILED)
    assert steer("run") == "running "
    assert "is running" in world.refused(lambda verb: steer(verb), "run", FAILED)
    officer = world.desk("privacy-officer")
    done = officer.Steer(SteerRequest(study=digest, verb="stop", reason="a doubt\nabout it"))
    assert (done.state, done.reason) == ("stopped", "a doubt about it")
    world.decide(members[0], digest, "revoked")
    assert "revoked: Oak" in world.refused(lambda verb: steer(verb), "resume", FAILED)
    world.decide(members[0], digest)
    assert steer("resume") == "running "
    world.consortium.registry.move(digest, "finished")
    assert "is finished" in world.refused(lambda verb: steer(verb), "stop", FAILED)


class Watcher:
    """An open Watch."""

    def __init__(self, desk, study: str) -> None:
        self.replies, self.ended, self._call = Queue(), Queue(), desk.Watch(WatchRequest(study=study))
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        try:
            for reply in self._call:
                self.replies.put(reply)
            self.ended.put(None)
        except grpc.RpcError as error:
            self.ended.put(error)

    def next(self):
        return self.replies.get(timeout=5)


def _round(number: int) -> dict[str, object]:
    return {
        "round": number,
        "answered": ["Oak"],
        "rejected": {"Ash": "no answer"},
        "numbers": {"loss": 0.5, "auroc": None},
        "seconds": 1.5,
        "update_norm": 1.0,
    }


def test_a_watcher_sees_the_rounds_so_far_then_each_and_the_end(world):
    for name in ("Oak", "Ash"):
        world.enrol(name)
    digest, registry = world.submit(), world.consortium.registry
    registry.move(digest, "running")
    for number in (1, 2):
        registry.add_round(digest, number, _round(number))
    watcher = Watcher(world.desk("auditor"), "three-numbers")
    reply = watcher.next()
    assert (reply.state, reply.round, [each.round for each in reply.history]) == ("running", 2, [1, 2])
    (first, _) = reply.history
    assert (list(first.took_part), dict(first.missed), first.seconds) == (["Oak"], {"Ash": "no answer"}, 1.5)
    assert dict(first.numbers) == {"loss": 0.5}
    registry.add_round(digest, 3, _round(3))
    assert [each.round for each in watcher.next().history] == [3]
    registry.move(digest, "finished")
    assert watcher.next().state == "finished"
    assert watcher.ended.get(timeout=5) is None


def test_a_long_history_comes_in_parts(world, monkeypatch):
    monkeypatch.setattr(admin, "AT_ONCE", 2)
    for name in ("Oak", "Ash"):
        world.enrol(name)
    digest, registry = world.submit(), world.consortium.registry
    for number in range(1, 6):
        registry.add_round(digest, number, _round(number))
    registry.move(digest, "stopped")
    watcher = Watcher(world.desk(), digest)
    assert watcher.ended.get(timeout=5) is None
    parts = [watcher.next() for _ in range(3)]
    assert [[each.round for each in part.history] for part in parts] == [[1, 2], [3, 4], [5]]


def test_a_watcher_whose_account_is_removed_sees_no_more(world):
    for name in ("Oak", "Ash"):
        world.enrol(name)
    watcher = Watcher(world.desk("auditor"), world.submit())
    watcher.next()
    world.desk().Account(AccountRequest(verb="remove", name="a auditor"))
    assert watcher.ended.get(timeout=5).code() is UNKNOWN


# --- the log -----------------------------------------------------------------------------------------------
def test_the_log_is_shown_with_its_head_and_holds_what_was_refused(world):
    world.refused(world.desk("researcher").Invite, InviteRequest(hospital="Oak"), DENIED)
    world.invite("Oak")
    reply = world.desk("auditor").Audit(AuditRequest(last=2))
    entries = [json.loads(line) for line in reply.entries]
    assert [(entry["what"], entry["said"]["account"], entry["said"]["about"]) for entry in entries] == [
        ("invite", "a researcher", "Oak"),
        ("invite", "a operator", "Oak"),
    ]
    assert entries[0]["said"]["outcome"].startswith("refused: a researcher is researcher, who may not invite.")
    assert entries[1]["said"]["outcome"] == "done"
    assert reply.head == entries[1]["hash"] == audit.export(world.consortium.folder / "audit.jsonl")["head"]
    for token in world.tokens.values():
        assert token not in world.log


def test_a_log_that_was_changed_stops_whatever_would_be_written(world, caplog):
    path = world.consortium.folder / "audit.jsonl"
    path.write_text(path.read_text().replace("officer", "nobody!"))
    for call, asked in (
        (world.desk("auditor").Audit, AuditRequest()),
        (world.desk().Invite, InviteRequest(hospital="Oak")),
    ):
        said = world.refused(call, asked, grpc.StatusCode.INTERNAL)
        assert said == "Something broke at the coordinator; its log says more."
    assert "Entry 1 of" in caplog.text
    world.desk("auditor").List(ListRequest())


def test_reading_leaves_no_line_in_the_log(world):
    before = world.log
    desk = world.desk()
    desk.List(ListRequest())
    desk.Hospitals(HospitalsRequest())
    desk.Account(AccountRequest(verb="list"))
    world.desk("auditor").Audit(AuditRequest())
    assert world.log == before
