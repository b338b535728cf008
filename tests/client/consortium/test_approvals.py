"""Approved by hash, by named people with keys of their own; stopped by anybody; and by nothing that was edited."""

import json
import threading
from datetime import UTC, datetime

import pytest

from cloister_client import decisions
from cloister_client.approvals import Approval, Approvals, Held, standing
from cloister_client.decisions import approve, decided, stop
from cloister_client.membership import consortium_of
from cloister_client.offers import receive
from cloister_shared import audit
from cloister_shared.agreement import read_decision, sign_decision
from cloister_shared.envelope import new_identity, read_roster
from cloister_shared.errors import ConsentRefused, EnvelopeRefused, StudyRefused

QUOTE = "c" * 64


@pytest.fixture
def study(alone):
    return receive(alone.agent, alone.news())


@pytest.fixture
def ask(alone):
    return Approvals(alone.agent)


def yes(alone, study, officer="ada", quote=QUOTE):
    identity = alone.officers.get(officer) or alone.officer(officer)
    return approve(alone.agent, study, officer, identity, quote)


def held(study):
    return Held.model_validate_json((study.folder / "decision.json").read_bytes())


def told(alone, what="study.decided"):
    return [entry.said for entry in audit.verify(alone.folder / "audit.jsonl") if entry.what == what]


def two(alone):
    alone.says(policy={"mechanisms": ["none", "site"], "approvals": 2})


# --- yes ---------------------------------------------------------------------------------------------------
def test_nothing_is_approved_that_nobody_approved(alone, study, ask):
    assert ask.standing(study.digest) == "offered"
    assert ask.approved() == []
    with pytest.raises(ConsentRefused, match="three-numbers is not approved here"):
        ask.require(study.digest)


def test_one_officer_approves_and_the_hospital_signs(alone, study, ask):
    assert yes(alone, study).people == ("ada",)
    assert ask.standing(study.digest) == "approved"
    assert ask.require(study.digest) == study.offer
    assert ask.quote(study.digest) == QUOTE
    assert ask.approved() == [study.digest]
    decision = read_decision(held(study).decision, alone.roster)
    assert decision.concerns(study.offer)
    assert (decision.site, decision.decision, decision.people) == ("alder", "approved", ("ada",))
    assert told(alone)[0]["people"] == ["ada"]


def test_approval_pins_the_hospitals_of_the_offer(alone, study):
    yes(alone, study)
    assert read_roster(study.folder / "roster.json") == alone.roster
    assert consortium_of(alone.agent).roster == alone.roster


def test_a_study_that_was_never_offered_is_unknown(alone, ask):
    assert ask.standing("0" * 64) == "unknown"
    with pytest.raises(ConsentRefused, match="No study 000000000000 was offered here"):
        ask.require("0" * 64)


def test_two_people_approve_where_the_policy_says_so(alone, study, ask):
    two(alone)
    first = yes(alone, study, "ada")
    assert (first.said, first.waiting) == ("offered", ("ada",))
    assert ask.standing(study.digest) == "offered"
    assert standing(alone.agent, study.digest).waiting == ("ada",)
    assert not told(alone)
    assert yes(alone, study, "bob").people == ("ada", "bob")
    assert ask.require(study.digest) == study.offer
    assert [said["officer"] for said in told(alone, "study.approval")] == ["ada", "bob"]


def test_the_same_person_does_not_count_twice(alone, study, ask):
    two(alone)
    yes(alone, study, "ada")
    with pytest.raises(ConsentRefused, match="ada approved three-numbers already; the policy demands 2 people"):
        yes(alone, study, "ada")
    assert ask.standing(study.digest) == "offered"


def test_two_approvals_count_together_only_for_one_quote(alone, study, ask):
    two(alone)
    yes(alone, study, "ada", quote="a" * 64)
    assert yes(alone, study, "bob", quote="b" * 64).waiting == ("bob",)
    assert ask.standing(study.digest) == "offered"
    assert yes(alone, study, "ada", quote="b" * 64).said == "approved"
    assert ask.quote(study.digest) == "b" * 64


