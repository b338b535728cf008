"""What passes between people: a study as the coordinator offers it, and what a hospital decides upon it.

Both are signed, each with a purpose of its own (see ``envelope``), so that neither can be shown as the other, and
both name the plan and the hospitals by digest: a decision on other terms, or another roster, is no decision on these.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from cloister_shared.envelope import Identity, Roster, verify
from cloister_shared.errors import EnvelopeRefused
from cloister_shared.names import SiteName
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import read_plan

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256, or an Ed25519 public key: 32 octets in hex."""

Moment = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(\+00:00|Z)$")]
"""ISO 8601, in UTC."""

Line = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$", max_length=500)]
"""Words of a person on one line, so that they cannot pass for more."""


class _Terms(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Offer(_Terms):
    """A study that is put to hospitals. ``plan`` is the YAML as it was submitted, ``file`` what that was called."""

    consortium: SiteName
    plan: Annotated[str, Field(max_length=1_000_000)]
    file: Line
    digest: Digest
    """Of the plan: what is approved."""
    roster: dict[SiteName, Digest] = Field(min_length=2)
    """The hospitals of the study, each with the Ed25519 key that it signs with."""
    submitted_by: Line
    at: Moment


class Decision(_Terms):
    """What named people of one hospital decided upon one plan with one roster."""

    site: SiteName
    plan: Digest
    roster: Digest
    """``roster_digest`` of the hospitals that were shown to them."""
    decision: Literal["approved", "rejected", "revoked"]
    people: tuple[Line, ...] = Field(min_length=1)
    at: Moment
    reason: Line = ""

    def concerns(self, offer: Offer) -> bool:
        """Whether it is upon this plan and this roster, of which the hospital is one."""
        return (self.plan, self.roster) == (offer.digest, roster_digest(offer.roster)) and self.site in offer.roster


Said = TypeVar("Said", Offer, Decision)


def sign_offer(identity: Identity, offer: Offer) -> str:
    """The coordinator's envelope."""
    return _signed(identity, offer)


def read_offer(envelope: str, signing: str) -> tuple[Offer, StudyPlan]:
    """An offer and its plan, if the coordinator whose public key (hex) is ``signing`` made it.

    Raises:
        EnvelopeRefused: another signed it, it is malformed, or its digest is not that of its plan.
        PlanRefused: this release cannot read the plan.
    """
    _, payload = verify(envelope, "offer", {"coordinator": signing})
    offer = _read(payload, Offer)
    plan = read_plan(offer.plan, offer.file)
    if plan.digest != offer.digest:
        raise EnvelopeRefused(f"The offer of {plan.study} is of plan {offer.digest[:12]}, and shows another.")
    if len(set(offer.roster.values())) < len(offer.roster):
        raise EnvelopeRefused(f"The offer of {plan.study} names one key under two hospitals.")
    return offer, plan


def sign_decision(identity: Identity, decision: Decision) -> str:
    """The hospital's envelope."""
    return _signed(identity, decision)


def read_decision(envelope: str, roster: Roster) -> Decision:
    """A decision that a hospital of the roster took for itself; ask it whether it ``concerns`` the offer at hand.

    Raises:
        EnvelopeRefused: it is malformed, or signed by another than the hospital that it names.
    """
    site, payload = verify(envelope, "decision", roster)
    said = _read(payload, Decision)
    if said.site != site:
        raise EnvelopeRefused(f"{site} signed a decision in another hospital's name.")
    return said


def roster_digest(roster: Roster) -> str:
    """SHA-256 over hospitals and keys, in whatever order they come."""
    return hashlib.sha256(json.dumps(dict(roster), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _signed(identity: Identity, said: Offer | Decision) -> str:
    return identity.sign(type(said).__name__.lower(), said.model_dump_json().encode())


def _read(payload: bytes, kind: type[Said]) -> Said:
    try:
        return kind.model_validate_json(payload)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise EnvelopeRefused(f"The {kind.__name__.lower()} cannot be read: {where}: {first['msg']}.") from None
