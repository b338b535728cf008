"""Whether this hospital approved a study: read from its files at every question, every signature verified.

An officer's approval is an envelope under their own key over the plan, the hospitals, the quote and what was decided
before it, so it counts for nothing else and not twice. As many as the policy demands make the hospital's decision,
which its own key signs. Each decision is in the audit log, and the last one there is the one that counts: a file that
was put back from before a revocation is none. Decisions are made in ``decisions``.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cloister_client.ceilings import officers_of
from cloister_client.consent import Policy
from cloister_client.membership import consortium_of
from cloister_client.offers import Study, study_folder, study_of
from cloister_client.site_file import read_site
from cloister_shared import audit
from cloister_shared.agreement import Decision, Digest, Line, Moment, Offer, read_decision
from cloister_shared.envelope import Identity, Roster, read_identity, read_roster, verify
from cloister_shared.errors import CloisterError, ConsentRefused, EnvelopeRefused
from cloister_shared.names import SiteName

log = logging.getLogger("cloister.site")

_PURPOSE = "approval"

DECIDED = "study.decided"
"""Of the audit log."""

_APPROVE = "cloister-site show STUDY says what it asks; approve it or leave it."


class _Terms(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Approval(_Terms):
    """What one officer signs."""

    site: SiteName
    plan: Digest
    roster: Digest
    quote: Digest | Literal[""]
    """``Quote.digest``; "" where nothing is charged."""
    after: Digest | Literal[""]
    """The decision that this one follows: approvals from before a revocation do not count after it."""
    officer: Line
    at: Moment

    def signed(self, identity: Identity) -> str:
        """The officer's envelope."""
        return identity.sign(_PURPOSE, self.model_dump_json().encode())


class Held(_Terms):
    """``decision.json``: the decision in force, "" before the first, and the approvals that made it or are to."""

    decision: str = ""
    approvals: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Of the decision: what the audit log names it by."""
        return hashlib.sha256(self.decision.encode()).hexdigest()


@dataclass(frozen=True)
class Standing:
    """Where a study stands at this hospital."""

    said: str
    """``offered``, ``approved``, ``rejected`` or ``revoked``."""
    people: tuple[str, ...] = ()
    at: str = ""
    reason: str = ""
    waiting: tuple[str, ...] = ()
    """Officers who approved, while too few did."""


class Approvals:
    """What the agent asks before it lets a study do anything. ``folder`` is ``agent/``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def standing(self, digest: str) -> str:
        """``approved``, ``offered``, ``rejected`` or ``revoked``; ``unknown`` where nothing is known that holds.

        Quick, for every message: it verifies the decision and its approvals, and reads neither plan nor audit log.
        """
        try:
            return standing(self.folder, digest).said
        except (CloisterError, OSError) as error:
            log.debug("study %s: %s", digest[:12], error)
            return "unknown"

    def require(self, digest: str) -> Offer:
        """The offer, if this hospital approved this very plan with these hospitals and did not revoke it.

        Raises:
            ConsentRefused: it did not; or what lies here is not what was signed, by as many as the policy demands.
        """
        return self._approved(digest)[0]

    def quote(self, digest: str) -> str:
        """The digest of the quote that was approved, for ``Site(approved=...)``; "" where nothing is charged.

        Raises:
            ConsentRefused: as ``require``.
        """
        return self._approved(digest)[1].quote

    def approved(self) -> list[str]:
        """Digests of the studies that may run, as far as ``standing`` tells."""
        found = list[str]()
        for path in sorted((self.folder / "studies").glob("*/decision.json")):
            try:
                decision = signed(self.folder, held_in(path.parent))
            except (CloisterError, OSError):
                continue
            if decision and study_folder(self.folder, decision.plan) == path.parent:
                found += [decision.plan] if self.standing(decision.plan) == "approved" else []
        return found

    def _approved(self, digest: str) -> tuple[Offer, Approval]:
        try:
            return whole(self.folder, digest)
        except ConsentRefused:
            raise
        except CloisterError as error:
            raise ConsentRefused(
                f"Study {digest[:12]} may not run here. {error.said}",
                mend="If nobody here changed the agent's files, ask why; approve it anew with cloister-site approve.",
            ) from None


# --- the questions -----------------------------------------------------------------------------------------
def standing(agent: Path, digest: str) -> Standing:
    """Where a study stands, by the signatures of its decision.

    Raises:
        EnvelopeRefused: the decision, or an approval that it rests on, is not what was signed.
        ConsentRefused: it rests on fewer approvals than the policy demands.
        StudyRefused: there is no such study.
    """
    folder = study_folder(agent, digest)
    held = held_in(folder)
    decision = signed(agent, held)
    if decision is None:
        if not (folder / "offer.json").exists():
            study_of(agent, digest)
        return Standing("offered", waiting=tuple(waiting(agent, held)))
    if decision.plan != digest:
        raise EnvelopeRefused(f"{folder / 'decision.json'} is of another study, {decision.plan[:12]}.")
    if decision.decision == "approved":
        _enough(agent, decision, held)
        return Standing("approved", decision.people, decision.at)
    return Standing(decision.decision, decision.people, decision.at, decision.reason, tuple(waiting(agent, held)))


