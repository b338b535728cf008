"""The control port: who may enrol, who a caller is, what it is told, and what its word is worth."""

import re
import threading
import time
from datetime import UTC, datetime, timedelta
from queue import Queue

import grpc
import pytest
from cryptography import x509

from cloister_server import control
from cloister_server.door import AT_ONCE, Buckets
from cloister_server.folder import server_tls
from cloister_shared import certificates
from cloister_shared.certificates import Kind, bearer, key_pem, made_key, public_key
from cloister_shared.control_pb2 import (
    DecideRequest,
    EnrolRequest,
    ExpelRequest,
    HelloRequest,
    RenewRequest,
    SteerRequest,
    StudiesRequest,
)
from cloister_shared.control_pb2_grpc import ControlStub, EnrolmentStub
from cloister_shared.enrolment import prove
from cloister_shared.errors import EnrolmentRefused, LinkLost
from cloister_shared.versions import spoken

DENIED, UNREACHED = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE
HELLO = HelloRequest(version=spoken())


def bootstrap(world, name: str, lifetime: timedelta, *, kind: Kind = Kind.INVITE, authority=None):
    """A channel under a certificate made for the purpose, and the serial of that."""
    key = made_key()
    made = (authority or world.consortium.authority).issue(public_key(key), kind, name, lifetime)
    return world.channel(made, key_pem(key)), bearer(made)


# --- enrolment ---------------------------------------------------------------------------------------------
def test_an_invite_becomes_a_certificate_under_which_the_hospital_is_known(world):
    oak, ash = world.enrol("Oak"), world.enrol("St Mary's")
    held = bearer(ash.certificate)
    assert (held.kind, held.name, held.public_key) == (Kind.SITE, "St Mary's", public_key(ash.key))
    assert timedelta(days=364) < held.not_after - datetime.now(UTC) <= timedelta(days=365)
    assert set(world.nodes.known) == {public_key(oak.key), public_key(ash.key)}
    before = time.time()
    hello = world.site(ash).Hello(HELLO, timeout=20)
    assert (hello.site, hello.version, hello.not_after) == ("St Mary's", spoken(), held.not_after.timestamp())
    assert before <= hello.time <= time.time()
    hospital = world.consortium.registry.hospital("St Mary's")
    assert (hospital.identity, hospital.version) == (ash.identity.public, spoken())
    assert hospital.seen is not None


def test_the_roster_of_an_enrolment_holds_those_who_are_enrolled(world):
    oak, gone = world.enrol("Oak"), world.enrol("Gone")
    world.desk().Expel(ExpelRequest(hospital="Gone", reason="left"))
    ash = world.member("Ash")
    reply = world.door(world.invite("Ash")).Enrol(ash.enrol_request(), timeout=20)
    assert dict(reply.roster) == {"Oak": oak.identity.public, "Ash": ash.identity.public}
    assert gone.identity.public not in reply.roster.values()


def test_without_a_client_certificate_nobody_gets_a_word_in(world):
    channel = world.channel()
    world.refused(ControlStub(channel).Hello, HELLO, UNREACHED)
    world.refused(EnrolmentStub(channel).Enrol, world.member("Oak").enrol_request(), UNREACHED)


@pytest.mark.parametrize("kind", [Kind.SITE, Kind.INVITE])
def test_another_authority_of_the_same_name_counts_for_nothing(world, tmp_path, kind):
    (tmp_path / "other").mkdir()
    other = certificates.new_authority(tmp_path / "other", "North")
    channel, _ = bootstrap(world, "Oak", timedelta(days=1), kind=kind, authority=other)
    world.refused(ControlStub(channel).Hello, HELLO, UNREACHED)
    world.refused(EnrolmentStub(channel).Enrol, world.member("Oak").enrol_request(), UNREACHED)


def test_a_hospital_is_no_authority(world):
    """Neither its own key's signature nor the consortium's over that key makes it one."""
    oak = world.enrol("Oak")
    world.enrol("Ash")
    own = certificates.Authority(oak.key, x509.load_pem_x509_certificate(oak.certificate))
    key = made_key()
    forged = own.issue(public_key(key), Kind.SITE, "Ash", timedelta(days=1))
    stub = ControlStub(world.channel(forged + oak.certificate, key_pem(key)))
    world.refused(stub.Hello, HELLO, UNREACHED)


