"""How a hospital joins: with an invite, once; and one sentence for everything that can be wrong with it."""

import json
import stat
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from cloister_client.control import Control
from cloister_client.enrolment import due, enrol, renew
from cloister_client.membership import authority_id, consortium_of, own_certificate, pin, running, spelled
from cloister_shared import audit
from cloister_shared.certificates import Kind, public_key, read_key
from cloister_shared.envelope import key_id, read_identity
from cloister_shared.errors import EnrolmentRefused, EnvelopeRefused, LinkLost


@pytest.fixture
def alder(hospital):
    return hospital("alder")


@pytest.fixture(autouse=True)
def nobody_is_left(coordinator):
    """Each test finds the consortium empty."""
    yield
    for one in coordinator.consortium.registry.hospitals():
        if one.standing == "enrolled":
            coordinator.expel(one.name)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_an_invite_becomes_a_certificate_and_pins_the_consortium(coordinator, alder):
    said = alder.types("enrol", coordinator.invite("alder"))
    known = consortium_of(alder.agent)
    home = coordinator.consortium
    assert (known.consortium, known.site, known.signing) == ("North", "alder", home.signing.public)
    assert (known.rounds, known.control) == (home.settings.rounds, home.settings.control)
    assert known.roster == {"alder": read_identity(alder.agent / "identity.key").public}
    held = own_certificate(alder.agent)
    assert held.public_key == public_key(read_key(alder.agent / "agent.key"))
    for words in (
        "alder is enrolled in North until",
        spelled(key_id(known.roster["alder"])),
        spelled(key_id(known.signing)),
        spelled(authority_id((alder.agent / "ca.crt").read_text())),
        "Delete the invite, which holds a private key:",
        "Next: cloister-site doctor --site",
    ):
        assert words in said
    assert [entry.what for entry in audit.verify(alder.folder / "audit.jsonl")] == ["enrolled"]


def test_a_name_as_people_write_it_goes_through_everything(coordinator, hospital):
    folder = hospital("st-marys")
    folder.says(site="St Mary's")
    invite = coordinator.invite("St Mary's")
    assert "St Mary's is enrolled in North until" in folder.types("enrol", invite)
    assert own_certificate(folder.agent).name == "St Mary's"
    assert "St Mary's" in folder.types("peers")
    assert "# The Cloister agent of St Mary's." in folder.types("service")


def test_keys_are_the_owners_alone(coordinator, alder):
    enrol(alder.agent, coordinator.invite("alder"))
    assert mode(alder.agent) == 0o700
    assert mode(alder.agent / "agent.key") == mode(alder.agent / "identity.key") == 0o600


def test_no_key_leaves(coordinator, alder, monkeypatch):
    sent = []
    asked = Control.enrol
    monkeypatch.setattr(Control, "enrol", lambda self, *said: sent.append(repr(said)) or asked(self, *said))
    enrol(alder.agent, coordinator.invite("alder"))
    own = (alder.agent / "identity.key").read_text()
    pem = (alder.agent / "agent.key").read_text().splitlines()[1]
    assert len(sent) == 1
    assert own not in sent[0]
    assert pem not in sent[0]


def test_those_who_came_before_are_pinned(coordinator, enrolled, alder):
    birch = enrolled("birch", like="birch")
    said = alder.types("enrol", coordinator.invite("alder"))
    key = read_identity(birch.agent / "identity.key").public
    assert consortium_of(alder.agent).roster["birch"] == key
    assert spelled(key_id(key)) in said
    assert spelled(key_id(key)) in alder.types("peers")


@pytest.mark.parametrize("lost", ["the answer", "before anything was sent"])
def test_an_enrolment_that_was_cut_short_is_repeated_with_the_same_file(coordinator, alder, lost, monkeypatch):
    invite, asked = coordinator.invite("alder"), Control.enrol

    def cut(self, *said):
        if lost == "the answer":
            asked(self, *said)
        raise LinkLost("Gone.")

    with monkeypatch.context() as broken:
        broken.setattr(Control, "enrol", cut)
        with pytest.raises(LinkLost, match=r"doctor --invite FILE .* then enrol again with the same file"):
            enrol(alder.agent, invite)
    assert not (alder.agent / "consortium.json").exists()
    key = (alder.agent / "agent.key").read_text()
    enrol(alder.agent, invite)
    assert (alder.agent / "agent.key").read_text() == key
    assert own_certificate(alder.agent).name == "alder"


def test_nobody_enrols_twice(coordinator, alder):
    alder.types("enrol", coordinator.invite("alder"))
    said = alder.types("enrol", coordinator.files / "any.invite", code=1)
    assert "alder is enrolled in North already." in said
    assert len(said.splitlines()) == 1