def test_a_second_approval_after_the_offer_changed_does_not_complete_the_first(alone, study):
    two(alone)
    yes(alone, study, "ada")
    roster = {name: key for name, key in alone.roster.items() if name != "cedar"}
    newer = receive(alone.agent, alone.news(at="2026-11-21T12:00:00+00:00", roster=roster))
    assert yes(alone, newer, "bob").waiting == ("bob",)


def test_an_offer_that_changed_while_the_page_was_read_is_not_approved(alone, study, ask):
    alone.officer("ada")
    roster = {name: key for name, key in alone.roster.items() if name != "cedar"}
    receive(alone.agent, alone.news(at="2026-11-21T12:00:00+00:00", roster=roster))
    with pytest.raises(ConsentRefused, match="was offered with other hospitals since it was shown"):
        yes(alone, study)
    assert ask.standing(study.digest) == "offered"


@pytest.mark.parametrize("officer", ["ada", "eve"])
def test_only_the_pinned_key_of_an_officer_approves(alone, study, officer):
    alone.officer("ada")
    with pytest.raises(EnvelopeRefused, match=f"pins for {officer}"):
        approve(alone.agent, study, officer, new_identity(alone.folder / "eve.key"), QUOTE)
    assert not (study.folder / "decision.json").exists()


def test_an_approved_study_is_not_approved_again(alone, study):
    yes(alone, study)
    with pytest.raises(ConsentRefused, match="is approved already"):
        yes(alone, study)


def test_the_hospitals_policy_comes_first(alone, study):
    alone.says(policy={"mechanisms": ["site"]})
    with pytest.raises(ConsentRefused, match=r"privacy\.mechanism site only, and the plan says none"):
        yes(alone, study)


def test_a_sum_of_too_few_hospitals_is_not_approved(alone):
    roster = {"alder": alone.own.public, "birch": alone.peers["birch"].public}
    plan = alone.plan.replace("secure_sum: false", "secure_sum: true")
    small = receive(alone.agent, alone.news(plan, roster=roster))
    with pytest.raises(ConsentRefused, match="no sum of fewer than 3 hospitals, and the study has 2"):
        yes(alone, small)


def test_a_peers_key_that_changed_since_the_offer_came_stops_the_approval(alone, study):
    known = consortium_of(alone.agent)
    roster = known.roster | {"cedar": new_identity(alone.folder / "other.key").public}
    (alone.agent / "consortium.json").write_text(known.model_copy(update={"roster": roster}).model_dump_json())
    with pytest.raises(EnvelopeRefused, match="cedar is shown with another key"):
        yes(alone, study)


# --- no ----------------------------------------------------------------------------------------------------
def test_anybody_stops_a_study_and_it_may_be_approved_again(alone, study, ask):
    yes(alone, study)
    stop(alone.agent, study.digest, "revoked", "the board said so", "account root")
    assert ask.standing(study.digest) == "revoked"
    with pytest.raises(ConsentRefused, match="was revoked by account root on"):
        ask.require(study.digest)
    assert ask.approved() == []
    yes(alone, study)
    assert ask.require(study.digest) == study.offer
    assert [said["decision"] for said in told(alone)] == ["approved", "revoked", "approved"]
    assert told(alone)[1]["reason"] == "the board said so"


def test_a_rejected_study_may_be_approved_later(alone, study, ask):
    stop(alone.agent, study.digest, "rejected", "not now", "account root")
    assert ask.standing(study.digest) == "rejected"
    yes(alone, study)
    assert ask.standing(study.digest) == "approved"


@pytest.mark.parametrize(
    ("before", "decision", "why"),
    [
        ((), "revoked", "is not approved here"),
        (("rejected",), "rejected", "is rejected already"),
        (("approved",), "rejected", "is approved"),
        (("approved", "revoked"), "revoked", "is revoked already"),
        (("approved", "revoked"), "rejected", "is revoked"),
    ],
)
def test_a_stop_that_makes_no_sense_says_so(alone, study, before, decision, why):
    for said in before:
        if said == "approved":
            yes(alone, study)
        else:
            stop(alone.agent, study.digest, said, "", "account root")
    with pytest.raises(ConsentRefused, match=why):
        stop(alone.agent, study.digest, decision, "", "account root")


def test_one_approval_of_two_is_void_after_a_rejection(alone, study):
    two(alone)
    yes(alone, study, "ada")
    stop(alone.agent, study.digest, "rejected", "", "account root")
    assert yes(alone, study, "bob").waiting == ("bob",)


