"""A whole consortium on this machine: the real commands, real processes, mutual TLS on loopback.

What ``cloister-sim consortium`` shows, what the tests of faults break, and what the figures measure.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray

from cloister_server.folder import open_consortium, read_settings, split
from cloister_server.records import State, Study
from cloister_server.registry import Registry
from cloister_server.store import Store
from cloister_shared import durable
from cloister_shared.errors import Fault
from cloister_shared.plan import StudyPlan

Made = TypeVar("Made")

OFFICER = "officer"
HOSPITAL = "cloister_simulations.deployed_hospital"
_PATIENCE = 600.0
"""Seconds for one command: an officer's page reads all records, and times the model's steps on them."""
_ENVIRONMENT = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}


class CommandFailed(Fault):
    """A command of the consortium ended badly; its own words follow."""


class Consortium:
    """A coordinator and its hospitals, each a process of its own, ended when the ``with`` block is left."""

    def __init__(self, folder: Path, sites: Mapping[str, Path], hospital: str = HOSPITAL) -> None:
        """``sites``: each hospital's ``site.yaml``; the coordinator's folder is ``folder/consortium``.

        ``hospital`` is the module that is run as a hospital's agent.
        """
        self.folder, self.home, self.sites = folder, folder / "consortium", dict(sites)
        self._hospital = hospital
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._registry: Registry | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end(*list(self.processes))
        if self._registry:
            self._registry.close()

    # --- the commands that people type ---------------------------------------------------------------------
    def coordinator(self, *words: str) -> str:
        """``cloister-coordinator …``; what it printed.

        Raises:
            CommandFailed: it said no.
        """
        return self._command("cloister_server.cli", words, {"CLOISTER_CONSORTIUM": str(self.home)})

    def site(self, name: str, *words: str) -> str:
        """``cloister-site …`` at one hospital; what it printed.

        Raises:
            CommandFailed: it said no.
        """
        return self._command("cloister_client.cli", (*words, "--site", str(self.sites[name])), {})

    def init(self, name: str = "a consortium on one machine") -> None:
        """Make the coordinator's folder, on free ports."""
        rounds, control, admin, pages = free_ports(4)
        ports = ("--rounds-port", str(rounds), "--control-port", str(control), "--admin-port", str(admin))
        self.coordinator(
            "init", str(self.home), "--name", name, "--host", "127.0.0.1", *ports, "--pages-port", str(pages)
        )

    def start(self, environment: Mapping[str, str] | None = None) -> None:
        """Start the coordinator and wait until all its ports answer; ``environment`` is added to this process's."""
        self._spawn("coordinator", "cloister_server.cli", ("start", str(self.home)), environment)
        self.ready()

    def ready(self, seconds: float = 30) -> None:
        """Wait until all the coordinator's ports answer: after a fall its services come back one by one.

        Raises:
            CommandFailed: they do not in time.
        """
        settings = read_settings(self.home)
        for address in (settings.rounds, settings.control, settings.admin, settings.pages):
            until(partial(_answers, split(address)), seconds, f"the coordinator answers on {address}")

    def enrol(self, name: str, *words: str) -> None:
        """Invite a hospital and let it enrol; ``words`` are added to what it types."""
        invite = self.sites[name].parent / "invite.json"
        invite.touch(0o600)
        invite.write_text(self.coordinator("invite", name), encoding="utf-8")
        self.site(name, "enrol", str(invite), *words)

    def officer(self, name: str) -> None:
        """Name an officer at a hospital, who may approve studies and set ceilings."""
        self.site(name, "budget", "officer", OFFICER, "--key", str(self.key(name)))

    def grant(self, name: str, epsilon: float, delta: float) -> None:
        """The officer of a hospital sets a ceiling."""
        terms = ("--epsilon", str(epsilon), "--delta", str(delta), "--officer", OFFICER, "--key", str(self.key(name)))
        self.site(name, "budget", "ceiling", *terms)

    def key(self, name: str) -> Path:
        """The officer's key of a hospital."""
        return self.sites[name].parent / "officer.key"

    def agent(self, name: str, environment: Mapping[str, str] | None = None) -> None:
        """Start a hospital's agent; ``environment`` is added to this process's."""
        self._spawn(name, self._hospital, (str(self.sites[name]),), environment)

    def approve(self, name: str, study: str) -> None:
        """An officer approves the study at a hospital, once the offer is there."""
        offer = self.sites[name].parent / "agent" / "studies" / self.study(study).digest[:16] / "offer.json"
        until(offer.exists, _PATIENCE, f"{name} is offered {study}")
        self.site(name, "approve", study, "--officer", OFFICER, "--key", str(self.key(name)), "--yes")

    def everywhere(self, work: Callable[[str], Made]) -> list[Made]:
        """The same at all hospitals, at once."""
        with ThreadPoolExecutor(len(self.sites)) as pool:
            return list(pool.map(work, self.sites))

    def submit(self, plan: StudyPlan) -> None:
        """A researcher submits a plan."""
        path = self.folder / f"{plan.study}.yaml"
        durable.save_text(path, yaml.safe_dump(plan.model_dump(mode="json", exclude_none=True), sort_keys=False))
        self.coordinator("study", "submit", str(path), "--token-file", str(self._researcher()))

    def _researcher(self) -> Path:
        """The token of an account that may submit, made when it is first needed."""
        token = self.folder / "researcher.token"
        if not token.exists():
            self.coordinator("account", "add", "researcher", "--role", "researcher", "--into", str(token))
        return token

    # --- what happens --------------------------------------------------------------------------------------
    @property
    def registry(self) -> Registry:
        """The coordinator's records."""
        if self._registry is None:
            self._registry = open_consortium(self.home).registry
        return self._registry

    def study(self, called: str) -> Study:
        """A study as the coordinator has it now."""
        return self.registry.study(called)

    def model(self, plan: StudyPlan) -> NDArray[np.float32]:
        """The model after the last whole round.

        Raises:
            CommandFailed: there is none.
        """
        found = Store(self.home / "studies" / plan.digest[:16]).load(plan.digest)
        if found is None:
            raise CommandFailed(f"{plan.study} has no model yet.")
        return found.model

    def wait(self, called: str, states: Iterable[State] = ("finished", "stopped"), seconds: float = 120.0) -> Study:
        """Wait until a study is in one of these states.

        Raises:
            CommandFailed: it is in none of them in time.
        """
        wanted = set(states)
        try:
            until(lambda: self.study(called).state in wanted, seconds, f"{called} is {' or '.join(sorted(wanted))}")
        except CommandFailed as late:
            study = self.study(called)
            raise CommandFailed(f"{late} It is {study.state}. {study.reason}".strip()) from None
        return self.study(called)

    def wait_for_round(self, called: str, number: int, seconds: float = 60.0) -> None:
        """Wait until a round is done.

        Raises:
            CommandFailed: it is not in time.
        """
        until(lambda: self.study(called).round >= number, seconds, f"round {number} of {called}")

    def kill(self, name: str, how: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the process of a hospital, or to ``coordinator``."""
        self.processes[name].send_signal(how)

    def service(self, name: str) -> int | None:
        """The process of one of the coordinator's services, ``rounds``, ``control``, ``pages`` or ``worker``."""
        return _child_with(self.processes["coordinator"].pid, name)

    def child(self, name: str, plan: StudyPlan) -> int | None:
        """The process that trains a study at a hospital."""
        return _child_with(self.processes[name].pid, plan.digest)

    def end(self, *names: str) -> None:
        """End processes and wait for them."""
        gone = [self.processes.pop(name) for name in names]
        for process in gone:
            process.send_signal(signal.SIGTERM)
        for process in gone:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def log(self, name: str) -> str:
        """What a process wrote."""
        path = self.folder / f"{name}.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def _spawn(
        self, name: str, module: str, words: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        with (self.folder / f"{name}.log").open("ab") as output:
            command = (sys.executable, "-m", module, *words)
            self.processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**self.environment, **(environment or {})},
            )

    def _command(self, module: str, words: Sequence[str], environment: Mapping[str, str]) -> str:
        command = (sys.executable, "-m", module, *words)
        told = {**self.environment, **environment}
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=told, check=False, timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            raise CommandFailed(f"{' '.join(words[:3])} did not end within {_PATIENCE:g} s.") from None
        if done.returncode:
            raise CommandFailed(
                f"{' '.join(words[:3])} ended with {done.returncode}: {(done.stderr or done.stdout).strip()}"
            )
        return done.stdout


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody uses at this moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def until(holds: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until something holds.

    Raises:
        CommandFailed: it does not, in so many seconds.
    """
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise CommandFailed(f"Waited {seconds:g} s in vain until {what}.")
        time.sleep(0.05)


def _child_with(parent: int, word: str) -> int | None:
    """The child of a process on whose command line there is this word; Linux alone tells."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            ours = f"\nPPid:\t{parent}\n" in (folder / "status").read_text(encoding="utf-8")
            if ours and word in (folder / "cmdline").read_text(encoding="utf-8").split("\0"):
                return int(folder.name)
    return None


def _answers(at: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(at, 0.5):
            return True
    except OSError:
        return False