def test_a_used_invite_is_refused(coordinator, alder, hospital):
    invite = coordinator.invite("alder")
    enrol(alder.agent, invite)
    another = hospital("elsewhere")
    another.says(site="alder")
    assert "unknown, used or expired" in another.types("enrol", invite, code=1)


def test_an_invite_for_another_name_says_both(coordinator, alder):
    said = alder.types("enrol", coordinator.invite("birch"), code=1)
    assert "The invite is for birch, and site.yaml is of alder." in said
    assert not alder.agent.exists()


def edited(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_an_expired_invite_says_when_it_ended_and_what_the_clock_says(coordinator, alder):
    invite = edited(coordinator.invite("alder"), expires="2020-01-02T03:04:05+00:00")
    said = alder.types("enrol", invite, code=1)
    assert "The invite ended on 2020-01-02 at 03:04 UTC; this machine's clock says 20" in said


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda p: p.write_text("{"), "is no invite of a consortium, or is damaged"),
        (lambda p: p.write_text(""), "is no invite of a consortium, or is damaged"),
        (lambda p: p.write_bytes(b"\xff\xfe"), "is no invite of a consortium"),
        (lambda p: p.unlink(), "is not there"),
        (lambda p: (p.unlink(), p.mkdir()), "is no invite of a consortium"),
        (lambda p: p.write_text(p.read_text()[:200]), "is no invite of a consortium, or is damaged"),
        (lambda p: edited(p, key="-----BEGIN nothing"), "cannot be reached"),
    ],
)
def test_a_damaged_invite_is_one_sentence_that_shows_nothing_of_it(coordinator, alder, spoil, why):
    invite = coordinator.invite("alder")
    secret = json.loads(invite.read_text())["key"].splitlines()[1]
    spoil(invite)
    done = alder.types("enrol", invite, code=2 if why == "cannot be reached" else 1)
    assert why in done
    assert secret not in done
    assert len(done.splitlines()) == 1


def test_an_invite_that_others_can_read_is_used_and_said(coordinator, alder):
    invite = coordinator.invite("alder")
    invite.chmod(0o644)
    said = " ".join(alder.types("enrol", invite).split())
    assert "which holds a private key: whoever reads it first can enrol" in said


def test_a_coordinator_that_cannot_be_reached_is_one_sentence(coordinator, alder):
    invite = edited(coordinator.invite("alder"), control="localhost:9")
    said = alder.types("enrol", invite, code=2)
    assert "The coordinator at localhost:9 cannot be reached" in said
    assert "doctor --invite" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("what", ["for another hospital", "for another key", "of another kind"])
def test_a_certificate_that_is_not_ours_is_not_taken(coordinator, alder, enrolled, what, monkeypatch):
    other = enrolled("birch", like="birch")
    key, name = {
        "for another hospital": (alder.agent / "agent.key", "birch"),
        "for another key": (other.agent / "agent.key", "alder"),
        "of another kind": (alder.agent / "agent.key", "alder"),
    }[what]
    kind = Kind.INVITE if what == "of another kind" else Kind.SITE

    def forged(self, *_):
        public = public_key(read_key(key))
        made = coordinator.consortium.authority.issue(public, kind, name, timedelta(days=1))
        return SimpleNamespace(version="1.0", certificate=made.decode(), roster={})

    monkeypatch.setattr(Control, "enrol", forged)
    with pytest.raises(EnrolmentRefused, match="The coordinator sent a certificate of"):
        enrol(alder.agent, coordinator.invite("alder"))
    assert not (alder.agent / "consortium.json").exists()


def test_a_coordinator_that_knows_us_by_another_key_is_not_believed(coordinator, alder, monkeypatch):
    asked = Control.enrol

    def forged(self, *said):
        answer = asked(self, *said)
        answer.roster["alder"] = coordinator.consortium.signing.public
        return answer

    monkeypatch.setattr(Control, "enrol", forged)
    with pytest.raises(EnrolmentRefused, match="took alder for the holder of another key"):
        enrol(alder.agent, coordinator.invite("alder"))


@pytest.mark.parametrize(
    ("roster", "why"),
    [
        ({"birch": "no key"}, "a list of hospitals that is none"),
        ({"birch\n": "0" * 64}, "a list of hospitals that is none"),
        ({"birch": "0" * 64, "cedar": "0" * 64}, "shows two hospitals with one key"),
    ],
)
def test_a_list_of_hospitals_that_cannot_be_is_one_sentence(coordinator, alder, monkeypatch, roster, why):
    asked = Control.enrol

    def forged(self, *said):
        answer = asked(self, *said)
        answer.roster.update(roster)
        return answer

    monkeypatch.setattr(Control, "enrol", forged)
    assert why in alder.types("enrol", coordinator.invite("alder"), code=1)
    assert not (alder.agent / "consortium.json").exists()


