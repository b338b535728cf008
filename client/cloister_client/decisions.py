"""Deciding upon a study: officers approve with their own keys; anybody with the agent's account may stop it.

What is decided is on disk and in the audit log before the coordinator hears of it, and needs no coordinator.
"""

from __future__ import annotations

import getpass
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from cloister_client import membership
from cloister_client.approvals import (
    Approval,
    Approvals,
    Held,
    Standing,
    held_in,
    policy,
    signed,
    tell,
    told,
    waiting,
    whole,
)
from cloister_client.ceilings import officers_of
from cloister_client.consent import consent
from cloister_client.membership import consortium_of, hold_against, pin
from cloister_client.offers import Study, study_of
from cloister_shared import durable
from cloister_shared.agreement import Decision, sign_decision
from cloister_shared.envelope import Identity, read_identity, save_roster
from cloister_shared.errors import CloisterError, ConsentRefused, EnvelopeRefused


def admissible(agent: Path, study: Study) -> None:
    """Hold a study against the hospital's own policy and the pinned keys, before anybody is asked to approve it.

    Raises:
        ConsentRefused: the policy does not allow it.
        EnvelopeRefused: a hospital is shown with another key than the pinned one.
    """
    own, site = policy(agent), consortium_of(agent).site
    consent(own, study.plan, site)
    if study.plan.aggregation.secure_sum and len(study.offer.roster) < own.min_cohort:
        raise ConsentRefused(
            f"{site} helps to open no sum of fewer than {own.min_cohort} hospitals, and the study has"
            f" {len(study.offer.roster)}.",
            mend="Have it offered to more hospitals; or write policy: {min_cohort: N} in the hospital's site.yaml.",
        )
    hold_against(consortium_of(agent).roster, study.offer.roster)


def approve(agent: Path, study: Study, officer: str, identity: Identity, quote: str) -> Standing:
    """Approve a study as ``officer``; with enough approvals the hospital's decision is signed and the hospitals pinned.

    ``study`` is the one that the officer was shown, and ``quote`` the digest of the quote beside it.

    Raises:
        ConsentRefused: the policy does not allow it; this officer approved it already; it is approved; or it changed
            since it was shown.
        EnvelopeRefused: the key is not the one that is pinned for the officer, or a peer's key changed.
        StudyRefused: there is no such study.
    """
    admissible(agent, study)
    if officers_of(agent.parent).get(officer) != identity.public:
        raise EnvelopeRefused(
            f"That is not the key that {agent.parent / 'officers.json'} pins for {officer}.",
            mend="Give the officer's own key; cloister-site budget officer NAME pins a new officer.",
        )
    with durable.locked(study.folder / "decision.json"):
        if study_of(agent, study.digest).roster != study.roster:
            raise ConsentRefused(
                f"{study.plan.study} was offered with other hospitals since it was shown.",
                mend="Read it again: cloister-site show STUDY.",
            )
        _refuse_twice(agent, study)
        made = Approval(
            site=consortium_of(agent).site,
            plan=study.digest,
            roster=study.roster,
            quote=quote,
            after=["", *told(agent, study.digest)][-1],
            officer=officer,
            at=_now(),
        )
        before = _readable(study)
        # Those upon the very same thing: with another quote, other hospitals or an older decision they do not count.
        same = {
            name: envelope
            for name, (said, envelope) in waiting(agent, before).items()
            if said.model_copy(update={"officer": officer, "at": made.at}) == made
        }
        if officer in same:
            raise ConsentRefused(
                f"{officer} approved {study.plan.study} already; the policy demands {policy(agent).approvals} people.",
                mend="Have another officer approve it: cloister-site approve STUDY --officer NAME --key FILE.",
            )
        said = {"plan": study.digest, "study": study.plan.study, "officer": officer, "quote": quote}
        membership.tell(agent, "study.approval", said)
        people, approvals = (*same, officer), (*same.values(), made.signed(identity))
        if len(people) < policy(agent).approvals:
            _save(study, Held(decision=before.decision, approvals=approvals))
            return Standing("offered", waiting=people)
        pin(agent, study.offer.roster)
        save_roster(study.folder / "roster.json", study.offer.roster)
        decision = _decision(agent, study, before, "approved", people)
        held = Held(decision=sign_decision(read_identity(agent / "identity.key"), decision), approvals=approvals)
        tell(agent, study, decision, held)  # first, so that nothing ever runs which the log does not name
        _save(study, held)
    return Standing("approved", people, decision.at)


