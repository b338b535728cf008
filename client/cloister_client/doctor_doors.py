"""Both ways to the coordinator, stretch by stretch: name, proxy, connection, TLS, our certificate, clock, versions.

The rounds go over HTTPS and the control service over gRPC, each to a port of its own, so each is tried.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from cloister_client.enrolment import opened as opened_invite
from cloister_client.findings import Finding, fails, ok, tried, warning
from cloister_client.membership import calling, consortium_of
from cloister_client.proxy import Proxy, opened, proxy_to
from cloister_shared import durable
from cloister_shared.certificates import client_context
from cloister_shared.errors import CloisterError, LinkLost
from cloister_shared.versions import agree, spoken

_TIMEOUT = 10.0
"""Seconds for each step; a hospital's proxy may be slow."""
_CLOSE, _APART = 30.0, 240.0
"""Seconds between two clocks: as good as equal, and so many that requests are refused (their window is 300 s)."""


@dataclass(frozen=True)
class _Door:
    name: str
    host: str
    port: int
    proxy: Proxy | None

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def doors(agent: Path, configured: str | None) -> Iterator[Finding]:
    """Both doors, with the hospital's own certificate."""
    known = consortium_of(agent)
    clocks = list[tuple[str, float]]()
    try:
        context = client_context(agent / "agent.crt", agent / "agent.key", agent / "ca.crt")
    except CloisterError as error:
        yield fails("our certificate", error.said, error.mend)
        return
    for name, address in (("rounds", known.rounds), ("control", known.control)):
        found = yield from _way(name, address, configured, context)
        if found is None:
            continue
        if name == "rounds":
            yield tried("rounds: let in", lambda way=found: _knock(way, clocks))
        else:
            found.close()
            yield from _greet(agent, clocks)
    yield from _clock(clocks)


def doors_of_invite(path: Path, configured: str | None) -> Iterator[Finding]:
    """Both doors as far as an invite opens them: up to TLS."""
    try:
        invite, said = opened_invite(path)
    except CloisterError as error:
        yield fails("invite", error.said, error.mend)
        return
    for sentence in said:
        yield warning("invite", sentence, f"chmod 600 {path}; delete it once you are enrolled.")
    with tempfile.TemporaryDirectory() as folder:
        ca, certificate, key = (Path(folder) / name for name in ("ca.crt", "invite.crt", "invite.key"))
        durable.save_text(ca, invite.ca)
        durable.save_text(certificate, invite.certificate)
        durable.save_secret(key, invite.key)
        try:
            context = client_context(certificate, key, ca)
        except CloisterError as error:
            yield fails("invite", error.said, "Ask the consortium for a new one.")
            return
    yield ok("invite", f"of {invite.consortium} for {invite.hospital}, until {invite.expires[:16]} UTC")
    for name, address in (("rounds", invite.rounds), ("control", invite.control)):
        if found := (yield from _way(name, address, configured, context)):
            found.close()


# --- stretch by stretch ------------------------------------------------------------------------------------
def _way(
    name: str, address: str, configured: str | None, context: ssl.SSLContext
) -> Iterator[Finding]:  # a generator that returns the open connection, or None
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        proxy = proxy_to(host, configured)
    except LinkLost as error:
        yield fails(f"{name}: proxy", error.said, error.mend)
        return None
    door = _Door(name, host, int(port), proxy)
    yield ok(f"{name}: proxy", f"{proxy}, from {proxy.named_by}" if proxy else "none, straight to the coordinator")
    named = tried(f"{name}: name", lambda: _named(door))
    yield named
    try:
        began = time.perf_counter()
        plain = opened(door.host, door.port, proxy, _TIMEOUT)
        took = f"{1000 * (time.perf_counter() - began):.0f} ms"
        yield ok(f"{name}: connection", f"{door} in {took}" + (f", through {proxy}" if proxy else ""))
    except LinkLost as error:
        yield fails(f"{name}: connection", error.said, error.mend)
        return None
    secured = _secured(door, plain, context)
    if isinstance(secured, Finding):
        plain.close()
        yield secured
        return None
    yield _certified(door, secured)
    return secured


def _named(door: _Door) -> Finding | str:
    try:
        ipaddress.ip_address(door.host)
        return f"{door.host} is an address, and needs no DNS"
    except ValueError:
        pass
    try:
        found = sorted(
            {str(entry[4][0]) for entry in socket.getaddrinfo(door.host, door.port, type=socket.SOCK_STREAM)}
        )
        return f"{door.host} is {', '.join(found)}"
    except OSError:
        if door.proxy:
            return ok(f"{door.name}: name", f"{door.host} is not known here; the proxy looks it up")
        mend = "Have IT check the DNS of this machine, and the address with the consortium."
        return fails(f"{door.name}: name", f"{door.host} is not known here.", mend)


