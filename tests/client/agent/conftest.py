"""Hospitals that enrolled in a consortium, as their folders are then, and a study that they approved."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cloister_client.approvals import Standing
from cloister_client.ceilings import pin_officer
from cloister_client.decisions import approve, stop
from cloister_client.ledger import Ledger
from cloister_client.offers import study_folder, study_of
from cloister_client.trainer import PROGRAM, Trainer
from cloister_shared.agreement import Offer, sign_offer
from cloister_shared.certificates import Authority, Kind, new_authority, new_key, public_key
from cloister_shared.envelope import Identity, new_identity, read_identity
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import read_plan

TERMS = {
    "study": "three-numbers",
    "title": "Three numbers and an outcome",
    "task": "{name: tabular}",
    "table": """
  target: {name: outcome, positive: 1, negative: 0}
  features:
    - {name: a, kind: number, range: [-20, 20]}
    - {name: b, kind: number, range: [-20, 20]}
    - {name: c, kind: number, range: [-20, 20]}""",
    "cohort": "{min_sites: 2, min_patients: 4}",
    "rounds": "3",
    "strategy": "{name: fedavg}",
    "normalisation": "{method: plan}",
    "aggregation": "{secure_sum: false}",
    "training": "{learning_rate: 0.5, batch_size: 60, local_steps: 2}",
    "privacy": "{mechanism: none}",
    "evaluation": "{min_count: 3}",
}

NAMES = ("St Mary's", "North General")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass
class Hospital:
    """The folder of a ``site.yaml``, after enrolment."""

    name: str
    folder: Path
    key: bytes
    """Its public key, as Flower wants it."""

    @property
    def agent(self) -> Path:
        return self.folder / "agent"

    def policy(self, **changes: object) -> None:
        """Change the policy in ``site.yaml``."""
        path = self.folder / "site.yaml"
        terms = yaml.safe_load(path.read_text())
        terms["policy"] |= changes
        path.write_text(yaml.safe_dump(terms))

    def hears_of(self, envelope: str, plan: StudyPlan) -> None:
        """A study is offered."""
        folder = study_folder(self.agent, plan.digest)
        folder.mkdir(parents=True)
        (folder / "offer.json").write_text(envelope)

    def approves(self, digest: str) -> Standing:
        return approve(self.agent, study_of(self.agent, digest), "dr-lee", read_identity(self.folder / "lee.key"), "")

    def revokes(self, digest: str) -> Standing:
        return stop(self.agent, digest, "revoked", "a test", "dr-lee")

    def sent(self) -> list[dict[str, Any]]:
        """The egress log."""
        path = self.agent / "egress.jsonl"
        return [json.loads(line)["said"] for line in path.read_text().splitlines()] if path.exists() else []


@dataclass
class Consortium:
    """A coordinator's folder, and the hospitals that enrolled with it."""

    folder: Path
    authority: Authority
    signing: Identity
    port: int
    hospitals: dict[str, Hospital] = field(default_factory=dict)

    def certificate(self, key: bytes, kind: Kind, name: str, lifetime: timedelta = timedelta(days=30)) -> bytes:
        hosts = ["localhost", "127.0.0.1"] if kind is Kind.COORDINATOR else []
        return self.authority.issue(key, kind, name, lifetime, hosts)

    def enrols(self, name: str, folder: Path) -> Hospital:
        """Make a hospital's folder."""
        agent = folder / "agent"
        agent.mkdir(parents=True)
        key = public_key(new_key(agent / "agent.key"))
        new_identity(agent / "identity.key")
        (agent / "agent.crt").write_bytes(self.certificate(key, Kind.SITE, name))
        (agent / "ca.crt").write_bytes(self.authority.certificate)
        policy = {"mechanisms": ["none", "site", "shared"], "min_cohort": 2}
        site = {"site": name, "policy": policy, "table": {"path": "table.csv"}}
        (folder / "site.yaml").write_text(yaml.safe_dump(site))
        numbers = np.random.default_rng(len(name)).normal(size=(60, 3))
        rows = [f"{a:.4f},{b:.4f},{c:.4f},{int(a > b)}" for a, b, c in numbers]
        (folder / "table.csv").write_text("\n".join(["a,b,c,outcome", *rows, ""]))
        ledger = Ledger(folder / "ledger.sqlite")
        pin_officer(ledger.book, "dr-lee", folder / "lee.key")
        ledger.close()
        self.hospitals[name] = Hospital(name, folder, key)
        for one in self.hospitals.values():
            self._pins(one)
        return self.hospitals[name]

    def _pins(self, one: Hospital) -> None:
        roster = {name: read_identity(h.agent / "identity.key").public for name, h in self.hospitals.items()}
        known = {
            "consortium": "North",
            "site": one.name,
            "rounds": f"localhost:{self.port}",
            "control": f"localhost:{self.port}",
            "signing": self.signing.public,
            "roster": roster,
        }
        (one.agent / "consortium.json").write_text(json.dumps(known))

    def offers(self, **changes: str) -> StudyPlan:
        """Offer a plan to every hospital, on disk; ``study="other"`` and the like change lines of it."""
        text = "".join(f"{key}: {changes.get(key, value)}\n" for key, value in TERMS.items())
        plan = read_plan(text)
        roster = {name: read_identity(h.agent / "identity.key").public for name, h in self.hospitals.items()}
        offer = Offer(
            consortium="North",
            plan=text,
            file="plan.yaml",
            digest=plan.digest,
            roster=roster,
            submitted_by="a researcher",
            at=_now(),
        )
        envelope = sign_offer(self.signing, offer)
        for one in self.hospitals.values():
            one.hears_of(envelope, plan)
        return plan


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def found(folder: Path) -> Consortium:
    """A coordinator's folder, and two hospitals beside it."""
    own = folder / "consortium"
    own.mkdir(parents=True)
    authority = new_authority(own, "North")
    made = Consortium(own, authority, new_identity(own / "signing.key"), free_port())
    key = public_key(new_key(own / "coordinator.key"))
    (own / "coordinator.crt").write_bytes(made.certificate(key, Kind.COORDINATOR, "North"))
    (own / "revoked.crl").write_bytes(authority.crl({}))
    for name in NAMES:
        made.enrols(name, folder / name.partition(" ")[0].lower())
    return made


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    return found(tmp_path)


