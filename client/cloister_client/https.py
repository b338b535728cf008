"""HTTPS as the agent needs it: whole requests and answers, over connections that are kept open, to one address.

The standard library's client on a connection of our own making: under the hospital's certificate, through its proxy.
Of a model of 100 MB it takes a quarter of the processor time that a general client does.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cloister_client.proxy import Proxy, opened
from cloister_shared.carried import Octets

_CONNECT = 30.0
"""Seconds in which a connection is made."""
_IDLE = 8
"""Connections that are kept while nobody uses them."""
_MOST = 64 * 2**20
"""Octets of an answer: an object has a twelfth of that."""


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Https:
    """Connections to ``host``; any thread may use it."""

    def __init__(self, host: str, port: int, context: ssl.SSLContext, proxy: Proxy | None) -> None:
        self._host, self._port, self._context, self._proxy = host, port, context, proxy
        self._idle: list[http.client.HTTPSConnection] = []
        self._lock = threading.Lock()

    def post(self, path: str, body: Sequence[Octets], headers: Mapping[str, str], patience: float) -> Answer:
        """The answer to a request, which may arrive twice if a connection breaks; ``patience`` in seconds of silence.

        ``body`` is sent part by part, without a copy.

        Raises:
            OSError: there is no way there, the other end's certificate will not do, or the connection broke.
            http.client.HTTPException: what came is no answer.
            LinkLost: the proxy lets nothing through, or a name is not known.
        """
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection:
            try:
                return self._asked(connection, path, body, headers, patience)
            except TimeoutError:
                raise
            except (OSError, http.client.HTTPException):
                pass  # it was closed while it was idle, most likely; a new one tells
        return self._asked(self._connected(), path, body, headers, patience)

    def close(self) -> None:
        """Close the connections that nobody uses."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _connected(self) -> http.client.HTTPSConnection:
        bare = opened(self._host, self._port, self._proxy, _CONNECT)
        try:
            bare.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = http.client.HTTPSConnection(self._host, self._port, context=self._context)
            connection.sock = self._context.wrap_socket(bare, server_hostname=self._host)
        except BaseException:
            bare.close()
            raise
        return connection

    def _asked(
        self,
        connection: http.client.HTTPSConnection,
        path: str,
        body: Sequence[Octets],
        headers: Mapping[str, str],
        patience: float,
    ) -> Answer:
        try:
            connection.sock.settimeout(patience)
            length = str(sum(map(len, body)))
            connection.request("POST", path, body, {**headers, "content-length": length})  # each part as it is
            response = connection.getresponse()
            if (response.length if response.length is not None else _MOST + 1) > _MOST:
                raise http.client.HTTPException("the answer is longer than an answer is, or does not say how long")
            answer = Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        except BaseException:
            connection.close()
            raise
        if response.will_close:
            connection.close()
            return answer
        with self._lock:
            if len(self._idle) < _IDLE:
                self._idle.append(connection)
                return answer
        connection.close()
        return answer
