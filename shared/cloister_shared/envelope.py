"""Signed envelopes: DSSE v1 (github.com/secure-systems-lab/dsse) on Ed25519 (RFC 8032).

The purpose of a statement is part of what is signed, so an envelope made for one purpose never verifies as
another. Who may have signed is decided by the reader's own roster, never by the envelope.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cloister_shared import durable
from cloister_shared.errors import EnvelopeRefused, KeyBroken

Roster = Mapping[str, str]
"""Site to its Ed25519 public key, in hex: whom a party has pinned."""


class Identity:
    """A site's long-term signing key. Its text shows the public half alone."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public: str = private.public_key().public_bytes_raw().hex()

    def __repr__(self) -> str:
        return f"Identity({key_id(self.public)})"

    def __reduce__(self) -> Any:
        raise TypeError("A signing key does not travel.")

    def sign(self, purpose: str, payload: bytes) -> str:
        """An envelope as JSON; ``purpose`` is a word such as ``advert``."""
        kind = _kind(purpose)
        signature = self._private.sign(_encoding(kind, payload))
        return json.dumps(
            {
                "payload": _text(payload),
                "payloadType": kind,
                "signatures": [{"keyid": key_id(self.public), "sig": _text(signature)}],
            },
            separators=(",", ":"),
        )


def new_identity(path: Path) -> Identity:
    """Make a key and keep it in a file that its owner alone can read.

    Raises:
        KeyBroken: there is a file already; an identity is never replaced unseen.
    """
    if path.exists():
        raise KeyBroken(f"{path} exists.", mend="Use it, or move it away: a new key must be pinned by every hospital.")
    private = Ed25519PrivateKey.generate()
    durable.save_secret(path, private.private_bytes_raw().hex())
    return Identity(private)


def read_identity(path: Path) -> Identity:
    """The key in a file that ``new_identity`` wrote.

    Raises:
        KeyBroken: it is missing, damaged, or others on this machine can read it.
    """
    try:
        return Identity(Ed25519PrivateKey.from_private_bytes(durable.load_secret(path)))
    except FileNotFoundError:
        raise KeyBroken(f"{path} is not there.", mend="Make the site's key first.") from None
    except ValueError:
        raise KeyBroken(f"{path} is no signing key.", mend="Restore it from a backup.") from None


def save_roster(path: Path, roster: Roster) -> None:
    """Pin these sites."""
    durable.save_text(path, json.dumps(dict(sorted(roster.items())), indent=1))


def read_roster(path: Path) -> Roster:
    """The sites that this party has pinned.

    Raises:
        KeyBroken: the file is missing or damaged, or two names share a key.
    """
    try:
        found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
        found = {site: _public(public).public_bytes_raw().hex() for site, public in found.items()}
        if len(set(found.values())) < len(found):
            raise KeyBroken(f"{path} pins one key under two names.", mend="Give each hospital its own key.")
        return found
    except (OSError, ValueError, TypeError, AttributeError):
        raise KeyBroken(f"{path} is no roster of sites and keys.", mend="Write it again from the enrolment.") from None


def verify(envelope: str, purpose: str, roster: Roster) -> tuple[str, bytes]:
    """Which pinned site signed an envelope for ``purpose``, and its payload.

    Raises:
        EnvelopeRefused: it is malformed, for another purpose, or not signed by a pinned site.
    """
    try:
        held: dict[str, Any] = json.loads(envelope)
        (signature,) = held["signatures"]
        payload, kind = _bytes(held["payload"]), str(held["payloadType"])
        if set(held) != {"payload", "payloadType", "signatures"} or set(signature) != {"keyid", "sig"}:
            raise ValueError("other keys")
        if kind != _kind(purpose):
            raise EnvelopeRefused(f"An envelope of the kind {kind[:80]!r} was shown as {purpose}.")
        site = next((site for site, public in roster.items() if key_id(public) == signature["keyid"]), None)
        if site is None:
            raise EnvelopeRefused(f"The {purpose} is signed by a key that is not pinned here.")
        _public(roster[site]).verify(_bytes(signature["sig"]), _encoding(kind, payload))
        return site, payload
    except InvalidSignature:
        raise EnvelopeRefused(f"The {purpose} bears a signature that its key did not make.") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise EnvelopeRefused(f"The {purpose} is no signed envelope.") from None


@cache
def key_id(public: str) -> str:
    """A short name of a public key: the start of its SHA-256."""
    return hashlib.sha256(bytes.fromhex(public)).hexdigest()[:16]


def _encoding(kind: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)


def _kind(purpose: str) -> str:
    return f"application/vnd.cloister.{purpose}+json"


def _public(key: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("not base64") from error
