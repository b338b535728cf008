"""Studies as they arrive: the coordinator's, for this hospital, with hospitals whose keys are pinned; or nothing."""

import pytest

from cloister_client import membership
from cloister_client.offers import called, receive, studies_of, study_of
from cloister_shared import audit
from cloister_shared.control_pb2 import StudyNews
from cloister_shared.envelope import key_id, new_identity
from cloister_shared.errors import EnvelopeRefused, PlanRefused, Refusal, StudyRefused


def told(alone, what):
    return [entry.said for entry in audit.verify(alone.folder / "audit.jsonl") if entry.what == what]


def test_an_offer_is_kept_and_told(alone):
    study = receive(alone.agent, alone.news())
    assert study_of(alone.agent, study.digest) == study
    assert [found.digest for found in studies_of(alone.agent)[0]] == [study.digest]
    (said,) = told(alone, "study.offered")
    assert said["hospitals"] == {name: key_id(key) for name, key in alone.roster.items()}
    assert said["by"] == "a researcher"


def test_what_arrives_again_is_told_once(alone):
    news = alone.news()
    for _ in range(3):
        receive(alone.agent, news)
    assert len(told(alone, "study.offered")) == 1


def test_news_is_kept_for_when_the_coordinator_is_away(alone):
    news = alone.news()
    news.state, news.round, news.rounds, news.reason = "waiting", 2, 3, "too few"
    news.took_part.extend(["alder", "birch"])
    study = receive(alone.agent, news)
    kept = study_of(alone.agent, study.digest).news
    assert (kept.state, kept.round, kept.rounds, kept.reason) == ("waiting", 2, 3, "too few")
    assert kept.took_part == ("alder", "birch")


def other(alone, name="x"):
    return new_identity(alone.folder / f"{name}.key")


ATTACKS = {
    "signed by another key": (lambda a: a.news(by=other(a)), "signed by a key that is not pinned"),
    "signed by a peer": (lambda a: a.news(by=a.peers["birch"]), "signed by a key that is not pinned"),
    "another consortium's": (lambda a: a.news(consortium="South"), "is of South, not of North"),
    "digest of another plan": (lambda a: a.news(digest="0" * 64), "and shows another"),
    "said to be of another study": (
        lambda a: StudyNews(digest="0" * 64, offer=a.news().offer),
        "said to be of study 000000000000",
    ),
    "a known peer's key changed": (
        lambda a: a.news(roster=a.roster | {"birch": other(a).public}),
        "birch is shown with another key than the one pinned here",
    ),
    "a known peer's key under another name": (
        lambda a: a.news(roster={"alder": a.own.public, "willow": a.peers["birch"].public}),
        "willow is shown with the key of birch",
    ),
    "own identity swapped": (
        lambda a: a.news(roster=a.roster | {"alder": other(a).public}),
        "which is not its own",
    ),
    "own identity swapped with a peer's": (
        lambda a: a.news(roster=a.roster | {"alder": a.peers["birch"].public, "birch": a.own.public}),
        "which is not its own",
    ),
    "not for this hospital": (
        lambda a: a.news(roster={n: k for n, k in a.roster.items() if n != "alder"}),
        "names alder not at all",
    ),
    "no offer": (lambda a: StudyNews(digest="0" * 64, offer=""), "no signed envelope"),
    "a decision in place of an offer": (
        lambda a: StudyNews(digest="0" * 64, offer=a.signing.sign("decision", b"{}")),
        "was shown as offer",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_offer_that_fails_leaves_nothing_but_one_line_in_the_log(alone, name):
    attack, why = ATTACKS[name]
    news = attack(alone)
    for _ in range(2):
        with pytest.raises(EnvelopeRefused, match=why):
            receive(alone.agent, news)
    assert not list(alone.agent.glob("studies/*"))
    assert not told(alone, "study.offered")
    (said,) = told(alone, "study.refused")
    assert why in said["why"]


def test_a_plan_that_this_release_cannot_read_is_refused_and_told(alone):
    plan = alone.plan.replace("rounds: 3", "rounds: 3\nteleport: yes")
    with pytest.raises(PlanRefused, match="teleport"):
        receive(alone.agent, alone.news(plan, digest="1" * 64))
    assert "teleport" in told(alone, "study.refused")[0]["why"]


def test_a_changed_key_names_both_fingerprints_and_is_taken_only_once_it_was_forgotten(alone):
    changed = other(alone)
    news = alone.news(roster=alone.roster | {"birch": changed.public})
    with pytest.raises(EnvelopeRefused) as refused:
        receive(alone.agent, news)
    assert key_id(alone.peers["birch"].public) in str(refused.value)
    assert key_id(changed.public) in str(refused.value)
    assert "cloister-site peers --forget birch" in str(refused.value)
    membership.forget(alone.agent, "birch")
    assert receive(alone.agent, news).offer.roster["birch"] == changed.public
    assert told(alone, "peers.forgotten") == [{"birch": key_id(alone.peers["birch"].public)}]


def test_arrival_pins_nobody(alone):
    receive(alone.agent, alone.news())
    assert "cedar" not in membership.consortium_of(alone.agent).roster


def test_an_older_offer_is_not_taken_after_a_newer_one(alone):
    receive(alone.agent, alone.news(at="2026-11-21T11:00:00+00:00"))
    with pytest.raises(EnvelopeRefused, match="is older"):
        receive(alone.agent, alone.news(at="2026-11-21T10:00:00+00:00", roster=_without_cedar(alone)))


def test_a_newer_offer_takes_the_place_of_one_that_nobody_approved(alone):
    receive(alone.agent, alone.news(at="2026-11-21T10:00:00+00:00"))
    study = receive(alone.agent, alone.news(at="2026-11-21T11:00:00+00:00", roster=_without_cedar(alone)))
    assert set(study_of(alone.agent, study.digest).offer.roster) == {"alder", "birch"}


def _without_cedar(alone):
    return {name: key for name, key in alone.roster.items() if name != "cedar"}


def test_an_offer_that_was_edited_on_disk_is_named_and_not_listed(alone):
    study = receive(alone.agent, alone.news())
    path = study.folder / "offer.json"
    path.write_text(path.read_text().replace('"sig":"', '"sig":"A', 1))
    found, broken = studies_of(alone.agent)
    assert not found
    assert str(path) in broken[0]
    with pytest.raises(EnvelopeRefused):
        study_of(alone.agent, study.digest)


def test_an_edited_offer_is_mended_by_the_coordinators_own(alone):
    study = receive(alone.agent, alone.news())
    (study.folder / "offer.json").write_text("{}")
    receive(alone.agent, alone.news())
    assert study_of(alone.agent, study.digest) == study


def test_a_study_is_called_by_name_or_digest(alone):
    study = receive(alone.agent, alone.news())
    assert called(alone.agent, "three-numbers") == study
    assert called(alone.agent, study.digest[:8]) == study
    for wrong in ("four-numbers", study.digest[:5], ""):
        with pytest.raises(StudyRefused, match="No study called"):
            called(alone.agent, wrong)


def test_two_versions_of_a_study_are_told_apart_by_digest(alone):
    first = receive(alone.agent, alone.news())
    second = receive(alone.agent, alone.news(alone.plan + "version: 2\n"))
    with pytest.raises(Refusal, match="2 studies are called three-numbers") as refused:
        called(alone.agent, "three-numbers")
    assert first.digest[:12] in str(refused.value)
    assert called(alone.agent, second.digest[:12]) == second