def _secured(door: _Door, plain: socket.socket, context: ssl.SSLContext) -> ssl.SSLSocket | Finding:
    what = f"{door.name}: TLS"
    context.set_alpn_protocols(["h2"] if door.name == "control" else ["http/1.1"])
    try:
        return context.wrap_socket(plain, server_hostname=door.host)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code == 10:  # X509_V_ERR_CERT_HAS_EXPIRED
            return fails(
                what, f"The certificate of {door} is over.", "Tell the consortium; check this machine's clock."
            )
        if error.verify_code == 9:  # X509_V_ERR_CERT_NOT_YET_VALID
            return fails(what, f"The certificate of {door} is not valid yet.", "Set this machine's clock right.")
        if error.verify_code in (62, 64):  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
            mend = "Tell the consortium: the address must be one that its certificate names."
            return fails(what, f"The certificate of {door} is for another host.", mend)
        mend = f"Something on the way opens TLS, or it is another server. Have IT exempt {door} from TLS inspection."
        return fails(what, f"{door} shows a certificate that is not this consortium's.", mend)
    except TimeoutError:
        return fails(what, f"{door} is silent.", "Have IT check whether a firewall holds TLS back.")
    except (ssl.SSLError, OSError) as error:
        why = getattr(error, "reason", None) or error.strerror or type(error).__name__
        return fails(
            what, f"{door} ended the TLS handshake ({why}).", "Have IT check firewall and proxy; check the port."
        )


def _certified(door: _Door, secured: ssl.SSLSocket) -> Finding:
    held: dict[str, Any] = secured.getpeercert() or {}
    end = datetime.fromtimestamp(ssl.cert_time_to_seconds(held["notAfter"]), UTC)
    said = f"{secured.version()}, certificate of the coordinator until {end:%Y-%m-%d}"
    if (end - datetime.now(UTC)).days < 14:
        return warning(f"{door.name}: TLS", said, "Tell the consortium to renew it.")
    return ok(f"{door.name}: TLS", said)


def _knock(secured: ssl.SSLSocket, clocks: list[tuple[str, float]]) -> Finding | str:
    """Ask how the rounds' server is, under our certificate: in TLS 1.3 a refusal shows at the first answer alone."""
    what = "rounds: let in"
    try:
        with secured:
            before = time.time()
            secured.sendall(b"GET /health HTTP/1.1\r\nHost: cloister\r\nConnection: close\r\n\r\n")
            answer = http.client.HTTPResponse(secured)
            answer.begin()
            if said := answer.getheader("Date"):
                clocks.append(("rounds", parsedate_to_datetime(said).timestamp() + 0.5 - before))
            if answer.status < 300:
                return "our certificate is accepted"
            if answer.status in (401, 403):
                mend = "Ask the consortium whether it was revoked; a new invite enrols anew."
                return fails(what, f"Our certificate is refused ({answer.status}).", mend)
            return warning(what, f"The coordinator answers {answer.status}.", "Tell the consortium.")
    except (OSError, http.client.HTTPException):
        mend = "It may be over or revoked: ask the consortium. A new invite enrols anew."
        return fails(what, "The coordinator hung up when it saw our certificate.", mend)


def _greet(agent: Path, clocks: list[tuple[str, float]]) -> Iterator[Finding]:
    try:
        with calling(agent) as control:
            before = time.time()
            met = control.hello()
            clocks.insert(0, ("control", met.time - (before + time.time()) / 2))
    except CloisterError as error:
        yield fails("control: let in", error.said, error.mend)
        return
    yield ok("control: let in", f"our certificate is accepted, as {met.site}")
    said = f"the coordinator speaks {met.version}; this agent {spoken()}"
    try:
        agree(met.version, "the coordinator", "this hospital's cloister-site")
        yield ok("versions", said)
    except CloisterError as error:
        yield fails("versions", said, error.mend)


def _clock(clocks: list[tuple[str, float]]) -> Iterator[Finding]:
    if not clocks:
        return
    apart = clocks[0][1]
    said = f"{abs(apart):.1f} s {'behind' if apart > 0 else 'ahead of'} the coordinator's"
    mend = "Have IT keep it right by NTP (timedatectl set-ntp true)."
    if abs(apart) <= _CLOSE:
        yield ok("clock", said)
    elif abs(apart) <= _APART:
        yield warning("clock", said, mend)
    else:
        yield fails("clock", f"{said}; requests will be refused", mend)
