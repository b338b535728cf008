"""A study's training process, as the agent sees it: begun, asked, given a time, and ended.

It is a fresh interpreter with nothing of the agent's but one socket and the log: no other file descriptor, and of the
environment only what Python and torch need, so no proxy's password and no token.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cloister_client.channel import Frame, receive, send
from cloister_client.child import OUT_OF_MEMORY
from cloister_client.objects import error_reply, reply
from cloister_shared.carried import Octets
from cloister_shared.errors import ConsentRefused, TrainingLost
from cloister_shared.parcel import CHUNK, Cut, Parcel, chunk_head

log = logging.getLogger("cloister.agent")

_KEPT = ("PATH", "HOME", "TMPDIR", "LANG", "TZ", "PYTHONPATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
_KEPT_BEGINNINGS = ("LC_", "OMP_", "MKL_", "OPENBLAS_")
_SILENT = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}

PROGRAM = "cloister_client.child"
"""The module that is run; simulations alone run another."""

START = 180.0
"""Seconds in which a process must be ready: on a slow disk torch takes a minute to be read."""


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    end: socket.socket
    ready: bool = False
    used: float = field(default_factory=time.monotonic)


class Trainer:
    """At most one process at a time, for the study in ``folder``'s agent with this plan's ``digest``.

    One thread asks; any other may ``begin`` or ``end`` it.
    """

    def __init__(self, folder: Path, digest: str, *, hours: float, program: str = PROGRAM) -> None:
        self.folder, self.digest, self.hours, self._program = folder, digest, hours, program
        self._running: _Running | None = None
        self._lock, self._asking = threading.Lock(), threading.Lock()

    @property
    def idle(self) -> float | None:
        """Seconds since the process was last asked, or None if there is none."""
        running = self._running
        return time.monotonic() - running.used if running else None

    def begin(self) -> _Running:
        """Start the process, if there is none; it gets ready by itself."""
        with self._lock:
            if self._running is None or self._running.process.poll() is not None:
                self._dismiss()
                self._running = self._started()
            return self._running

    def end(self) -> None:
        """End the process, whatever it is doing; who asked it sees it lost."""
        with self._lock:
            self._dismiss()

    def ask(self, message: bytes, root: str, objects: Iterable[tuple[str, Octets]]) -> Parcel:
        """Have a message answered: Flower's protobuf of it, and its objects as they come.

        Raises:
            ConsentRefused: the process cannot be kept from the network here.
            ValueError: what it says is no reply; it is ended.
            TrainingLost: it ended before it answered, or its time was up, and was killed.
        """
        with self._asking:
            running = self.begin()
            running.used = time.monotonic()
            try:
                self._await_ready(running)
                with _Deadline(running.process, self.hours * 3600) as deadline:
                    try:
                        return self._answered(running, message, root, objects)
                    except (OSError, EOFError):
                        raise self._lost(running, deadline) from None
            finally:
                running.used = time.monotonic()
                if running.process.poll() is not None:
                    running.end.close()

    def _answered(self, running: _Running, message: bytes, root: str, objects: Iterable[tuple[str, Octets]]) -> Parcel:
        end = running.end.fileno()
        send(end, "message")
        for name, content in objects:
            send(end, "object", content, name=name)
        send(end, "answer", message, root=root)
        said = receive(end)
        try:
            if said.kind == "error":
                return error_reply(message, int(said.said["code"]), bytes(said.octets).decode())
            arrays = {
                str(name): Cut(str(dtype), str(stype), int(octets), _chunks(end, int(octets)))
                for name, dtype, stype, octets in _expect(said, "reply").said["arrays"]
            }
            return reply(message, bytes(said.octets).decode(), arrays)
        except (KeyError, TypeError, ValueError):  # whose text may quote it
            self.end()
            raise ValueError("it is none") from None

    def _await_ready(self, running: _Running) -> None:
        if running.ready:
            return
        with _Deadline(running.process, START) as deadline:
            try:
                said = receive(running.end.fileno())
            except (OSError, EOFError):
                raise self._lost(running, deadline) from None
        if said.kind == "refused":
            self.end()
            raise ConsentRefused(str(said.said["why"]), mend="")
        _expect(said, "ready")
        running.ready = True

    def _lost(self, running: _Running, deadline: _Deadline) -> TrainingLost:
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.process.wait(5)
        code = running.process.poll()
        with self._lock:
            if self._running is running:
                self._dismiss()
        who = f"The training process of study {self.digest[:12]}"
        if deadline.passed and running.ready:
            said = f"{who} did not finish within {self.hours:g} hours, and was ended."
            lost = TrainingLost(said, mend="Raise hours under policy in site.yaml, or leave the study.")
            lost.again = False
            return lost
        if deadline.passed:
            return TrainingLost(f"{who} was not ready after {START:g} s, and was ended.")
        if code == OUT_OF_MEMORY:
            mend = "Raise memory_gb under policy in site.yaml, or leave the study."
            return TrainingLost(f"{who} had no memory left for a message.", mend=mend)
        if code == -signal.SIGKILL:
            mend = (
                "If nobody here killed it, the machine had no memory left: lower memory_gb under policy in site.yaml."
            )
            return TrainingLost(f"{who} was killed.", mend=mend)
        how = f"by signal {-code}" if code is not None and code < 0 else f"with code {code}"
        return TrainingLost(f"{who} ended {how}.")

    def _started(self) -> _Running:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-s", "-P", "-m", self._program, str(theirs.fileno()), self.folder, self.digest],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=_environment(),
                cwd=self.folder,
                start_new_session=True,
            )
        return _Running(process, ours)

    def _dismiss(self) -> None:
        """End the process that there is, with the lock held. Its socket is closed by whoever reads it, if anybody."""
        running, self._running = self._running, None
        if running is None:
            return
        running.process.kill()
        with contextlib.suppress(OSError):
            running.end.shutdown(socket.SHUT_RDWR)  # wakes the reader
        running.process.wait()
        if self._asking.acquire(blocking=False):
            running.end.close()
            self._asking.release()


class _Deadline:
    """Kills a process unless what it is given time for is over before."""

    def __init__(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        self.passed = False
        self._process = process
        self._timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), self._pass)
        self._timer.daemon = True

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _pass(self) -> None:
        self.passed = True
        self._process.kill()


def _chunks(end: int, octets: int) -> list[memoryview]:
    """The next chunks of an array of so many octets, as the objects that they are; each is read into its place."""
    chunks = [_expect(receive(end, chunk_head), "chunk").octets for _ in range(0, octets, CHUNK)]
    sizes = [min(CHUNK, octets - at) for at in range(0, octets, CHUNK)]
    if [len(chunk) for chunk in chunks] != [len(chunk_head(size)) + size for size in sizes]:
        raise ValueError("it is cut otherwise than it says")
    return chunks


def _expect(frame: Frame, kind: str) -> Frame:
    if frame.kind != kind:
        raise EOFError(f"{frame.kind} where {kind} was to come")
    return frame


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name in _KEPT or name.startswith(_KEPT_BEGINNINGS)}
    return {**kept, **_SILENT}