@pytest.fixture
def hospital(consortium: Consortium) -> Hospital:
    return consortium.hospitals[NAMES[0]]


@pytest.fixture
def plan(consortium: Consortium, hospital: Hospital) -> StudyPlan:
    """Offered to all, approved by the first hospital."""
    offered = consortium.offers()
    hospital.approves(offered.digest)
    return offered


@pytest.fixture
def trainer(hospital: Hospital, plan: StudyPlan) -> Iterator[Callable[..., Trainer]]:
    """``trainer(hours=0.001)``: the training process of the study, or another program's, ended after the test."""
    made: list[Trainer] = []

    def opened(hours: float = 1.0, program: str = PROGRAM) -> Trainer:
        made.append(Trainer(hospital.folder, plan.digest, hours=hours, program=program))
        return made[-1]

    yield opened
    for one in made:
        one.end()


@dataclass
class Warm:
    """A training process that many tests ask, and whose it is."""

    hospital: Hospital
    plan: StudyPlan
    trainer: Trainer


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    made = found(tmp_path_factory.mktemp("warm"))
    hospital, plan = made.hospitals[NAMES[0]], made.offers()
    hospital.approves(plan.digest)
    trainer = Trainer(hospital.folder, plan.digest, hours=1.0)
    yield Warm(hospital, plan, trainer)
    trainer.end()


# --- real processes ----------------------------------------------------------------------------------------
SERVE = """
import sys
from pathlib import Path
from cloister_server.link import serve_rounds
serve_rounds(Path(sys.argv[1]), "127.0.0.1", int(sys.argv[2]))
"""
AGENT = """
import logging, sys
from pathlib import Path
from cloister_shared.console import plain_errors
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
with plain_errors():
    from cloister_client.agent import run_agent
    run_agent(Path(sys.argv[1]))
"""


class Process:
    """A program with its log; started again as often as a test likes."""

    def __init__(self, log: Path, code: str, *arguments: object) -> None:
        self.log, self._command = log, [sys.executable, "-c", code, *map(str, arguments)]
        self.popen: subprocess.Popen | None = None

    def start(self, **environment: str) -> None:
        assert self.popen is None or self.popen.poll() is not None
        with self.log.open("a") as file:
            env = {**os.environ, **environment}
            self.popen = subprocess.Popen(self._command, stdout=file, stderr=file, env=env)

    port = 0

    def listens(self) -> None:
        """Wait until its port is open."""

        def opened() -> bool:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port)).close()
                return True
            return False

        eventually(opened)

    @property
    def pid(self) -> int:
        assert self.popen is not None
        return self.popen.pid

    def kill(self, number: int = signal.SIGKILL) -> int:
        """End it; its exit code."""
        assert self.popen is not None
        self.popen.send_signal(number)
        return self.popen.wait(20)

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def says(self, words: str, times: int = 1, patience: float = 30.0) -> None:
        """Wait until the log holds these words."""
        eventually(lambda: self.said().count(words) >= times, lambda: f"{words!r} not in:\n{self.said()}", patience)


def eventually(holds: Callable[[], object], else_: Callable[[], str] = lambda: "it did not", patience: float = 30.0):
    """Wait for it; what it is then."""
    until = time.monotonic() + patience
    while not (found := holds()):
        assert time.monotonic() < until, else_()
        time.sleep(0.02)
    return found


@pytest.fixture
def rounds(consortium: Consortium) -> Iterator[Process]:
    """The coordinator's port for rounds, as a process of its own; not started."""
    made = Process(consortium.folder / "rounds.log", SERVE, consortium.folder, consortium.port)
    made.port = consortium.port
    yield made
    if made.popen and made.popen.poll() is None:
        made.kill()


@pytest.fixture
def agent(hospital: Hospital) -> Iterator[Process]:
    """The first hospital's agent, as a process of its own; not started."""
    made = Process(hospital.folder / "agent.log", AGENT, hospital.folder)
    yield made
    if made.popen and made.popen.poll() is None:
        made.kill(signal.SIGTERM)
