"""A coordinator on loopback, as hospitals see it, and hospitals with a table each that enrol with its invites."""

import asyncio
import contextlib
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
import yaml
from typer.testing import CliRunner

from cloister_client import liaison, quote
from cloister_client.book import Book
from cloister_client.ceilings import pin_officer
from cloister_client.cli import app
from cloister_client.enrolment import enrol
from cloister_client.liaison import catch_up
from cloister_client.membership import Consortium
from cloister_server import admin, control, folder
from cloister_server.door import Buckets
from cloister_server.folder import split
from cloister_server.records import Role
from cloister_shared.agreement import Offer, sign_offer
from cloister_shared.certificates import bearer, server_context
from cloister_shared.control_pb2 import ExpelRequest, InviteRequest, StudyNews, SubmitRequest
from cloister_shared.control_pb2_grpc import AdminStub
from cloister_shared.envelope import Identity, new_identity
from cloister_shared.plan_file import read_plan
from cloister_simulations.generated import GeneratedEhr
from cloister_simulations.hospitals import build

PLAN = """\
study: three-numbers
title: Three numbers and an outcome
task: {name: tabular}
table:
  target: {name: outcome, positive: 1, negative: 0}
  features:
    - {name: a, kind: number, range: [-2, 2]}
cohort: {min_sites: 2, min_patients: 4}
rounds: 3
strategy: {name: fedavg}
aggregation: {secure_sum: false}
training: {learning_rate: 0.5, batch_size: 24, local_steps: 2}
privacy: {mechanism: none}
evaluation: {min_count: 3}
"""


@pytest.fixture(autouse=True)
def loopback_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liaison, "_QUIET", 0.3)
    monkeypatch.setattr(quote, "_SECONDS", 0.01)


class Nodes:
    """What Flower would know of hospitals."""

    def __init__(self) -> None:
        self._known: dict[bytes, int] = {}
        self._next = count(1)

    def register(self, public_key: bytes) -> int:
        return self._known.setdefault(public_key, next(self._next))

    def forget(self, public_key: bytes) -> None:
        self._known.pop(public_key, None)

    def online(self) -> set[int]:
        return set()


def free_ports(wanted: int) -> list[int]:
    taken = [socket.socket() for _ in range(wanted)]
    for one in taken:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in taken]
    for one in taken:
        one.close()
    return ports


@dataclass
class Coordinator:
    """Its two gRPC ports; ``stop`` and ``start`` as often as a test likes."""

    consortium: folder.Consortium
    nodes: Nodes
    files: Path
    doors: list = field(default_factory=list)
    channels: list = field(default_factory=list)
    tokens: dict[Role, str] = field(default_factory=dict)

    def start(self) -> None:
        self.doors = [serve.serve(self.consortium, self.nodes) for serve in (control, admin)]

    def stop(self) -> None:
        for channel in self.channels:
            channel.close()
        for door in self.doors:
            door.stop(0)
        self.doors = []

    def desk(self, role: Role = Role.OPERATOR) -> tuple[AdminStub, list]:
        ca = grpc.ssl_channel_credentials(self.consortium.authority.certificate)
        self.channels.append(channel := grpc.secure_channel(self.consortium.settings.admin, ca))
        if role not in self.tokens:
            self.tokens[role] = self.consortium.registry.add_account(f"a {role}", role)
        return AdminStub(channel), [("authorization", f"Bearer {self.tokens[role]}")]

    def invite(self, name: str) -> Path:
        desk, token = self.desk()
        path = self.files / f"{name}-{len(list(self.files.iterdir()))}.invite"
        path.write_text(desk.Invite(InviteRequest(hospital=name, hours=1), metadata=token, timeout=20).invite)
        path.chmod(0o600)
        return path

    def submit(self, plan: str, *names: str) -> str:
        desk, token = self.desk(Role.RESEARCHER)
        asked = SubmitRequest(plan=plan, file="plan.yaml", hospitals=names)
        return desk.Submit(asked, metadata=token, timeout=20).digest

    def expel(self, name: str) -> None:
        desk, token = self.desk()
        desk.Expel(ExpelRequest(hospital=name, reason="a test"), metadata=token, timeout=20)

    def said(self, digest: str) -> dict[str, str]:
        """What each hospital said of a study, as the coordinator knows it."""
        return self.consortium.registry.decisions(digest)


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    made = tmp_path_factory.mktemp("coordinator")
    folder.init(made / "consortium", folder.settings_for("North", "localhost", *free_ports(3)))
    (made / "invites").mkdir()
    found = Coordinator(folder.open_consortium(made / "consortium"), Nodes(), made / "invites")
    with pytest.MonkeyPatch.context() as patient:  # a hospital asks more in these tests than in a month
        patient.setattr(Buckets, "take", lambda self, key: 0.0)
        found.start()
        yield found
        found.stop()
    found.consortium.registry.close()