def test_a_revocation_needs_no_audit_log_to_be_whole(alone, study, ask):
    yes(alone, study)
    log = alone.folder / "audit.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"ada"', b'"eve"'))
    with pytest.raises(Exception, match="is not what was written"):
        stop(alone.agent, study.digest, "revoked", "", "account root")
    assert ask.standing(study.digest) == "revoked"


def test_a_decision_file_that_is_damaged_keeps_nobody_from_stopping(alone, study, ask):
    yes(alone, study)
    (study.folder / "decision.json").write_text("{")
    assert ask.standing(study.digest) == "unknown"
    stop(alone.agent, study.digest, "revoked", "", "account root")
    assert ask.standing(study.digest) == "revoked"


def test_a_reason_of_two_lines_is_refused(alone, study):
    with pytest.raises(ConsentRefused, match="not one line"):
        stop(alone.agent, study.digest, "rejected", "no\nbut yes", "account root")


def test_a_later_decision_is_later_though_the_clock_went_back(alone, study, monkeypatch):
    yes(alone, study)
    first = read_decision(held(study).decision, alone.roster)
    monkeypatch.setattr(decisions, "_now", lambda: "2020-01-01T00:00:00.000000+00:00")
    stop(alone.agent, study.digest, "revoked", "", "account root")
    second = read_decision(held(study).decision, alone.roster)
    yes(alone, study)
    third = read_decision(held(study).decision, alone.roster)
    assert first.at < second.at < third.at


# --- attacks on what lies on disk --------------------------------------------------------------------------
def flipped(path, at):
    octets = bytearray(path.read_bytes())
    octets[at] ^= 1
    path.write_bytes(bytes(octets))


@pytest.mark.parametrize("name", ["decision.json", "offer.json", "roster.json"])
def test_a_flipped_bit_anywhere_refuses(alone, study, ask, name):
    """Every 7th octet of each file: in a signature, in a name, anywhere."""
    yes(alone, study)
    path = study.folder / name
    whole = path.read_bytes()
    survived = []
    for at in range(0, len(whole), 7):
        flipped(path, at)
        try:
            ask.require(study.digest)
            survived.append(at)
        except ConsentRefused:
            pass
        path.write_bytes(whole)
    assert ask.require(study.digest) == study.offer
    # JSON's own freedom: white space between tokens may be another white space.
    assert all(whole[at : at + 1].isspace() for at in survived), [whole[at : at + 20] for at in survived]


@pytest.mark.parametrize("name", ["offer.json", "roster.json", "decision.json"])
def test_a_file_that_is_gone_refuses(alone, study, ask, name):
    yes(alone, study)
    (study.folder / name).unlink()
    with pytest.raises(ConsentRefused):
        ask.require(study.digest)


def put(alone, study, *, by=None, approvals=None, **changes):
    """A decision as somebody would who has the hospital's own key, and can write its files and its log."""
    lies = held(study)
    decision = read_decision(lies.decision, alone.roster)
    signed = sign_decision(by or alone.own, decision.model_copy(update=changes))
    made = Held(decision=signed, approvals=lies.approvals if approvals is None else approvals)
    (study.folder / "decision.json").write_text(made.model_dump_json())
    said = {"plan": study.digest, "envelope": made.digest}
    audit.append(alone.folder / "audit.jsonl", "study.decided", said)
    return made


def approval(alone, study, officer, by, **changes):
    terms = {
        "site": "alder",
        "plan": study.digest,
        "roster": study.roster,
        "quote": QUOTE,
        "after": held(study).digest,
        "officer": officer,
        "at": datetime.now(UTC).isoformat(),
    }
    return Approval(**(terms | changes)).signed(by)


def test_the_attacks_below_fail_by_what_they_change_alone(alone, study, ask):
    """With nothing but honest approvals, what ``put`` writes is accepted."""
    yes(alone, study)
    put(alone, study, approvals=(approval(alone, study, "ada", alone.officers["ada"]),))
    assert ask.require(study.digest) == study.offer


