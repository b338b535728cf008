"""The hospitals' door: an ASGI application that asks who knocks, and lets nothing in but what a route expects.

TLS has checked that the caller holds the key of a certificate of ours. Each request is held against that certificate
anew, so that a revocation or an expiry works on a connection that is open.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from datetime import UTC, datetime
from email.utils import formatdate
from functools import lru_cache

from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.supercore.error import FlowerError
from flwr.supercore.error.catalog import API_ERROR_MAP
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from google.protobuf.message import DecodeError, Message

from cloister_server.link.calls import Body, Call, Receive, Refused, Route, Scope, Send
from cloister_shared.certificates import Bearer, Kind, Revocations, bearer
from cloister_shared.errors import EnrolmentRefused, VersionRefused
from cloister_shared.versions import agree

log = logging.getLogger("cloister")

PROTOCOL = b"x-cloister-protocol"
"""Header: what the agent speaks."""

OBJECT, LETTER = 6 * 2**20, 2**20
"""Octets of a request that carries an object, and of any other."""

SLICE = 2**18
"""Octets of an answer that are sent at once."""

AT_ONCE = 16
"""Requests that one hospital may have open at one process."""

SLOW = 60.0
"""Seconds for the next 256 KiB of a request, or its end: a line of 5 kB/s is quick enough."""

TEXT = "text/plain; charset=utf-8"


class Gate:
    """The door before the routes; ``node_of`` finds the node of a key."""

    def __init__(
        self,
        routes: Mapping[str, Route],
        node_of: Callable[[bytes], Awaitable[int | None]],
        revocations: Revocations,
    ) -> None:
        self._routes, self._node_of, self._revocations = routes, node_of, revocations
        self._open = Counter[str]()
        self._nodes: dict[bytes, int] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        status, kind, close = 200, PROTOBUF_MEDIA_TYPE, False
        try:
            body = await self._answer(scope, receive)
        except Refused as refused:
            # Where the request itself was no fault, what is left of it is not read.
            status, kind, body, close = refused.status, TEXT, [str(refused).encode()], refused.status not in (400, 404)
        except FlowerError as error:
            spec = API_ERROR_MAP[error.code]
            status, kind = spec.http_status_code, "application/json"
            body = [json.dumps(error.to_json(spec.public_message)).encode()]
        except Exception:
            log.exception("A request of a hospital failed: %s", scope["path"])
            status, kind, body = 500, TEXT, [b"The coordinator's log says more."]
        if body is None:
            return
        headers = [
            (b"content-type", kind.encode()),
            (b"content-length", str(sum(map(len, body))).encode()),
            (b"date", formatdate(usegmt=True).encode()),  # an agent tells by it that its clock is off
        ]
        if close:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        slices = [part[at : at + SLICE] for part in body for at in range(0, len(part), SLICE)] or [b""]
        for number, piece in enumerate(slices, start=1):  # what is not sent yet does not pile up
            await send({"type": "http.response.body", "body": piece, "more_body": number < len(slices)})

    async def _answer(self, scope: Scope, receive: Receive) -> Body | None:
        who = self._bearer(scope)
        method, path = scope["method"], scope["path"]
        if path == "/health" and method in ("GET", "HEAD"):
            return []
        route = self._routes.get(path)
        if route is None or method != "POST":
            raise Refused(404, "There is nothing here.")
        headers = dict(scope["headers"])
        try:
            agree(headers.get(PROTOCOL, b"").decode("ascii", "replace"), f"the agent of {who.name}", "the coordinator")
        except VersionRefused as refused:
            raise Refused(426, str(refused)) from None
        if self._open[who.name] >= AT_ONCE:
            raise Refused(429, "This hospital has too many requests open.")
        self._open[who.name] += 1
        try:
            pieces = _pieces(headers, receive, LETTER if route.request else OBJECT)
            call = Call(await self._node(who, headers), who, headers, pieces, receive, lambda: self._admit(who))
            request = route.request and _parsed(route.request, b"".join([piece async for piece in pieces]))
            call.owns(request)
            answer = await route.answer(call, request)
            return [answer.SerializeToString()] if isinstance(answer, Message) else answer
        finally:
            self._open[who.name] -= 1
            if not self._open[who.name]:
                del self._open[who.name]

    def _bearer(self, scope: Scope) -> Bearer:
        try:
            who = _read(scope["extensions"]["tls"]["client_cert"])
        except (KeyError, EnrolmentRefused):
            raise Refused(403, "A certificate of this consortium is needed.") from None
        self._admit(who)
        return who

    def _admit(self, who: Bearer) -> None:
        if who.kind is not Kind.SITE:
            raise Refused(403, "This door is for hospitals.")
        if not who.not_before <= datetime.now(UTC) <= who.not_after:
            raise Refused(403, f"The certificate of {who.name} has expired. Enrol again.")
        if who.serial in self._revocations:
            raise Refused(403, f"The certificate of {who.name} is revoked.")

    async def _node(self, who: Bearer, headers: Mapping[bytes, bytes]) -> int:
        try:
            key = base64.b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER.encode()], validate=True)
        except (KeyError, binascii.Error):
            key = b""
        if key != who.public_key:
            raise Refused(403, "The key in the request is not that of the certificate.")
        if key not in self._nodes:
            node = await self._node_of(key)
            if node is None:
                raise Refused(403, f"{who.name} is not registered for rounds.")
            self._nodes[key] = node
        return self._nodes[key]


_read = lru_cache(maxsize=1024)(bearer)


def _parsed(kind: type[Message], body: bytes) -> Message:
    try:
        return kind.FromString(body)
    except DecodeError:
        raise Refused(400, "The request cannot be read.") from None


async def _pieces(headers: Mapping[bytes, bytes], receive: Receive, most: int) -> AsyncGenerator[bytes, None]:
    """A request's body as it comes."""
    size = int(headers.get(b"content-length", b"0") or 0)
    if size > most:
        raise Refused(413, f"A request may have {most} octets.")
    size = 0
    while True:
        try:
            async with asyncio.timeout(SLOW):
                event = await receive()
        except TimeoutError:
            raise Refused(408, "The request comes too slowly.") from None
        if event["type"] == "http.disconnect":
            raise Refused(400, "The request ended early.")
        size += len(event["body"])
        if size > most:
            raise Refused(413, f"A request may have {most} octets.")
        yield event["body"]
        if not event["more_body"]:
            return
