"""``cloister-coordinator start``: the coordinator's processes, watched over.

    rounds     the SuperLink: the hospitals' port for messages
    control    the hospitals' port for enrolment and approvals, and the people's admin port
    pages      what people may read in a browser
    worker     one for each study that runs

They share nothing but the consortium's folder and its database, so each may die and come back alone.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cloister_server.folder import open_consortium, server_tls, split
from cloister_shared import durable

log = logging.getLogger("cloister.coordinator")

SERVICES = ("rounds", "control", "pages")

PATIENCE = 10.0
"""Seconds that a process may take to end."""
_STEADY = 60.0
"""A process that has run so long is taken for sound again."""


@dataclass
class Watched:
    """One process, started again when it ends, later each time."""

    name: str
    command: Sequence[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    failed: int = 0
    due: float = field(default_factory=time.monotonic)

    def tend(self) -> None:
        """Start it if it is due; note if it has ended."""
        now = time.monotonic()
        if self.process is None:
            if now >= self.due:
                self._start(now)
        elif (code := self.process.poll()) is not None:
            self.failed = 0 if now - self.began > _STEADY else self.failed + 1
            pause = min(0.5 * 2**self.failed, 30.0) if self.failed > 1 else 0.0
            log.warning("%s ended with %d; started again in %g s", self.name, code, pause)
            self.close()
            self.due = now + pause

    def end(self) -> None:
        """Ask it to end."""
        if self.process and self.process.poll() is None:
            self.process.terminate()

    def close(self) -> None:
        """Wait for its end, and insist after a while."""
        if self.process is None:
            return
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdin:
            self.process.stdin.close()
        self.process = None

    def _start(self, now: float) -> None:
        # The pipe is a lifeline: it closes when this process dies, however it dies, and the other one ends.
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
            )
        self.began = now


def start(folder: Path) -> None:
    """Run until SIGTERM or SIGINT.

    Raises:
        AlreadyRunning: another coordinator runs in this folder.
    """
    consortium = open_consortium(folder)  # its records are migrated before anybody uses them
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    with durable.alone(folder / "coordinator"):
        ended = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: ended.set())
        server_tls(consortium)
        registry = consortium.registry
        services = {name: _service(name, folder, logs) for name in SERVICES}
        workers: dict[str, Watched] = {}
        try:
            while not ended.wait(0.2):
                wanted = {study.digest for study in registry.studies() if study.state in ("running", "waiting")}
                for digest in wanted - workers.keys():
                    workers[digest] = _worker(digest, folder, logs)
                for digest in workers.keys() - wanted:
                    workers[digest].end()
                    workers.pop(digest).close()
                for watched in (*services.values(), *workers.values()):
                    watched.tend()
        finally:
            everybody = [*workers.values(), *services.values()]
            for watched in everybody:
                watched.end()
            for watched in everybody:
                watched.close()


def lifeline() -> None:
    """End this process as by SIGTERM when the one that started it is gone."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _service(name: str, folder: Path, logs: Path) -> Watched:
    command = (sys.executable, "-m", "cloister_server.coordinator", name, str(folder))
    return Watched(name, command, logs / f"{name}.log")


def _worker(digest: str, folder: Path, logs: Path) -> Watched:
    command = (sys.executable, "-m", "cloister_server.coordinator", "worker", str(folder), digest)
    return Watched(f"worker {digest[:12]}", command, logs / f"worker-{digest[:16]}.log")


def main() -> None:
    """``python -m cloister_server.coordinator NAME FOLDER …``: one of the processes."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    lifeline()
    name, folder, *rest = sys.argv[1:]
    match name:
        case "rounds":
            from cloister_server.link import serve_rounds

            serve_rounds(Path(folder), *split(open_consortium(Path(folder)).settings.listen.rounds))
        case "control":
            _serve_control(Path(folder))
        case "pages":
            from cloister_server.dashboard.pages import serve

            serve(Path(folder))
        case _:
            from cloister_server.worker import work

            # So that the Flower run is finished and its messages go.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            work(Path(folder), *rest)


def _serve_control(folder: Path) -> None:
    from cloister_server import admin, control

    consortium, ended = open_consortium(folder), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    doors = [control.serve(consortium), admin.serve(consortium)]
    ended.wait()
    for door in doors:
        door.stop()


if __name__ == "__main__":
    main()