def test_another_major_version_is_refused_with_the_upgrade(coordinator, alder, monkeypatch):
    monkeypatch.setattr("cloister_client.control.spoken", lambda: "7.0 (cloister 7.0.0)")
    said = alder.types("enrol", coordinator.invite("alder"), code=1)
    assert "speaks protocol 7.0" in said
    assert "Upgrade" in said


# --- again -------------------------------------------------------------------------------------------------
def test_a_hospital_that_was_expelled_enrols_again_and_keeps_its_keys_and_peers(coordinator, alder, enrolled):
    enrolled("birch", like="birch")
    enrol(alder.agent, coordinator.invite("alder"))
    before = consortium_of(alder.agent)
    coordinator.expel("alder")
    enrol(alder.agent, coordinator.invite("alder"), again=True)
    assert consortium_of(alder.agent) == before
    assert own_certificate(alder.agent).not_after > datetime.now(UTC)


def test_again_is_for_the_same_consortium(coordinator, alder):
    enrol(alder.agent, coordinator.invite("alder"))
    coordinator.expel("alder")
    invite = edited(coordinator.invite("alder"), signing="0" * 64)
    with pytest.raises(EnrolmentRefused, match=r"in North, signing key .* the invite is of North, signing key"):
        enrol(alder.agent, invite, again=True)


# --- renewal -----------------------------------------------------------------------------------------------
def test_a_certificate_is_due_in_the_last_third_of_its_time():
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    held = SimpleNamespace(not_before=begin, not_after=begin + timedelta(days=90))
    assert not due(held, begin + timedelta(days=59))
    assert due(held, begin + timedelta(days=61))
    assert due(held, begin + timedelta(days=91))


def test_a_certificate_is_renewed_for_the_same_key(coordinator, alder):
    enrol(alder.agent, coordinator.invite("alder"))
    before = own_certificate(alder.agent)
    assert "The certificate of alder is renewed until" in alder.types("renew")
    after = own_certificate(alder.agent)
    assert after.serial != before.serial
    assert after.public_key == before.public_key
    assert [e.what for e in audit.verify(alder.folder / "audit.jsonl")] == ["enrolled", "renewed"]


def test_an_expired_certificate_needs_an_invite(coordinator, alder):
    enrol(alder.agent, coordinator.invite("alder"))
    public = public_key(read_key(alder.agent / "agent.key"))
    made = coordinator.consortium.authority.issue(public, Kind.SITE, "alder", timedelta(minutes=-1))
    (alder.agent / "agent.crt").write_bytes(made)
    with pytest.raises(EnrolmentRefused, match=r"ended on .* cloister-site enrol FILE --again"):
        renew(alder.agent)


def test_an_expelled_hospital_does_not_renew(coordinator, alder):
    enrol(alder.agent, coordinator.invite("alder"))
    coordinator.expel("alder")
    assert "is revoked" in alder.types("renew", code=1)


# --- peers -------------------------------------------------------------------------------------------------
def test_pinning_twice_changes_nothing_and_another_key_is_refused(alone):
    assert pin(alone.agent, alone.roster) == ["cedar"]
    assert pin(alone.agent, alone.roster) == []
    with pytest.raises(EnvelopeRefused, match="birch is shown with another key"):
        pin(alone.agent, {"birch": alone.own.public})
    assert consortium_of(alone.agent).roster == alone.roster


@pytest.mark.parametrize(("name", "why"), [("alder", "is this hospital itself"), ("nobody", "is not pinned here")])
def test_what_cannot_be_forgotten_is_said(coordinator, alder, name, why):
    enrol(alder.agent, coordinator.invite("alder"))
    assert why in alder.types("peers", "--forget", name, code=1)


# --- one sentence ------------------------------------------------------------------------------------------
COMMANDS = [
    ("peers",),
    ("studies",),
    ("show", "x"),
    ("reject", "x", "--reason", "y"),
    ("revoke", "x", "--reason", "y"),
    ("renew",),
    ("service",),
    ("leave",),
    ("start",),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_before_enrolment_every_command_says_how_to_enrol(alder, command):
    said = alder.types(*command, code=1)
    assert "This hospital is not enrolled" in said
    assert "cloister-site enrol FILE" in said
    assert len(said.splitlines()) == 1


def test_a_site_yaml_of_another_name_is_refused_before_anything_is_made(alder, coordinator):
    (alder.folder / "other.yaml").write_text(alder.site.read_text())
    from typer.testing import CliRunner

    from cloister_client.cli import app

    done = CliRunner().invoke(app, ["enrol", "x.invite", "--site", str(alder.folder / "other.yaml")])
    assert done.exit_code == 1
    assert "is called otherwise. Rename it." in done.output


def test_no_agent_runs_where_none_was_started(alone):
    assert not running(alone.agent)
