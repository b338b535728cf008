"""Who may look: an account's name and token by HTTP Basic (RFC 7617), and few wrong ones from one address.

As at the admin port, a right token passes however many wrong ones came from the same address, and wrong ones are
written to the audit log. What was typed is written nowhere: people mistake one field for the other.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
from collections.abc import Callable
from math import ceil
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request

from cloister_server.door import Buckets
from cloister_server.folder import record
from cloister_server.records import Account
from cloister_server.registry import Registry

BURST, RATE = 10, 1 / 30
"""Wrong tokens of one address: so many at once, then so many a second. More are not written down, and told to wait."""

_ASK = {"WWW-Authenticate": 'Basic realm="Cloister coordinator", charset="UTF-8"'}


def visitors(registry: Registry, folder: Path) -> Callable[[Request], Account]:
    """The one question of every page: whose name and token came with this request.

    It raises:
        HTTPException: 401 without them, or with others; 429 after too many others.
        AuditBroken: the audit log is not as it was left, so nothing can be written down.
    """
    wrong = Buckets(BURST, RATE)

    def visitor(request: Request) -> Account:
        given = _given(request.headers.get("authorization", ""))
        if given is None:
            raise HTTPException(401, "Type the name of your account, and its token as the password.", _ASK)
        name, token = given
        account = registry.account(token)
        if account is not None and hmac.compare_digest(account.name.encode(), name.encode()):
            return account
        address = _address(request)
        if wait := wrong.take(address):
            seconds = ceil(wait)
            sentence = f"Too many wrong tokens came from this address. Wait {seconds} s."
            raise HTTPException(429, sentence, {"Retry-After": str(seconds)})
        record(folder, "", "", "pages", address, "refused: no account has the name and token")
        raise HTTPException(401, "No account has this name and token.", _ASK)

    return visitor


def _given(header: str) -> tuple[str, str] | None:
    """Name and token of an Authorization header."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        name, colon, token = base64.b64decode(value.strip(), validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        return None
    return (name, token) if colon else None


def _address(request: Request) -> str:
    """Where a request came from; of IPv6 the network, since one machine may have all addresses in it."""
    host = request.client.host if request.client else ""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else str(address)