DECISIONS = {
    "signed by another key": (
        lambda a, s: {"by": new_identity(a.folder / "x.key")},
        "signed by a key that is not pinned",
    ),
    "in the name of a peer": (lambda a, s: {"site": "birch"}, "in another hospital's name"),
    "upon another plan": (lambda a, s: {"plan": "0" * 64}, "another plan"),
    "upon other hospitals": (lambda a, s: {"roster": "0" * 64}, "or other hospitals"),
    "naming somebody else": (lambda a, s: {"people": ("eve",)}, "of the people whom it names"),
    "naming one person more": (lambda a, s: {"people": ("ada", "eve")}, "of the people whom it names"),
    "without approvals": (lambda a, s: {"approvals": ()}, "of the people whom it names"),
    "the same approval twice": (
        lambda a, s: {"approvals": held(s).approvals * 2, "people": ("ada", "ada")},
        "of the people whom it names",
    ),
}


@pytest.mark.parametrize("name", DECISIONS)
def test_a_forged_decision_refuses(alone, study, ask, name):
    yes(alone, study)
    changes, why = DECISIONS[name]
    put(alone, study, **changes(alone, study))
    with pytest.raises(ConsentRefused, match=why):
        ask.require(study.digest)


APPROVALS = {
    "by an unpinned key": (lambda a, s: approval(a, s, "ada", a.own), "signed by a key that is not pinned"),
    "in another officer's name": (lambda a, s: approval(a, s, "ada", a.officers["bob"]), "in the name of ada"),
    "upon another plan": (lambda a, s: approval(a, s, "ada", a.officers["ada"], plan="0" * 64), "something else"),
    "upon other hospitals": (lambda a, s: approval(a, s, "ada", a.officers["ada"], roster="0" * 64), "something else"),
    "at another hospital": (lambda a, s: approval(a, s, "ada", a.officers["ada"], site="birch"), "something else"),
    "from before a revocation": (lambda a, s: approval(a, s, "ada", a.officers["ada"], after=""), "audit log"),
    "for another purpose": (lambda a, s: a.officers["ada"].sign("ceiling", b"{}"), "was shown as approval"),
    "unreadable": (lambda a, s: a.officers["ada"].sign("approval", b"{}"), "cannot be read"),
}


@pytest.mark.parametrize("name", APPROVALS)
def test_a_forged_approval_refuses(alone, study, ask, name):
    yes(alone, study)
    alone.officer("bob")
    make, why = APPROVALS[name]
    put(alone, study, approvals=(make(alone, study),))
    with pytest.raises(ConsentRefused, match=why):
        ask.require(study.digest)


def test_two_approvals_for_different_quotes_refuse(alone, study, ask):
    yes(alone, study, "ada")
    bob = alone.officer("bob")
    both = [approval(alone, study, n, i, quote=q) for n, i, q in
            (("ada", alone.officers["ada"], "a" * 64), ("bob", bob, "b" * 64))]  # fmt: skip
    put(alone, study, approvals=tuple(both), people=("ada", "bob"))
    with pytest.raises(ConsentRefused, match="something else"):
        ask.require(study.digest)


def test_a_file_from_before_a_revocation_is_none(alone, study, ask):
    yes(alone, study)
    before = {path: path.read_bytes() for path in study.folder.glob("*.json")}
    stop(alone.agent, study.digest, "revoked", "", "account root")
    for path, octets in before.items():
        path.write_bytes(octets)
    with pytest.raises(ConsentRefused, match="The audit log does not tell of the decision"):
        ask.require(study.digest)
    yes(alone, study)  # and an honest approval puts it in order
    assert ask.require(study.digest) == study.offer


def test_a_decision_that_the_log_was_never_told_of_is_none(alone, study, ask):
    yes(alone, study)
    decision = read_decision(held(study).decision, alone.roster)
    again = sign_decision(alone.own, decision.model_copy(update={"reason": "signed by whoever has the key"}))
    (study.folder / "decision.json").write_text(Held(decision=again, approvals=held(study).approvals).model_dump_json())
    with pytest.raises(ConsentRefused, match="The audit log does not tell of the decision"):
        ask.require(study.digest)


def test_an_officer_who_is_unpinned_approved_nothing(alone, study, ask):
    yes(alone, study)
    (alone.folder / "officers.json").write_text("{}")
    assert ask.standing(study.digest) == "unknown"
    with pytest.raises(ConsentRefused, match="signed by a key that is not pinned"):
        ask.require(study.digest)