@pytest.fixture(scope="session")
def plan_text() -> str:
    """The plan of the generated records, in which every row is in every step: it is priced at once."""
    scenario = Path(str(files("cloister_simulations") / "scenarios" / "generated-ehr.yaml"))
    plan = yaml.safe_load(scenario.read_text())["plan"]
    plan["training"]["batch_size"] = 100_000
    return yaml.safe_dump(plan, sort_keys=False)


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    sites = build(GeneratedEhr(source="generated-ehr", sites=4, patients=800), tmp_path_factory.mktemp("tables"))
    return {site.parent.name: site.parent for site in sites}


@dataclass
class Hospital:
    """The folder of a site.yaml, and what its people type there."""

    folder: Path

    @property
    def agent(self) -> Path:
        return self.folder / "agent"

    @property
    def site(self) -> Path:
        return self.folder / "site.yaml"

    def says(self, **changes: object) -> None:
        """Change site.yaml."""
        self.site.write_text(yaml.safe_dump(yaml.safe_load(self.site.read_text()) | changes, sort_keys=False))

    def types(self, *arguments: object, code: int = 0, answer: str = "") -> str:
        """What a command prints: no line is wider than 100 columns, and nothing is a traceback."""
        done = CliRunner().invoke(app, [*map(str, arguments), "--site", str(self.site)], input=answer, color=True)
        assert done.exit_code == code, done.output
        assert done.exception is None or isinstance(done.exception, SystemExit)
        plain = re.sub(r"\x1b\[[0-9;]*m", "", done.output)
        if code == 0:
            wide = [line for line in plain.splitlines() if len(line) > 100 and str(self.folder) not in line]
            assert not wide, wide
        return done.output

    def officer(self, name: str, ceiling: bool = True) -> Path:
        """Name an officer, who sets a ceiling; their key."""
        key = self.folder / f"{name}.key"
        self.types("budget", "officer", name, "--key", key)
        if ceiling:
            terms = ("--epsilon", "4", "--delta", "1e-5", "--officer", name, "--key", key)
            self.types("budget", "ceiling", *terms)
        return key


@pytest.fixture
def hospital(tables: dict[str, Path], tmp_path: Path) -> Callable[..., Hospital]:
    """``hospital("alder")``: a hospital with a table, that has heard of no consortium."""

    def made(name: str, like: str = "alder") -> Hospital:
        shutil.copytree(tables[like], tmp_path / name)
        found = Hospital(tmp_path / name)
        found.says(site=name)
        return found

    return made


@pytest.fixture
def enrolled(coordinator: Coordinator, hospital: Callable[..., Hospital]) -> Iterator[Callable[..., Hospital]]:
    """``enrolled("alder")``: a hospital that joined; it is expelled after the test."""
    names: list[str] = []

    def made(name: str, like: str = "alder") -> Hospital:
        found = hospital(name, like)
        enrol(found.agent, coordinator.invite(name))
        names.append(name)
        return found

    yield made
    for name in names:
        coordinator.expel(name)
    for study in coordinator.consortium.registry.studies():
        coordinator.consortium.registry.move(study.digest, "stopped")


@pytest.fixture
def offered(coordinator: Coordinator, enrolled: Callable[..., Hospital], plan_text: str) -> tuple[Hospital, str]:
    """Alder, which has heard of a study with two others, and the digest of its plan."""
    hospitals = [enrolled(name) for name in ("alder", "birch", "cedar")]
    version = len(coordinator.consortium.registry.studies()) + 1
    digest = coordinator.submit(plan_text + f"version: {version}\n", "alder", "birch", "cedar")
    assert catch_up(hospitals[0].agent) == []
    return hospitals[0], digest