def test_a_certificate_that_the_records_do_not_know_opens_nothing(world):
    channel, _ = bootstrap(world, "Oak", timedelta(days=1), kind=Kind.SITE)
    stub = ControlStub(channel)
    assert "No hospital 'Oak' is enrolled" in world.refused(stub.Hello, HELLO)
    world.enrol("Oak")
    assert "not enrolled with this key" in world.refused(stub.Hello, HELLO)
    assert "not enrolled with this key" in world.refused(stub.Studies, StudiesRequest(version=spoken()))


def test_an_invite_is_of_no_use_to_a_second_hospital(world):
    invite, first, second = world.invite("Oak"), world.member("Oak"), world.member("Oak")
    world.door(invite).Enrol(first.enrol_request(), timeout=20)
    assert "used" in world.refused(world.door(invite).Enrol, second.enrol_request())
    assert set(world.nodes.known) == {public_key(first.key)}, "the second is not known to Flower either"
    assert world.consortium.registry.hospital("Oak").identity == first.identity.public


def test_of_two_who_race_for_one_invite_one_wins(world):
    invite, members = world.invite("Oak"), [world.member("Oak") for _ in range(6)]
    start, said = threading.Barrier(len(members)), Queue()

    def enrol(member):
        stub = world.door(invite)
        start.wait()
        try:
            said.put(bearer(stub.Enrol(member.enrol_request(), timeout=20).certificate.encode()).public_key)
        except grpc.RpcError as error:
            said.put(error.code())

    threads = [threading.Thread(target=enrol, args=(member,)) for member in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outcomes = [said.get() for _ in members]
    (winner,) = [each for each in outcomes if isinstance(each, bytes)]
    assert outcomes.count(DENIED) == len(members) - 1
    assert world.consortium.registry.hospital("Oak").public_key == winner
    assert winner in world.nodes.known


def test_a_hospital_that_lost_the_answer_asks_again(world):
    invite, oak = world.invite("Oak"), world.member("Oak")
    first, second = (world.door(invite).Enrol(oak.enrol_request(), timeout=20) for _ in range(2))
    serials = [bearer(reply.certificate.encode()).serial for reply in (first, second)]
    assert serials[0] != serials[1]
    assert world.consortium.registry.hospital("Oak").serial == serials[1]
    for reply in (first, second):
        oak.certificate = reply.certificate.encode()
        assert world.site(oak).Hello(HELLO, timeout=20).site == "Oak"


@pytest.mark.parametrize("changed", ["identity", "key"])
def test_whoever_asks_again_with_one_other_key_is_refused(world, changed):
    invite, oak, other = world.invite("Oak"), world.member("Oak"), world.member("Oak")
    world.door(invite).Enrol(oak.enrol_request(), timeout=20)
    setattr(other, *(("identity", oak.identity) if changed == "key" else ("key", oak.key)))
    world.refused(world.door(invite).Enrol, other.enrol_request())
    assert set(world.nodes.known) == {public_key(oak.key)}


def test_an_expelled_hospital_does_not_come_back_by_its_old_invite(world):
    invite, oak = world.invite("Oak"), world.member("Oak")
    world.door(invite).Enrol(oak.enrol_request(), timeout=20)
    world.desk().Expel(ExpelRequest(hospital="Oak", reason="left"))
    world.refused(world.door(invite).Enrol, oak.enrol_request())
    assert world.nodes.known == {}


def test_an_invite_that_was_withdrawn_opens_nothing(world):
    invite = world.invite("Oak")
    world.desk().Expel(ExpelRequest(hospital="Oak", reason="typing error"))
    assert "unknown" in world.refused(world.door(invite).Enrol, world.member("Oak").enrol_request())


def test_a_newer_invite_ends_the_one_before_and_takes_the_same_keys(world):
    old, new, oak = world.invite("Oak"), world.invite("Oak"), world.member("Oak")
    world.refused(world.door(old).Enrol, oak.enrol_request())
    world.door(new).Enrol(oak.enrol_request(), timeout=20)


def test_an_expelled_hospital_comes_back_with_new_keys(world):
    oak = world.enrol("Oak")
    world.desk().Expel(ExpelRequest(hospital="Oak", reason="lost its keys"))
    invite = world.invite("Oak")
    assert "was expelled" in world.refused(world.door(invite).Enrol, oak.enrol_request())
    again = world.member("Oak")
    again.certificate = world.door(invite).Enrol(again.enrol_request(), timeout=20).certificate.encode()
    assert world.site(again).Hello(HELLO, timeout=20).site == "Oak"


def test_an_invite_ends_with_its_certificate(world):
    channel, held = bootstrap(world, "Oak", timedelta(seconds=-1))
    world.consortium.registry.invite(held.serial, "Oak", datetime.now(UTC) + timedelta(hours=1))
    world.refused(EnrolmentStub(channel).Enrol, world.member("Oak").enrol_request(), UNREACHED)


def test_an_invite_ends_when_the_records_say_so(world):
    channel, held = bootstrap(world, "Oak", timedelta(hours=1))
    world.consortium.registry.invite(held.serial, "Oak", datetime.now(UTC) - timedelta(seconds=1))
    assert "expired" in world.refused(EnrolmentStub(channel).Enrol, world.member("Oak").enrol_request())


def test_what_a_request_asks_to_be_called_is_not_read(world):
    member = world.member("Oak")
    reply = world.door(world.invite("Oak")).Enrol(member.enrol_request(named="St Mary's"), timeout=20)
    assert bearer(reply.certificate.encode()).name == "Oak"
    assert [hospital.name for hospital in world.consortium.registry.hospitals()] == ["Oak"]


def test_a_key_enrols_under_one_name(world):
    oak, twin = world.enrol("Oak"), world.member("Ash")
    twin.key = oak.key
    world.refused(world.door(world.invite("Ash")).Enrol, twin.enrol_request())
    assert public_key(oak.key) in world.nodes.known, "Oak keeps its place"
    assert [hospital.name for hospital in world.consortium.registry.hospitals()] == ["Oak"]


def _broken(member, other) -> dict[str, EnrolRequest]:
    good, csr = member.enrol_request(), member.csr()
    flipped = csr.replace(csr[200:204], "AAAA")

    def asked(**changed: str) -> EnrolRequest:
        made = EnrolRequest()
        made.CopyFrom(good)
        for name, value in changed.items():
            setattr(made, name, value)
        return made

    return {
        "garbage": asked(request="\x00\x01 no request"),
        "empty": asked(request=""),
        "signature broken": asked(request=flipped, proof=prove(member.identity, flipped)),
        "proof of another request": asked(proof=prove(member.identity, other.csr())),
        "proof by another key": asked(proof=prove(other.identity, good.request)),
        "proof for another purpose": asked(proof=member.identity.sign("decision", b"{}")),
        "no proof": asked(proof=""),
        "no key": asked(identity="zz"),
        "another's identity": asked(identity=other.identity.public),
    }


def test_a_broken_enrolment_leaves_the_invite_open(world):
    invite, oak = world.invite("Oak"), world.member("Oak")
    for what, asked in _broken(oak, world.member("Ash")).items():
        said = world.refused(world.door(invite).Enrol, asked)
        assert said.endswith("."), what
        assert world.nodes.known == {}, what
    world.door(invite).Enrol(oak.enrol_request(), timeout=20)


def test_enrolments_are_written_down_whether_they_succeed_or_not(world):
    invite = world.invite("Oak")
    world.door(invite).Enrol(world.member("Oak").enrol_request(), timeout=20)
    world.refused(world.door(invite).Enrol, world.member("Oak").enrol_request())
    assert re.findall(r'"outcome":"(done|refused).*?"what":"enrol"', world.log) == ["done", "refused"]


# --- who calls ---------------------------------------------------------------------------------------------
def test_an_invite_opens_enrolment_alone(world):
    invite = world.invite("Oak")
    stub = ControlStub(world.channel(invite.certificate.encode(), invite.key.encode()))
    for call, asked in (
        (stub.Hello, HELLO),
        (stub.Renew, RenewRequest()),
        (stub.Studies, StudiesRequest(version=spoken())),
        (stub.Decide, DecideRequest()),
    ):
        assert "of kind invite" in world.refused(call, asked)


def test_a_hospital_cannot_enrol_again_by_its_certificate(world):
    oak = world.enrol("Oak")
    stub = EnrolmentStub(world.channel(oak.certificate, key_pem(oak.key)))
    assert "of kind site" in world.refused(stub.Enrol, world.member("Ash").enrol_request())


def test_the_coordinators_own_certificate_opens_nothing(world):
    key, certificate = server_tls(world.consortium)
    world.refused(ControlStub(world.channel(certificate, key)).Hello, HELLO, UNREACHED)


def test_an_expelled_hospital_is_refused_at_its_next_call(world):
    oak = world.enrol("Oak")
    stub = world.site(oak)
    stub.Hello(HELLO, timeout=20)
    world.desk().Expel(ExpelRequest(hospital="Oak", reason="left"))
    assert "revoked" in world.refused(stub.Hello, HELLO), "on the connection that it had"
    assert "revoked" in world.refused(world.site(oak).Hello, HELLO), "and on a new one"


@pytest.mark.parametrize("list_is", ["missing", "damaged", "another authority's"])
def test_without_the_revocation_list_nobody_is_let_in(world, tmp_path, list_is):
    oak, path = world.enrol("Oak"), world.consortium.folder / "revoked.crl"
    (tmp_path / "other").mkdir()
    match list_is:
        case "missing":
            path.unlink()
        case "damaged":
            path.write_text("no list")
        case _:
            path.write_bytes(certificates.new_authority(tmp_path / "other", "North").crl({}))
    assert "revoked" in world.refused(world.site(oak).Hello, HELLO)


def test_another_major_version_is_told_what_to_upgrade(world):
    oak = world.enrol("Oak")
    said = world.refused(
        world.site(oak).Hello, HelloRequest(version="2.0 (cloister 9.9)"), grpc.StatusCode.FAILED_PRECONDITION
    )
    assert "Upgrade the coordinator to the release of the agent of" in said
    assert world.consortium.registry.hospital("Oak").version == ""
    assert world.site(oak).Hello(HelloRequest(version="1.7 (cloister 9.9)"), timeout=20).site == "Oak"


def test_a_certificate_is_renewed_for_the_same_key_alone(world):
    oak = world.enrol("Oak")
    stub, before = world.site(oak), bearer(oak.certificate).serial
    other = world.member("Oak")
    assert "another key" in world.refused(stub.Renew, RenewRequest(request=other.csr()))
    assert "damaged" in world.refused(stub.Renew, RenewRequest(request="no request"))
    oak.certificate = stub.Renew(RenewRequest(request=oak.csr("Ash")), timeout=20).certificate.encode()
    held = bearer(oak.certificate)
    assert (held.name, held.public_key) == ("Oak", public_key(oak.key))
    assert held.serial != before
    assert world.site(oak).Hello(HELLO, timeout=20).not_after == held.not_after.timestamp()
    assert world.consortium.registry.hospital("Oak").serial == held.serial


def test_expulsion_revokes_every_certificate_that_a_hospital_ever_had(world):
    oak = world.enrol("Oak")
    old = oak.certificate
    oak.certificate = world.site(oak).Renew(RenewRequest(request=oak.csr()), timeout=20).certificate.encode()
    world.desk().Expel(ExpelRequest(hospital="Oak", reason="left"))
    for certificate in (old, oak.certificate):
        oak.certificate = certificate
        assert "revoked" in world.refused(world.site(oak).Hello, HELLO)


# --- decisions ---------------------------------------------------------------------------------------------
@pytest.fixture
def study(world):
    """A study of Oak and Ash, while Elm is enrolled too."""
    members = {name: world.enrol(name) for name in ("Oak", "Ash", "Elm")}
    return world.submit("Oak", "Ash"), members


def test_a_decision_is_written_down_and_the_last_word_counts(world, study):
    digest, members = study
    for said in ("approved", "revoked", "approved", "rejected"):
        assert world.site(members["Oak"]).Decide(world.decision(members["Oak"], digest, said)).state == "submitted"
        assert world.consortium.registry.decisions(digest) == {"Oak": said}
    assert world.log.count('"what":"decide"') == 4
    assert "approved by Ada" in world.log


def test_a_hospital_decides_for_itself_alone(world, study):
    digest, members = study
    oak = world.site(members["Oak"])
    theirs = world.decision(members["Ash"], digest)
    assert "not pinned" in world.refused(oak.Decide, theirs), "signed by the other"
    in_their_name = world.decision(members["Oak"], digest, site="Ash")
    assert "another hospital's name" in world.refused(oak.Decide, in_their_name)
    assert world.consortium.registry.decisions(digest) == {}


def test_a_hospital_decides_upon_what_it_was_offered(world, study):
    digest, members = study
    oak, elm = world.site(members["Oak"]), world.site(members["Elm"])
    assert "other hospitals" in world.refused(oak.Decide, world.decision(members["Oak"], digest, roster="0" * 64))
    failed = grpc.StatusCode.FAILED_PRECONDITION
    assert "not offered to Elm" in world.refused(elm.Decide, world.decision(members["Elm"], digest), failed)
    assert "no study" in world.refused(oak.Decide, world.decision(members["Oak"], digest, plan="0" * 64), failed)
    assert "no signed envelope" in world.refused(oak.Decide, DecideRequest(envelope="{}"))
    assert world.consortium.registry.decisions(digest) == {}


def test_consent_that_was_taken_back_is_not_replayed(world, study):
    digest, members = study
    oak = world.site(members["Oak"])
    approval = world.decision(members["Oak"], digest)
    oak.Decide(approval, timeout=20)
    oak.Decide(approval, timeout=20)  # whose answer was lost
    world.decide(members["Oak"], digest, "revoked")
    assert "later than" in world.refused(oak.Decide, approval, grpc.StatusCode.FAILED_PRECONDITION)
    assert world.consortium.registry.decisions(digest) == {"Oak": "revoked"}


def test_no_is_taken_whatever_a_clock_says(world, study):
    digest, members = study
    oak = world.site(members["Oak"])
    oak.Decide(world.decision(members["Oak"], digest, at="2999-01-01T00:00:00Z"), timeout=20)
    oak.Decide(world.decision(members["Oak"], digest, "revoked"), timeout=20)
    assert world.consortium.registry.decisions(digest) == {"Oak": "revoked"}


def test_a_hospital_that_came_back_under_another_key_is_asked_anew(world, study):
    digest, _ = study
    world.desk().Expel(ExpelRequest(hospital="Oak", reason="lost its keys"))
    oak = world.enrol("Oak")
    said = world.refused(world.site(oak).Decide, world.decision(oak, digest), grpc.StatusCode.FAILED_PRECONDITION)
    assert "Submit the study anew" in said


# --- the stream --------------------------------------------------------------------------------------------
class Listener:
    """An open stream; ``next`` waits for news."""

    def __init__(self, stub: ControlStub) -> None:
        self.call = stub.Studies(StudiesRequest(version=spoken()))
        self.news, self.ended = Queue(), Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            for news in self.call:
                self.news.put(news)
            self.ended.put(None)
        except grpc.RpcError as error:
            self.ended.put(error)

    def next(self):
        return self.news.get(timeout=5)


def test_a_hospital_is_told_of_its_studies_and_of_each_change_once(world, study):
    digest, members = study
    registry = world.consortium.registry
    listener = Listener(world.site(members["Oak"]))
    news = listener.next()
    assert (news.digest, news.state, news.round, news.rounds, news.decision) == (digest, "submitted", 0, 3, "")
    assert news.offer == registry.study(digest).offer
    world.decide(members["Oak"], digest)
    assert listener.next().decision == "approved"
    registry.move(digest, "running")
    assert listener.next().state == "running"
    registry.add_round(digest, 1, {"round": 1, "answered": ["Ash"], "rejected": {}, "numbers": {}, "seconds": 1})
    news = listener.next()
    assert (news.round, list(news.took_part)) == (1, ["Ash"])
    registry.move(digest, "waiting", "quorum lost")
    assert (news := listener.next()).reason == "quorum lost", news
    assert listener.news.empty()


def test_a_hospital_is_told_of_its_own_studies_alone(world, study):
    _, members = study
    listener = Listener(world.site(members["Elm"]))
    digest = world.submit("Ash", "Elm", plan=world.plan + "version: 2\n")
    assert listener.next().digest == digest
    assert listener.news.empty()


def test_the_stream_of_an_expelled_hospital_ends(world, study):
    _, members = study
    listeners = {name: Listener(world.site(members[name])) for name in ("Oak", "Ash")}
    for listener in listeners.values():
        listener.next()
    world.desk().Expel(ExpelRequest(hospital="Oak", reason="left"))
    error = listeners["Oak"].ended.get(timeout=5)
    assert error.code() is DENIED
    assert "revoked" in error.details()
    assert listeners["Ash"].ended.empty(), "the others are not touched"


def test_a_stream_ends_with_its_certificate(world):
    oak = world.enrol("Oak")
    oak.certificate = world.consortium.authority.issue(public_key(oak.key), Kind.SITE, "Oak", timedelta(seconds=2))
    error = Listener(world.site(oak)).ended.get(timeout=10)
    assert "has ended" in error.details()


def test_a_newer_stream_ends_the_one_before(world, study):
    _, members = study
    first = Listener(world.site(members["Oak"]))
    first.next()
    second = Listener(world.site(members["Oak"]))
    second.next()
    assert first.ended.get(timeout=5).code() is grpc.StatusCode.ABORTED
    world.decide(members["Oak"], study[0])
    assert second.next().decision == "approved"
    assert second.ended.empty()


def test_a_hospital_whose_stream_stands_is_written_down_as_seen(world, study, monkeypatch):
    _, members = study
    monkeypatch.setattr(control, "SEEN", 0.0)
    Listener(world.site(members["Oak"])).next()
    first = world.consortium.registry.hospital("Oak").seen
    deadline = time.monotonic() + 5
    while world.consortium.registry.hospital("Oak").seen == first and time.monotonic() < deadline:
        time.sleep(0.05)
    assert world.consortium.registry.hospital("Oak").seen > first


# --- hostile callers ---------------------------------------------------------------------------------------
def raw(channel: grpc.Channel, method: str, octets: bytes):
    return channel.unary_unary(f"/cloister.control.v1.Control/{method}")(octets, timeout=20)


@pytest.mark.parametrize(
    ("octets", "code"),
    [
        (b"\x0a\xff", grpc.StatusCode.INVALID_ARGUMENT),
        (b"\x0a\x02\xff\xfe", grpc.StatusCode.INVALID_ARGUMENT),
        (b"\x0a\x04junk", grpc.StatusCode.FAILED_PRECONDITION),
        (b"\x00" * (control.LARGEST + 1), grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
    ids=["cut short", "not UTF-8", "no version", "too large"],
)
def test_odd_octets_are_refused_and_the_service_lives_on(world, octets, code, caplog):
    oak = world.enrol("Oak")
    channel = world.channel(oak.certificate, key_pem(oak.key))
    with pytest.raises(grpc.RpcError) as caught:
        raw(channel, "Hello", octets)
    assert caught.value.code() is code
    assert "failed" not in caplog.text
    assert world.site(oak).Hello(HELLO, timeout=20).site == "Oak"


def test_a_method_that_is_not_there_is_not_there(world):
    oak = world.enrol("Oak")
    with pytest.raises(grpc.RpcError) as caught:
        raw(world.channel(oak.certificate, key_pem(oak.key)), "CreateRun", b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_people_s_service_is_not_on_the_hospitals_port(world):
    from cloister_shared.control_pb2 import ListRequest
    from cloister_shared.control_pb2_grpc import AdminStub

    oak = world.enrol("Oak")
    stub = AdminStub(world.channel(oak.certificate, key_pem(oak.key)))
    with pytest.raises(grpc.RpcError) as caught:
        stub.List(ListRequest(), metadata=[("authorization", f"Bearer {world.token('operator')}")], timeout=20)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_hospital_that_opens_calls_and_says_nothing_takes_no_others_place(world, caplog):
    oak, ash = world.enrol("Oak"), world.enrol("Ash")
    channel, released = world.channel(oak.certificate, key_pem(oak.key)), threading.Event()

    def silent():
        released.wait(20)
        yield from ()

    open_call = channel.stream_unary("/cloister.control.v1.Control/Hello")
    calls = [open_call.future(silent(), timeout=20) for _ in range(AT_ONCE)]
    stub, said, deadline = world.site(oak), "", time.monotonic() + 5
    while not said and time.monotonic() < deadline:
        try:
            stub.Hello(HELLO, timeout=20)
            time.sleep(0.2)
        except grpc.RpcError as error:
            said = f"{error}"
    assert "RESOURCE_EXHAUSTED" in said
    assert f"Oak has {AT_ONCE} calls open" in said
    assert world.site(ash).Hello(HELLO, timeout=20).site == "Ash"
    for call in calls:
        call.cancel()
    released.set()
    deadline = time.monotonic() + 5
    while said and time.monotonic() < deadline:  # until the places are given back
        try:
            said = stub.Hello(HELLO, timeout=20) and ""
        except grpc.RpcError as error:
            said = f"{error}"
            time.sleep(0.2)
    assert said == ""
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize(("method", "asked"), [("Hello", HELLO), ("Renew", "its key")])
def test_a_hospital_that_calls_too_often_is_told_how_long_to_wait(world, method, asked):
    oak = world.enrol("Oak")
    call = getattr(world.site(oak), method)
    said = ""
    for _ in range(3 * control.CALLS[0] if method == "Hello" else control.DEEDS[0]):
        try:
            call(RenewRequest(request=oak.csr()) if asked == "its key" else asked, timeout=20)
        except grpc.RpcError as error:
            said = f"{error}"
            break
    assert re.search(r"RESOURCE_EXHAUSTED.*\n.*Oak calls too often\. Wait \d+ s\.", said)


def test_a_bucket_lets_a_burst_through_then_one_at_a_time():
    now = [100.0]
    buckets = Buckets(burst=3, rate=0.5, clock=lambda: now[0])
    assert [buckets.take("a") for _ in range(3)] == [0, 0, 0]
    assert buckets.take("a") == pytest.approx(2)
    assert buckets.take("b") == 0
    now[0] += 1.5
    assert buckets.take("a") == pytest.approx(0.5)
    now[0] += 0.5
    assert [buckets.take("a") > 0 for _ in range(2)] == [False, True]
    now[0] += 1000
    assert [buckets.take("a") > 0 for _ in range(4)] == [False, False, False, True]


def test_a_fault_of_ours_crosses_as_one_sentence(world, monkeypatch, caplog):
    oak = world.enrol("Oak")

    def broken(*_):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(type(world.consortium.registry), "seen", broken)
    said = world.refused(world.site(oak).Hello, HELLO, grpc.StatusCode.INTERNAL)
    assert said == "Something broke at the coordinator; its log says more."
    assert "secret detail" in caplog.text


def test_a_port_is_served_once(world):
    with pytest.raises(LinkLost, match="cannot be listened on"):
        control.serve(world.consortium, world.nodes, world.control)


def test_a_name_that_is_enrolled_gets_no_invite(world):
    world.enrol("Oak")
    with pytest.raises(grpc.RpcError, match="enrolled"):
        world.invite("Oak")
    with pytest.raises(EnrolmentRefused):
        world.consortium.registry.invite(1, "Oak", datetime.now(UTC))


def test_a_study_that_runs_is_told_to_who_hears_of_it_late(world, study):
    digest, members = study
    for name in ("Oak", "Ash"):
        world.decide(members[name], digest)
    world.desk().Steer(SteerRequest(study=digest, verb="run"))
    assert Listener(world.site(members["Ash"])).next().state == "running"
