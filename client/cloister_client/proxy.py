"""The way out of the hospital: straight, or through the proxy that ``site.yaml`` or HTTPS_PROXY names.

Both connections, that of the rounds and that of the control service, are TLS from end to end; a proxy is asked to
pass it through (CONNECT, RFC 9110 section 9.3.6) and sees a host's name and nothing else.
"""

from __future__ import annotations

import base64
import socket
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from cloister_shared.errors import LinkLost

_MOST = 64 * 1024
"""Octets of a proxy's answer that are looked at."""


@dataclass(frozen=True)
class Proxy:
    """Where it listens, and where that was said. Its text shows no password."""

    host: str
    port: int
    named_by: str
    user: str = ""
    url: str = field(default="", repr=False)
    """With the password: for libraries that connect by themselves."""

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def proxy_to(host: str, configured: str | None) -> Proxy | None:
    """The proxy on the way to ``host``: that of ``site.yaml`` if it names one, or that of HTTPS_PROXY and NO_PROXY.

    Raises:
        LinkLost: what is named cannot be used.
    """
    named_by, url = "site.yaml", configured
    if not url:
        found = urllib.request.getproxies()
        url, named_by = found.get("https") or found.get("all"), "HTTPS_PROXY"
        if not url or urllib.request.proxy_bypass(host):
            return None
        url = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname:
            return Proxy(parts.hostname, parts.port or 80, named_by, unquote(parts.username or ""), url)
    except ValueError:
        pass
    raise LinkLost(
        f"The proxy that {named_by} names cannot be used.",
        mend=f"Write {named_by} as http://HOST:PORT or http://USER:PASSWORD@HOST:PORT.",
    )


def opened(host: str, port: int, proxy: Proxy | None, timeout: float) -> socket.socket:
    """A connection to ``host``, on which TLS may begin.

    Raises:
        LinkLost: says whether the proxy or the host is what cannot be reached.
    """
    at, by = (proxy.host, proxy.port) if proxy else (host, port), "the proxy " if proxy else ""
    try:
        connected = socket.create_connection(at, timeout=timeout)
    except socket.gaierror:
        raise LinkLost(f"The name of {by}{at[0]} is not known here.", mend="Have IT check the DNS.") from None
    except OSError as error:
        why = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        mend = f"Have IT allow connections from here to {at[0]}, TCP port {at[1]}, or name the proxy in site.yaml."
        whole = f"{by}{at[0]}:{at[1]} cannot be reached: {why.lower()}."
        raise LinkLost(whole[0].upper() + whole[1:] if proxy else whole, mend=mend) from None
    if proxy is None:
        return connected
    try:
        _connect(connected, host, port, proxy)
    except BaseException:
        connected.close()
        raise
    return connected


def _connect(connected: socket.socket, host: str, port: int, proxy: Proxy) -> None:
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    asked = f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n"
    if proxy.user:
        password = unquote(urlsplit(proxy.url).password or "")
        asked += f"Proxy-Authorization: Basic {base64.b64encode(f'{proxy.user}:{password}'.encode()).decode()}\r\n"
    answer = b""
    with suppress(OSError):
        connected.sendall(f"{asked}\r\n".encode())
        # One octet at a time: what follows the answer is the other end's, and is not ours to swallow.
        while not answer.endswith(b"\r\n\r\n") and len(answer) < _MOST and (octet := connected.recv(1)):
            answer += octet
    status = answer.split(b" ", 2)[1:2]
    if answer.startswith(b"HTTP/1.") and answer.endswith(b"\r\n\r\n") and status and status[0].startswith(b"2"):
        return
    said = status[0].decode("ascii", "replace")[:3] if status else "no answer"
    if said == "407":
        mend = "Give it as http://USER:PASSWORD@HOST:PORT under proxy in site.yaml."
        raise LinkLost(f"The proxy {proxy} wants a name and a password, or other ones.", mend=mend)
    raise LinkLost(
        f"The proxy {proxy} does not open a way to {place} ({said}).",
        mend=f"Have IT allow CONNECT to {place} on it, without opening the TLS inside.",
    )
