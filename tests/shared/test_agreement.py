"""Offers and decisions: who signed what, upon which terms and which hospitals."""

import base64
import json

import pytest

from cloister_shared.agreement import (
    Decision,
    Offer,
    read_decision,
    read_offer,
    roster_digest,
    sign_decision,
    sign_offer,
)
from cloister_shared.envelope import Identity, new_identity
from cloister_shared.errors import EnvelopeRefused, PlanRefused
from cloister_shared.plan_file import read_plan

PLAN = """
study: three
title: Three hospitals
task: {name: tabular}
table:
  features: [{name: age, kind: number, range: [0, 100]}]
  target: {name: died, positive: 1, negative: 0}
rounds: 4
strategy: {name: fedavg}
training: {learning_rate: 0.1, batch_size: 8, local_steps: 1}
privacy: {mechanism: none}
"""
AT = "2026-11-21T10:00:00+00:00"


@pytest.fixture
def coordinator(tmp_path) -> Identity:
    return new_identity(tmp_path / "coordinator.key")


@pytest.fixture
def mary(tmp_path) -> Identity:
    return new_identity(tmp_path / "mary.key")


@pytest.fixture
def offer(mary) -> Offer:
    return Offer(
        consortium="Heart consortium",
        plan=PLAN,
        file="three.yaml",
        digest=read_plan(PLAN).digest,
        roster={"St Mary's": mary.public, "Ash": "ab" * 32},
        submitted_by="ann",
        at=AT,
    )


@pytest.fixture
def approval(offer) -> Decision:
    return Decision(
        site="St Mary's",
        plan=offer.digest,
        roster=roster_digest(offer.roster),
        decision="approved",
        people=("Dr Áine Byrne", "J. Smith"),
        at=AT,
        reason="seen on Tuesday",
    )


def changed(identity: Identity, said: Offer | Decision, **terms: object) -> str:
    """A well signed envelope whose terms no honest party would write."""
    payload = {**json.loads(said.model_dump_json()), **terms}
    return identity.sign(type(said).__name__.lower(), json.dumps(payload).encode())


# --- the offer -----------------------------------------------------------------------------------------------
def test_an_offer_comes_back_with_its_plan(coordinator, offer):
    read, plan = read_offer(sign_offer(coordinator, offer), coordinator.public)
    assert read == offer
    assert plan == read_plan(PLAN)


def test_an_offer_of_anybody_else_is_refused(mary, coordinator, offer):
    with pytest.raises(EnvelopeRefused, match="not pinned here"):
        read_offer(sign_offer(mary, offer), coordinator.public)


def test_an_offer_that_was_changed_on_the_way_is_refused(coordinator, offer):
    held = json.loads(sign_offer(coordinator, offer))
    held["payload"] = base64.b64encode(offer.model_dump_json().replace("three.yaml", "other.yaml").encode()).decode()
    with pytest.raises(EnvelopeRefused, match="its key did not make"):
        read_offer(json.dumps(held), coordinator.public)


def test_an_offer_shows_the_plan_that_it_names(coordinator, offer):
    envelope = changed(coordinator, offer, plan=PLAN.replace("rounds: 4", "rounds: 400"))
    with pytest.raises(EnvelopeRefused, match="shows another"):
        read_offer(envelope, coordinator.public)


def test_an_offer_of_a_plan_that_cannot_be_read_says_which_line(coordinator, offer):
    with pytest.raises(PlanRefused, match=r"three\.yaml line 9: strategy\.name"):
        read_offer(changed(coordinator, offer, plan=PLAN.replace("fedavg", "magic")), coordinator.public)


ODD_OFFERS = {
    "one key twice": ({"roster": {"Ash": "ab" * 32, "Oak": "ab" * 32}}, "one key under two hospitals"),
    "one hospital": ({"roster": {"Ash": "ab" * 32}}, "at least 2 items"),
    "no name": ({"roster": {"Ash": "ab" * 32, "../oak": "cd" * 32}}, "a name is letters"),
    "no key": ({"roster": {"Ash": "ab" * 32, "Oak": "cd"}}, "Oak"),
    "another term": ({"waive": True}, "waive"),
    "a second line": ({"submitted_by": "ann\napproved by all"}, "submitted_by"),
    "no time": ({"at": "yesterday"}, "at: "),
}


@pytest.mark.parametrize(("terms", "why"), ODD_OFFERS.values(), ids=ODD_OFFERS)
def test_an_odd_offer_is_refused(coordinator, offer, terms, why):
    with pytest.raises(EnvelopeRefused, match=why):
        read_offer(changed(coordinator, offer, **terms), coordinator.public)


# --- the decision --------------------------------------------------------------------------------------------
def test_a_decision_comes_back_and_concerns_its_offer(mary, offer, approval):
    read = read_decision(sign_decision(mary, approval), offer.roster)
    assert read == approval
    assert read.concerns(offer)


@pytest.mark.parametrize(
    "terms", [{"plan": "0" * 64}, {"roster": "0" * 64}, {"site": "Elm"}], ids=["plan", "roster", "hospital"]
)
def test_a_decision_upon_anything_else_does_not_concern_the_offer(offer, approval, terms):
    assert not approval.model_copy(update=terms).concerns(offer)


def test_nobody_decides_for_another_hospital(mary, offer, approval):
    with pytest.raises(EnvelopeRefused, match="St Mary's signed a decision in another hospital's name"):
        read_decision(changed(mary, approval, site="Ash"), offer.roster)


def test_a_hospital_that_is_not_in_the_roster_decides_nothing(mary, offer, approval):
    with pytest.raises(EnvelopeRefused, match="not pinned here"):
        read_decision(sign_decision(mary, approval), {"Ash": offer.roster["Ash"]})


def test_an_offer_is_no_decision(mary, offer):
    with pytest.raises(EnvelopeRefused, match="was shown as decision"):
        read_decision(sign_offer(mary, offer), offer.roster)


ODD_DECISIONS = {
    "another word": ({"decision": "maybe"}, "decision: "),
    "nobody": ({"people": []}, "people: "),
    "a number": ({"reason": 3}, "reason: "),
    "a second line": ({"reason": "no\x85yes"}, "reason: "),
}


@pytest.mark.parametrize(("terms", "why"), ODD_DECISIONS.values(), ids=ODD_DECISIONS)
def test_an_odd_decision_is_refused(mary, offer, approval, terms, why):
    with pytest.raises(EnvelopeRefused, match=why):
        read_decision(changed(mary, approval, **terms), offer.roster)


def test_the_digest_of_a_roster_does_not_depend_on_its_order(offer):
    backwards = dict(reversed(offer.roster.items()))
    assert roster_digest(backwards) == roster_digest(offer.roster)
    assert roster_digest({**offer.roster, "Ash": "cd" * 32}) != roster_digest(offer.roster)