def _refuse_twice(agent: Path, study: Study) -> None:
    try:
        whole(agent, study.digest)
    except CloisterError:
        return  # not approved, or what lies here does not hold: both are put in order by approving
    raise ConsentRefused(f"{study.plan.study} is approved already.", mend="There is nothing to do.")


def _readable(study: Study) -> Held:
    try:
        return held_in(study.folder)
    except EnvelopeRefused:
        return Held()


def stop(agent: Path, digest: str, decision: Literal["rejected", "revoked"], reason: str, who: str) -> Standing:
    """Reject a study that is not approved, or revoke one that is. Nobody's key is needed; on disk when this returns.

    Raises:
        ConsentRefused: it is approved, and to be revoked; or is not, and to be rejected; or it was done before.
        StudyRefused: there is no such study.
        AuditBroken: it is done, and the log could not be told.
    """
    study = study_of(agent, digest)
    with durable.locked(study.folder / "decision.json"):
        now, name = Approvals(agent).standing(digest), study.plan.study
        if now == decision:
            raise ConsentRefused(f"{name} is {now} already.", mend="There is nothing to do.")
        if decision == "revoked" and now in ("offered", "rejected"):
            raise ConsentRefused(f"{name} is not approved here.", mend="To say no to it, type cloister-site reject.")
        if decision == "rejected" and now in ("approved", "revoked"):
            mend = "Type cloister-site revoke, to end it." if now == "approved" else "There is nothing to do."
            raise ConsentRefused(f"{name} is {now}.", mend=mend)
        said = _decision(agent, study, _readable(study), decision, (who,), reason)
        held = Held(decision=sign_decision(read_identity(agent / "identity.key"), said))
        _save(study, held)  # first, so that a log that cannot be written keeps nobody from stopping
        (study.folder / "roster.json").unlink(missing_ok=True)
        tell(agent, study, said, held)
    return Standing(decision, said.people, said.at, reason)


def decided(agent: Path, digest: str) -> tuple[str, str]:
    """What this hospital says now, "" before it said anything, and the envelope to send; the log knows of it.

    Raises:
        ConsentRefused: what lies here is not what was signed.
        AuditBroken: the log was changed.
    """
    study = study_of(agent, digest)
    with durable.locked(study.folder / "decision.json"):
        held = held_in(study.folder)
        decision = signed(agent, held)
        if decision is None or decision.plan != digest:
            return "", ""
        if decision.decision == "approved":
            Approvals(agent).require(digest)
        else:
            tell(agent, study, decision, held)  # where the machine stopped between file and log
        return decision.decision, held.decision


def _decision(
    agent: Path,
    study: Study,
    before: Held,
    decision: Literal["approved", "rejected", "revoked"],
    people: tuple[str, ...],
    reason: str = "",
) -> Decision:
    try:
        return Decision(
            site=consortium_of(agent).site,
            plan=study.digest,
            roster=study.roster,
            decision=decision,
            people=people,
            at=_after(agent, before),
            reason=reason,
        )
    except ValidationError:
        raise ConsentRefused(
            "The reason is not one line of at most 500 characters.", mend="Write a shorter one; keep details elsewhere."
        ) from None


def _save(study: Study, held: Held) -> None:
    durable.save_text(study.folder / "decision.json", held.model_dump_json(indent=1))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _after(agent: Path, before: Held) -> str:
    """Now, but later than the decision before, whatever the clock did: the coordinator takes no older approval."""
    try:
        last = signed(agent, before)
    except EnvelopeRefused:
        last = None
    if last is None:
        return _now()
    return max(_now(), (datetime.fromisoformat(last.at) + timedelta(microseconds=1)).isoformat(timespec="microseconds"))


def account() -> str:
    """Who types: the account of this machine, for what needs no key."""
    try:
        return f"account {getpass.getuser()}"
    except (KeyError, OSError):  # an account without a name, as containers have them
        return f"account {os.getuid()}"
