"""A stretch of network that can fail: TCP between a hospital and its coordinator, which may be cut, or hold things up.

It sees nothing but octets: what runs over it is under TLS.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

Way = Literal["up", "down"]
"""From the hospital to the coordinator, and back."""

_PIECE = 4096


@dataclass
class _Trap:
    """Holds up the first stream of more than ``octets`` that goes this way without anything going the other."""

    way: Way
    octets: int


@dataclass(eq=False)
class _Line:
    """One connection: its two ends, what last went through, and whether more may."""

    ends: tuple[socket.socket, socket.socket]
    run: dict[Way, int] = field(default_factory=lambda: {"up": 0, "down": 0})
    open: threading.Event = field(default_factory=threading.Event)

    def close(self) -> None:
        self.open.set()
        for end in self.ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class Forwarder:
    """Listens at ``address`` and passes everything on to ``to``, ``host:port`` both."""

    def __init__(self, to: str) -> None:
        self._to = to
        self._door = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._door.getsockname()[1]}"
        self._lines = set[_Line]()
        self._lock = threading.Lock()
        self._state: Literal["well", "cut", "mute"] = "well"
        self._trap: _Trap | None = None
        self.caught = threading.Event()
        """The trap has caught something, which waits for ``heal`` or ``cut``."""
        threading.Thread(target=self._listen, daemon=True).start()

    # --- what may befall it --------------------------------------------------------------------------------
    def cut(self) -> None:
        """End every connection; new ones are accepted and ended."""
        with self._lock:
            self._state = "cut"
            lines, self._lines = self._lines, set()
        for line in lines:
            line.close()

    def mute(self) -> None:
        """Nothing goes through, and nobody is told."""
        with self._lock:
            self._state = "mute"
            for line in self._lines:
                line.open.clear()

    def heal(self) -> None:
        """All is well again; what was held up goes on."""
        with self._lock:
            self._state, self._trap = "well", None
            self.caught.clear()
            for line in self._lines:
                line.open.set()

    def trap(self, way: Way, octets: int) -> None:
        """Hold up the next stream of more than so many octets that goes this way, once so many are through."""
        with self._lock:
            self.caught.clear()
            self._trap = _Trap(way, octets)

    def close(self) -> None:
        """For good."""
        self.cut()
        self._door.close()

    @property
    def asking(self) -> int:
        """Connections on which the hospital spoke last and waits: with nothing to do, one, its long poll."""
        with self._lock:
            return sum(line.run["up"] > 0 for line in self._lines)

    # --- how it works ----------------------------------------------------------------------------------------
    def _listen(self) -> None:
        host, _, port = self._to.rpartition(":")
        while True:
            try:
                near, _ = self._door.accept()
            except OSError:
                return
            try:
                far = socket.create_connection((host, int(port)), 5)
                far.settimeout(None)
            except OSError:
                near.close()
                continue
            line = _Line((near, far))
            with self._lock:
                if self._state == "cut":
                    line.close()
                    continue
                if self._state == "well":
                    line.open.set()
                self._lines.add(line)
            for source, sink, way in ((near, far, "up"), (far, near, "down")):
                threading.Thread(target=self._pump, args=(line, source, sink, way), daemon=True).start()

    def _pump(self, line: _Line, source: socket.socket, sink: socket.socket, way: Way) -> None:
        with suppress(OSError):
            while piece := source.recv(_PIECE):
                self._note(line, way, len(piece))
                line.open.wait()
                sink.sendall(piece)
        with self._lock:
            self._lines.discard(line)
        line.close()

    def _note(self, line: _Line, way: Way, octets: int) -> None:
        with self._lock:
            line.run[way] += octets
            line.run["down" if way == "up" else "up"] = 0
            if self._trap and self._trap.way == way and line.run[way] > self._trap.octets:
                self._trap = None
                line.open.clear()
                self.caught.set()