def whole(agent: Path, digest: str) -> tuple[Offer, Approval]:
    """The offer that was approved, and one of its approvals: everything that it rests on is verified.

    Raises:
        ConsentRefused: it is not approved, or by too few.
        CloisterError: a file is not what was signed.
    """
    study = study_of(agent, digest)
    held = held_in(study.folder)
    decision = signed(agent, held)
    if decision is None:
        raise ConsentRefused(f"{study.plan.study} is not approved here.", mend=_APPROVE)
    if decision.decision != "approved":
        when = f"was {decision.decision} by {', '.join(decision.people)} on {decision.at[:10]}"
        raise ConsentRefused(f"{study.plan.study} {when}.", mend=_APPROVE)
    if not decision.concerns(study.offer):
        raise EnvelopeRefused(f"What was approved is another plan than that of {study.plan.study}, or other hospitals.")
    if read_roster(study.folder / "roster.json") != study.offer.roster:
        raise EnvelopeRefused(f"{study.folder / 'roster.json'} is not what was approved.")
    approval = _enough(agent, decision, held)
    *before, last = ["", *told(agent, digest)]
    if last != held.digest or approval.after != before[-1]:
        raise EnvelopeRefused(f"The audit log does not tell of the decision upon {study.plan.study} that lies here.")
    return study.offer, approval


def _enough(agent: Path, decision: Decision, held: Held) -> Approval:
    """One of the approvals, if all are upon what was decided, by different people, and as many as is demanded."""
    officers = officers_of(agent.parent)
    approvals = [_read(envelope, officers) for envelope in held.approvals]
    people = [one.officer for one in approvals]
    if not people or len(set(people)) < len(people) or sorted(people) != sorted(decision.people):
        raise EnvelopeRefused("The decision does not rest on the approvals of the people whom it names.")
    first = approvals[0]
    asked = first.model_copy(update={"site": decision.site, "plan": decision.plan, "roster": decision.roster})
    if any(one.model_copy(update={"officer": first.officer, "at": first.at}) != asked for one in approvals):
        raise EnvelopeRefused("The decision rests on approvals of something else.")
    if len(people) < (wanted := policy(agent).approvals):
        raise ConsentRefused(
            f"{len(people)} approved it, and the policy of {decision.site} demands {wanted}.",
            mend="Revoke it (cloister-site revoke), and have it approved again.",
        )
    return first


# --- the files ---------------------------------------------------------------------------------------------
def held_in(folder: Path) -> Held:
    """What lies in a study's folder.

    Raises:
        EnvelopeRefused: it is damaged.
    """
    path = folder / "decision.json"
    try:
        return Held.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Held()
    except ValidationError:
        raise EnvelopeRefused(f"{path} is damaged.") from None


def signed(agent: Path, held: Held) -> Decision | None:
    """The decision in force, if this hospital's own key signed it; None before the first.

    Raises:
        EnvelopeRefused: another key signed it, or it was edited.
    """
    if not held.decision:
        return None
    return read_decision(held.decision, {consortium_of(agent).site: read_identity(agent / "identity.key").public})


def waiting(agent: Path, held: Held) -> dict[str, tuple[Approval, str]]:
    """The approvals that lie here and made no decision yet, by officer; what no pinned officer signed is left out."""
    officers, found = officers_of(agent.parent), dict[str, tuple[Approval, str]]()
    for envelope in held.approvals:
        try:
            said = _read(envelope, officers)
        except EnvelopeRefused:
            continue
        found[said.officer] = said, envelope
    return found


def _read(envelope: str, officers: Roster) -> Approval:
    officer, payload = verify(envelope, _PURPOSE, officers)
    try:
        said = Approval.model_validate_json(payload)
    except ValidationError:
        raise EnvelopeRefused(f"The approval that {officer} signed cannot be read.") from None
    if said.officer != officer:
        raise EnvelopeRefused(f"{officer} signed an approval in the name of {said.officer}.")
    return said


def policy(agent: Path) -> Policy:
    """The hospital's own, from ``site.yaml``."""
    return read_site(agent.parent / "site.yaml").accepts


def told(agent: Path, digest: str) -> list[str]:
    """The decisions upon a study that the audit log tells of, in order, each by its digest.

    Raises:
        AuditBroken: the log was changed.
    """
    log = agent.parent / "audit.jsonl"
    files = (path.read_bytes() for path in (log, log.with_name(f"{log.name}.head")) if path.exists())
    seen = hashlib.sha256(b"\n".join(files)).hexdigest()
    return [envelope for plan, envelope in _decisions(log, seen) if plan == digest]


@lru_cache(maxsize=4)
def _decisions(log: Path, seen: str) -> list[tuple[str, str]]:
    """Kept, because the agent asks at every message, and a long log takes long to verify; ``seen`` is of its octets."""
    del seen
    entries = audit.verify(log)
    return [(str(e.said.get("plan")), str(e.said.get("envelope"))) for e in entries if e.what == DECIDED]


def tell(agent: Path, study: Study, decision: Decision, held: Held) -> None:
    """Write a decision to the log, unless it is the last one upon this study there.

    Raises:
        AuditBroken: the log was changed.
    """
    said = decision.model_dump(exclude={"site", "at"}, mode="json")
    said |= {"study": study.plan.study, "envelope": held.digest}

    def missing(entries: list[audit.Entry]) -> list[tuple[str, Mapping[str, Any]]]:
        upon = [e.said for e in entries if e.what == DECIDED and e.said.get("plan") == study.digest]
        return [] if upon and upon[-1].get("envelope") == held.digest else [(DECIDED, said)]

    audit.append_where(agent.parent / "audit.jsonl", missing)
