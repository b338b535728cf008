"""The processes behind the hospitals' port: uvicorn's HTTP over mutual TLS, and the gate.

All that they share is on disk, so there can be several: TLS and hashing of one large round keep more than one core
busy. The kernel spreads connections over them.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import multiprocessing
import os
import resource
import signal
import socket
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import ClassVar

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from cloister_server.link import served
from cloister_server.link.gate import Gate
from cloister_server.link.polls import Polls
from cloister_server.link.routes import Routes
from cloister_server.link.state import open_link
from cloister_shared import memory
from cloister_shared.certificates import Revocations, server_context
from cloister_shared.errors import LinkLost

log = logging.getLogger("cloister")

PROCESSES = max(2, min(4, os.cpu_count() or 1))
"""Each keeps one core busy while ten hospitals send a large model."""

HANDSHAKE, GOODBYE = 10.0, 2.0
"""Seconds for TLS to begin, when anybody may be there, and to end, when the other side may not listen."""

LAST = 2.0
"""Seconds for requests that are being answered when the process is told to end."""

CONNECTIONS = 64
"""Connections of one certificate to one process."""

HEAD, PIECE = 2**16, 2**18
"""Octets of the head of a request; and of its body, of which the application is told at once."""

SWEEP = 300.0
"""Seconds after which letters of runs that ended are looked for: of a worker that was killed and not started anew."""

_PARENT_DIED = 1
"""Linux, prctl: the signal that this process is sent when its parent dies."""


class Peer(HttpToolsProtocol):
    """uvicorn's protocol, which also tells the application the certificate that the client showed.

    A bearer has only so many connections, and a request only so long a head: uvicorn limits neither.
    """

    _connected: ClassVar = Counter[bytes]()

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """TLS is through."""
        super().connection_made(transport)
        self._shown: bytes = transport.get_extra_info("ssl_object").getpeercert(True)
        self._head = 0
        Peer._connected[self._shown] += 1
        if Peer._connected[self._shown] > CONNECTIONS:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        super().connection_lost(exc)
        Peer._connected[self._shown] -= 1
        if not Peer._connected[self._shown]:
            del Peer._connected[self._shown]

    def data_received(self, data: bytes) -> None:
        """Part of a request."""
        self._head += len(data)
        super().data_received(data)
        if self._head > HEAD + len(data):
            self.transport.abort()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self.scope["extensions"] = {"tls": {"client_cert": self._shown}}

    def on_headers_complete(self) -> None:
        """Its head is read."""
        super().on_headers_complete()
        self._head = 0

    def on_body(self, body: bytes) -> None:
        """Part of what follows it: the application is woken for a good piece of it, less often than by uvicorn."""
        self._head = 0
        if self.cycle.response_complete:
            return
        if not self.cycle.body:
            self.cycle.body = bytearray()  # pyright: ignore[reportAttributeAccessIssue] : bytes are copied at each +=
        self.cycle.body += body
        if len(self.cycle.body) >= PIECE:
            self.cycle.message_event.set()
        if len(self.cycle.body) >= 2 * PIECE:
            self.flow.pause_reading()


def serve_rounds(folder: Path, host: str, port: int, processes: int = PROCESSES) -> None:
    """Serve the rounds of the consortium in this folder to its hospitals, until SIGTERM or SIGINT.

    Raises:
        KeyBroken: the coordinator's key or certificate cannot be used.
        VersionRefused: another release of Flower is installed.
        LinkLost: another process serves this folder, or one of these ended by itself.
        OSError: the port cannot be opened.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    memory.keep()
    with served.alone(folder / "link"):
        # All listen before anybody is served, or whoever comes back first would stay with the first of them.
        sockets = [_listening(host, port) for _ in range(processes)]
        fork = multiprocessing.get_context("fork")  # before anything is opened: SQLite does not survive it
        others = [fork.Process(target=_other, args=(folder, sockets, at, os.getpid())) for at in range(1, processes)]
        for other in others:
            other.start()
        try:
            _run(folder, sockets, 0, others)
        finally:
            for other in others:
                other.terminate()
                other.join(LAST + 1)
                other.kill()


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024, reuse_port=True)


def _other(folder: Path, sockets: Sequence[socket.socket], at: int, parent: int) -> None:
    ctypes.CDLL(None).prctl(_PARENT_DIED, signal.SIGKILL)
    if os.getppid() == parent:
        _run(folder, sockets, at, [])


def _run(folder: Path, sockets: Sequence[socket.socket], at: int, others: Sequence[BaseProcess]) -> None:
    for number, other in enumerate(sockets):
        if number != at:
            other.close()
    with asyncio.Runner(loop_factory=uvicorn.Config("", log_config=None).get_loop_factory()) as runner:
        runner.run(_serve(folder, sockets[at], others))  # on uvloop, where there is one


async def _serve(folder: Path, listening: socket.socket, others: Sequence[BaseProcess]) -> None:
    context = server_context(folder / "coordinator.crt", folder / "coordinator.key", folder / "ca.crt")
    link = open_link(folder / "link")
    post = link.reader()
    polls = Polls(post)
    routes = Routes(link, post, polls)
    config = uvicorn.Config(
        Gate(routes.table(), routes.node, Revocations(folder)),  # pyright: ignore[reportArgumentType]
        http=Peer,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        timeout_keep_alive=90,
    )
    config.load()
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # the gate tells what fails
    state, loop, told = ServerState(), asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    server = await loop.create_server(
        partial(Peer, config, state, {}, loop),
        sock=listening,
        ssl=context,
        ssl_handshake_timeout=HANDSHAKE,
        ssl_shutdown_timeout=GOODBYE,
    )
    served.opened(link.folder)
    log.info("Hospitals are served at %s:%d.", *listening.getsockname()[:2])
    watcher = loop.create_task(polls.watch())
    swept = loop.time()
    while not told.is_set() and all(other.is_alive() for other in others):
        served.touched(link.folder)
        if loop.time() > swept + SWEEP:
            swept = loop.time()
            loop.run_in_executor(None, link.sweep)
            memory.give_back()
        with suppress(TimeoutError):
            await asyncio.wait_for(told.wait(), served.FRESH)
    server.close()
    polls.close()
    for connection in list(state.connections):
        connection.shutdown()
    if state.tasks:
        await asyncio.wait(list(state.tasks), timeout=LAST)
    for task in list(state.tasks):
        task.cancel()
    watcher.cancel()
    if not told.is_set():
        raise LinkLost("A process behind the hospitals' port ended by itself.", mend="Start the coordinator again.")