@dataclass
class Alone:
    """Alder, enrolled in a consortium of which the test holds every key; there is no coordinator to call."""

    folder: Path
    signing: Identity
    own: Identity
    peers: dict[str, Identity]
    officers: dict[str, Identity] = field(default_factory=dict)
    plan: str = PLAN

    @property
    def agent(self) -> Path:
        return self.folder / "agent"

    @property
    def roster(self) -> dict[str, str]:
        return {name: one.public for name, one in {"alder": self.own, **self.peers}.items()}

    def study_folder(self, digest: str) -> Path:
        return self.agent / "studies" / digest[:16]

    def officer(self, name: str) -> Identity:
        book = Book(self.folder / "ledger.sqlite")
        self.officers[name] = pin_officer(book, name, self.folder / f"{name}.key")
        book.close()
        return self.officers[name]

    def says(self, **changes: object) -> None:
        path = self.folder / "site.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))

    def news(self, plan: str = PLAN, *, by: Identity | None = None, decision: str = "", **changes: object) -> StudyNews:
        """What the coordinator sends of a study; ``by`` signs it instead, ``changes`` are of the offer."""
        terms: dict[str, object] = {
            "consortium": "North",
            "plan": plan,
            "file": "plan.yaml",
            "roster": self.roster,
            "submitted_by": "a researcher",
            "at": "2026-11-21T10:00:00+00:00",
        }
        terms |= changes if "digest" in changes else {"digest": read_plan(plan).digest, **changes}
        offer = Offer(**terms)
        return StudyNews(
            digest=offer.digest, offer=sign_offer(by or self.signing, offer), state="submitted", decision=decision
        )


@pytest.fixture
def alone(tmp_path: Path) -> Alone:
    folder = tmp_path / "alder"
    (folder / "agent").mkdir(parents=True, mode=0o700)
    terms = {"site": "alder", "policy": {"mechanisms": ["none", "site"]}, "table": {"path": "table.csv"}}
    (folder / "site.yaml").write_text(yaml.safe_dump(terms))
    own, signing = new_identity(folder / "agent" / "identity.key"), new_identity(tmp_path / "signing.key")
    peers = {name: new_identity(tmp_path / f"{name}.key") for name in ("birch", "cedar")}
    found = Alone(folder, signing, own, peers)
    known = Consortium(
        consortium="North",
        site="alder",
        rounds="localhost:1",
        control="localhost:2",
        signing=signing.public,
        roster={"alder": own.public, "birch": peers["birch"].public},
    )
    (folder / "agent" / "consortium.json").write_text(known.model_dump_json())
    return found


# --- the way between ---------------------------------------------------------------------------------------
class ConnectProxy:
    """A proxy as hospitals have them: it opens tunnels and sees what is asked of it. ``places``: where to, so far."""

    def __init__(self) -> None:
        self.places: list[str] = []
        self.status, self.authorization = "200 OK", ""
        self._begun = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._begun.wait(5)
        self.url = f"http://127.0.0.1:{self.port}"

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        async with await asyncio.start_server(self._tunnel, "127.0.0.1", 0) as server:
            self.port = server.sockets[0].getsockname()[1]
            self._begun.set()
            await self._end.wait()

    async def _tunnel(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            place = head.split(" ")[1]
            self.places.append(place)
            status = self.status
            if self.authorization and f"Proxy-Authorization: Basic {self.authorization}" not in head:
                status = "407 Proxy Authentication Required"
            writer.write(f"HTTP/1.1 {status}\r\n\r\n".encode())
            if status.startswith("200"):
                host, _, port = place.rpartition(":")
                there = await asyncio.open_connection(host, int(port))
                await asyncio.gather(_pipe(reader, there[1]), _pipe(there[0], writer))
        writer.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(5)
        assert not self._thread.is_alive()


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while octets := await reader.read(65536):
            writer.write(octets)
            await writer.drain()
    finally:
        writer.close()


@pytest.fixture
def proxy() -> Iterator[ConnectProxy]:
    found = ConnectProxy()
    yield found
    found.close()


@pytest.fixture
def rounds(coordinator: Coordinator) -> Iterator[SimpleNamespace]:
    """What answers where the rounds are: HTTPS that asks for a certificate, and says that it is well, or ``status``."""
    said = SimpleNamespace(status=200, callers=[], ahead=0.0)

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            said.callers.append(bearer(self.connection.getpeercert(binary_form=True)).name)
            self.send_response(said.status)
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string((timestamp or time.time()) + said.ahead)

        def log_message(self, format: str, *_: object) -> None:
            pass

    home = coordinator.consortium.folder
    host, port = split(coordinator.consortium.settings.rounds)
    server = ThreadingHTTPServer((host, port), Health)
    context = server_context(home / "coordinator.crt", home / "coordinator.key", home / "ca.crt")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield said
    server.shutdown()
    server.server_close()
    thread.join(5)