def test_a_policy_that_demands_more_than_approved_stops_the_study(alone, study, ask):
    yes(alone, study)
    two(alone)
    assert ask.standing(study.digest) == "unknown"
    with pytest.raises(ConsentRefused, match="1 approved it, and the policy of alder demands 2"):
        ask.require(study.digest)
    stop(alone.agent, study.digest, "revoked", "", "account root")
    assert ask.standing(study.digest) == "revoked"


def test_a_decision_of_another_study_is_none_of_this_one(alone, study, ask):
    yes(alone, study)
    second = receive(alone.agent, alone.news(alone.plan + "version: 2\n"))
    for name in ("decision.json", "roster.json"):
        (second.folder / name).write_bytes((study.folder / name).read_bytes())
    assert ask.standing(second.digest) == "unknown"
    assert ask.approved() == [study.digest]
    with pytest.raises(ConsentRefused):
        ask.require(second.digest)


def test_an_offer_that_came_after_the_approval_with_other_hospitals_changes_nothing(alone, study, ask):
    yes(alone, study)
    roster = {name: key for name, key in alone.roster.items() if name != "cedar"}
    newer = alone.news(at="2026-11-21T12:00:00+00:00", roster=roster)
    with pytest.raises(EnvelopeRefused, match="names other hospitals than the one that was approved"):
        receive(alone.agent, newer)
    assert ask.require(study.digest) == study.offer
    stop(alone.agent, study.digest, "revoked", "", "account root")
    assert set(receive(alone.agent, newer).offer.roster) == {"alder", "birch"}


# --- crashes -----------------------------------------------------------------------------------------------
class Crashed(Exception):
    pass


def crash(*_args, **_kwargs):
    raise Crashed


@pytest.mark.parametrize("before", ["pin", "save_roster", "tell", "_save"])
def test_a_crash_while_approving_approves_nothing_and_is_mended_by_doing_it_again(
    alone, study, ask, before, monkeypatch
):
    with monkeypatch.context() as broken:
        broken.setattr(decisions, before, crash)
        with pytest.raises(Crashed):
            yes(alone, study)
    assert ask.standing(study.digest) == "offered"
    with pytest.raises(ConsentRefused):
        ask.require(study.digest)
    yes(alone, study)
    assert ask.require(study.digest) == study.offer


def test_a_crash_while_revoking_has_revoked_and_the_log_is_told_before_the_coordinator(alone, study, ask, monkeypatch):
    yes(alone, study)
    with monkeypatch.context() as broken:
        broken.setattr(decisions, "tell", crash)
        with pytest.raises(Crashed):
            stop(alone.agent, study.digest, "revoked", "", "account root")
    assert ask.standing(study.digest) == "revoked"
    assert len(told(alone)) == 1
    said, envelope = decided(alone.agent, study.digest)
    assert said == "revoked"
    assert read_decision(envelope, alone.roster).decision == "revoked"
    assert [said["decision"] for said in told(alone)] == ["approved", "revoked"]
    yes(alone, study)
    assert ask.require(study.digest) == study.offer


def test_two_officers_at_once_make_one_decision(alone, study, ask):
    two(alone)
    for name in ("ada", "bob"):
        alone.officer(name)
    threads = [threading.Thread(target=yes, args=(alone, study, name)) for name in ("ada", "bob")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ask.require(study.digest) == study.offer
    assert len(told(alone)) == 1


# --- what is sent ------------------------------------------------------------------------------------------
def test_nothing_is_sent_before_something_is_decided(alone, study):
    two(alone)
    assert decided(alone.agent, study.digest) == ("", "")
    yes(alone, study, "ada")
    assert decided(alone.agent, study.digest) == ("", "")


def test_what_does_not_hold_is_not_sent(alone, study):
    yes(alone, study)
    (study.folder / "roster.json").write_text(json.dumps({"alder": alone.own.public}))
    with pytest.raises(ConsentRefused):
        decided(alone.agent, study.digest)


def test_a_decision_cannot_be_taken_upon_what_was_never_offered(alone):
    with pytest.raises(StudyRefused, match="was offered here"):
        stop(alone.agent, "0" * 64, "rejected", "", "account root")
