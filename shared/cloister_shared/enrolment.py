"""How a hospital joins: the invite that it is handed, and the proof that it holds the key it signs with.

An invite is one JSON document with a certificate of its own and that certificate's key, so that even enrolment is
under mutual TLS: whoever holds the authority's certificate alone can speak to no port. It is a secret until it is used.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from cloister_shared.agreement import Digest, Moment
from cloister_shared.envelope import Identity, verify
from cloister_shared.errors import EnrolmentRefused, EnvelopeRefused
from cloister_shared.names import SiteName

Address = Annotated[str, StringConstraints(pattern=r"^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.\-]+):[0-9]{1,5}$", max_length=260)]
"""``host:port``; an IPv6 address stands in brackets."""

Pem = Annotated[str, StringConstraints(pattern=r"^-----BEGIN ", max_length=20_000)]


class Invite(BaseModel):
    """What a coordinator hands to one hospital. Single use."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    consortium: SiteName
    hospital: SiteName
    rounds: Address
    control: Address
    ca: Pem
    """Certificate of the consortium's authority."""
    signing: Digest
    """Ed25519 public key, in hex, with which the coordinator signs its offers."""
    certificate: Pem
    key: Annotated[Pem, Field(repr=False)]
    """Of the invite's certificate; it opens the door of enrolment and no other."""
    expires: Moment

    def text(self) -> str:
        """As it stands in the file."""
        return self.model_dump_json(indent=1) + "\n"


def read_invite(text: str) -> Invite:
    """The invite in a file's text.

    Raises:
        EnrolmentRefused: it is none; the message shows nothing of it.
    """
    try:
        return Invite.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = f" ({'.'.join(map(str, first['loc']))})" if first["loc"] else ""
        raise EnrolmentRefused(
            f"The file is no invite of a consortium, or is damaged{where}.",
            mend="Ask the consortium for the file again, as it was made by cloister-coordinator invite.",
        ) from None


def prove(identity: Identity, request: str) -> str:
    """An envelope that says: who holds this identity makes this certificate request (PEM)."""
    return identity.sign("enrolment", _digest(request))


def check_proof(proof: str, request: str, identity: str) -> None:
    """Hold a proof against the request and the identity (Ed25519 public key, hex) that came with it.

    Raises:
        EnrolmentRefused: whoever asks does not hold the identity, or proved it for another request.
    """
    try:
        _, payload = verify(proof, "enrolment", {"hospital": identity})
    except EnvelopeRefused as error:
        raise EnrolmentRefused(error.said, mend="Run cloister-site enrol again.") from None
    if payload != _digest(request):
        raise EnrolmentRefused(
            "The proof of the signing key is of another certificate request.", mend="Run cloister-site enrol again."
        )


def _digest(request: str) -> bytes:
    return f'"{hashlib.sha256(request.encode()).hexdigest()}"'.encode()
