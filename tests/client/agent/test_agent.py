"""cloister_client.agent against the coordinator's real port for rounds: both as processes, killed at every stage."""

import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message
from flwr.serverapp import Grid

from cloister_client.egress import told
from cloister_client.membership import own_certificate
from cloister_client.offers import News, study_folder
from cloister_server.link import Link, open_link
from cloister_shared.certificates import Kind, bearer, new_authority
from cloister_shared.plan import StudyPlan
from cloister_shared.wire import FAILED, REFUSED, TicketHeader, pack, pack_vectors, unpack_reply
from cloister_simulations.site_folder import grant

pytestmark = pytest.mark.slow


class Worker:
    """A round worker in this process, with one hospital in its study."""

    def __init__(self, link: Link, hospital, plan: StudyPlan) -> None:
        self.node, self.name, self.plan = link.register(hospital.key), hospital.name, plan
        self.run = link.run(plan.digest, [self.node])
        self.grid: Grid = self.run.__enter__()

    def asks(self, number: int = 1, kind: str = "train") -> str:
        """Send a message; its name."""
        header = TicketHeader(run="run-1", plan=self.plan.digest, round=number, site=self.name)
        vectors = {} if kind.startswith("query") else {"model": np.full(4, 0.25 * number, np.float32)}
        made = self.grid.create_message(pack(header, pack_vectors(vectors)), kind, self.node, str(number))
        (sent,) = self.grid.push_messages([made])
        return sent

    def reply(self, message: str, patience: float = 60.0) -> Message:
        until = time.monotonic() + patience
        while time.monotonic() < until:
            for found in self.grid.pull_messages([message]):
                return found
            time.sleep(0.02)
        raise AssertionError("no reply")

    def hears(self, number: int = 1, kind: str = "train", patience: float = 60.0) -> Message:
        return self.reply(self.asks(number, kind), patience)


@pytest.fixture
def link(consortium) -> Link:
    return open_link(consortium.folder / "link")


@pytest.fixture
def worker(link, hospital, plan, rounds, agent) -> Iterator[Callable[..., Worker]]:
    """``worker()``: a run of the study, with the port open and the agent in touch."""
    runs = ExitStack()
    link.register(hospital.key)

    def opened(of: StudyPlan = plan) -> Worker:
        if rounds.popen is None:
            rounds.start()
        rounds.listens()
        if agent.popen is None:
            agent.start()
        agent.says("in touch with the coordinator")
        made = Worker(link, hospital, of)
        runs.callback(made.run.__exit__, None, None, None)
        return made

    yield opened
    runs.close()


@pytest.fixture
def child(agent) -> Callable[[], int]:
    """The agent's training process, once there is one."""

    def found() -> int:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            for path in Path("/proc").glob("[0-9]*/stat"):
                with suppress(OSError):
                    fields = path.read_text().rpartition(")")[2].split()
                    if int(fields[1]) == agent.pid and fields[0] != "Z":
                        return int(path.parent.name)
            time.sleep(0.02)
        raise AssertionError("there is no training process")

    return found


def gone(pid: int, patience: float = 10.0) -> bool:
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.02)
    return False


def value_of(reply: Message) -> bytes:
    return unpack_reply(reply.content).vectors["update"].tobytes()


# --- as it should be ---------------------------------------------------------------------------------------
def test_a_message_is_answered_and_what_left_is_on_record(worker, hospital, agent):
    one = worker()
    reply = one.hears()
    assert unpack_reply(reply.content).header.site == hospital.name
    assert one.hears(kind="query.enrol").has_content()
    train, enrol = hospital.sent()
    assert train["vectors"] == [["update", "float32", 4]]
    assert (train["study"], train["round"], train["kind"]) == (one.plan.digest, 1, "train")
    assert train["message"] == reply.metadata.message_id
    assert enrol["kind"] == "query.enrol"
    page = told(hospital.agent / "egress.jsonl")
    assert "update (float32 x 4)" in page
    assert max(map(len, page.splitlines())) <= 100
    status = Path(f"/proc/{agent.pid}/status").read_text()
    assert int(status.partition("VmRSS:")[2].split()[0]) < 120_000, "it needs no torch"


def test_it_ends_when_it_is_told(worker, link, hospital, agent, child):
    one = worker()
    one.hears()
    training = child()
    assert link.online() == {one.node}
    began = time.monotonic()
    assert agent.kill(signal.SIGTERM) == 0
    assert time.monotonic() - began < 5
    assert gone(training)
    assert link.online() == set(), "the coordinator need not wait a minute to know"


def test_a_process_is_begun_when_a_study_is_approved(consortium, hospital, worker, agent, child):
    worker()
    second = consortium.offers(study="second")
    hospital.approves(second.digest)
    agent.says(f"study {second.digest[:12]} is approved: its training process is begun")
    training = child()
    news = News(state="finished").model_dump_json()
    (study_folder(hospital.agent, second.digest) / "news.json").write_text(news)
    assert gone(training, 15), "the study is over, and nobody asks it any more"


def test_studies_run_side_by_side(consortium, hospital, worker, child):
    first = worker()
    second_plan = consortium.offers(study="second")
    first.hears()
    os.kill(stopped := child(), signal.SIGSTOP)
    waiting = first.asks(2)
    hospital.approves(second_plan.digest)
    second = worker(second_plan)
    assert second.hears().has_content()
    os.kill(stopped, signal.SIGCONT)
    assert first.reply(waiting).has_content()


def test_a_second_agent_is_refused(worker, agent, hospital):
    worker()
    second = subprocess.run(agent._command, capture_output=True, text=True, check=False, timeout=60)
    assert second.returncode == 1
    assert f"already, as process {agent.pid}" in second.stderr


# --- what the hospital did not approve ---------------------------------------------------------------------
def test_a_study_that_is_not_approved_is_refused(consortium, worker, hospital):
    other = consortium.offers(study="other")
    reply = worker(other).hears()
    assert reply.error.code == REFUSED
    assert "not approved" in reply.error.reason
    assert hospital.sent()[-1]["error"] == REFUSED


def test_a_revocation_works_at_the_next_message(worker, hospital, plan, child):
    one = worker()
    one.hears()
    training = child()
    hospital.revokes(plan.digest)
    reply = one.hears(2)
    assert (reply.error.code, "revoked" in reply.error.reason) == (REFUSED, True)
    assert gone(training)


def test_a_revocation_ends_work_and_nothing_of_it_leaves(worker, hospital, plan, child):
    one = worker()
    one.hears()
    os.kill(child(), signal.SIGSTOP)
    waiting = one.asks(2)
    time.sleep(0.5)
    hospital.revokes(plan.digest)
    reply = one.reply(waiting)
    assert (reply.error.code, "revoked" in reply.error.reason) == (REFUSED, True)
    assert [line.get("error") for line in hospital.sent()] == [None, REFUSED]


# --- things that die ---------------------------------------------------------------------------------------
def test_an_agent_that_was_killed_is_given_the_message_again(worker, agent, hospital, child):
    one = worker()
    first = one.hears()
    os.kill(training := child(), signal.SIGSTOP)  # in the middle of its work
    waiting = one.asks(2)
    time.sleep(0.5)
    agent.kill()
    os.kill(training, signal.SIGCONT)
    assert gone(training), "it ends with its agent"
    agent.start()  # well within the minute in which Flower counts the dead one as online
    assert one.reply(waiting, 20).has_content()
    assert [line["round"] for line in hospital.sent()] == [1, 2]
    assert value_of(first) != b""


def test_an_answer_that_was_cut_off_is_sent_again_and_is_the_same(consortium, hospital, link, rounds, agent, worker):
    """Killed between announcing a reply and sending its parts, for a private plan: one noise, one reply."""
    private = "{mechanism: site, unit: record, epsilon: 3.0, delta: 1e-5, clip_norm: 1.0}"
    plan = consortium.offers(study="private", privacy=private)
    grant(hospital.folder, plan)
    hospital.approves(plan.digest)
    agent._command[2] = DYING + agent._command[2]
    one = worker(plan)
    assert one.hears(0, "query.enrol").has_content()
    waiting = one.asks(1)
    agent.popen.wait(30)
    agent._command[2] = agent._command[2].removeprefix(DYING)
    agent.start()
    reply = one.reply(waiting)
    once, again = hospital.sent()[1:]
    assert once["message"] == again["message"] == reply.metadata.message_id


def test_a_training_process_that_was_killed_is_begun_again_once(worker, agent, child):
    one = worker()
    one.hears()
    os.kill(training := child(), signal.SIGSTOP)
    waiting = one.asks(2)
    time.sleep(0.5)
    os.kill(training, signal.SIGKILL)
    assert one.reply(waiting).has_content()
    assert agent.said().count("was killed") == 1
    assert "The message is tried once more." in agent.said()


def test_a_training_process_that_is_always_killed_ends_in_an_error(worker, agent, child):
    one = worker()
    waiting = one.asks(1)
    os.kill(first := child(), signal.SIGKILL)
    assert gone(first)
    os.kill(child(), signal.SIGKILL)
    reply = one.reply(waiting)
    assert reply.error.code == FAILED
    assert "training process" in reply.error.reason
    assert one.hears(2).has_content(), "the next message begins another"


def test_the_coordinator_may_be_away(worker, rounds, agent, child):
    one = worker()
    one.hears()
    os.kill(training := child(), signal.SIGSTOP)
    waiting = one.asks(2)
    time.sleep(0.5)
    rounds.kill()
    os.kill(training, signal.SIGCONT)
    agent.says("cannot be reached")
    time.sleep(4)
    rounds.start()
    assert one.reply(waiting).has_content()
    agent.says("in order again", times=2)
    for what in ("rounds", f"study {one.plan.digest[:12]}"):
        said = re.findall(rf"{what}: The coordinator at .* cannot be reached.*", agent.said())
        assert len(said) <= 2, "a sentence for each change, and not for each attempt"
        assert len(re.findall(rf"{what}: in order again", agent.said())) == 1


# --- certificates ------------------------------------------------------------------------------------------
def test_a_revoked_certificate_is_a_clear_stop(consortium, worker, agent, hospital):
    worker().hears()
    serial = own_certificate(hospital.agent).serial
    (consortium.folder / "revoked.crl").write_bytes(consortium.authority.crl({serial: datetime.now(UTC)}))
    assert agent.popen.wait(40) == 1
    assert agent.said().splitlines()[-1].startswith("The coordinator at localhost")
    assert "revoked" in agent.said().splitlines()[-1]
    assert "Traceback" not in agent.said()


def test_a_certificate_that_is_over_is_a_clear_stop(consortium, hospital, rounds, agent, link):
    over = consortium.certificate(hospital.key, Kind.SITE, hospital.name, timedelta(seconds=-5))
    (hospital.agent / "agent.crt").write_bytes(over)
    rounds.start()
    agent.start()
    assert agent.popen.wait(30) == 1
    assert "This hospital's certificate ended on" in agent.said()
    assert "cloister-site enrol FILE --again" in agent.said()


def test_a_renewed_certificate_is_used_at_once(consortium, hospital, worker, agent):
    """The old one ends while the agent runs; what the control service brought lies in the folder by then."""
    short = consortium.certificate(hospital.key, Kind.SITE, hospital.name, timedelta(seconds=30))
    (hospital.agent / "agent.crt").write_bytes(short)
    one = worker()
    one.hears()
    (hospital.agent / "agent.crt").write_bytes(consortium.certificate(hospital.key, Kind.SITE, hospital.name))
    time.sleep((bearer(short).not_after - datetime.now(UTC)).total_seconds() + 2)
    assert one.hears(2).has_content()


def test_another_authority_is_told_and_tried_again(hospital, rounds, agent, link, tmp_path):
    (tmp_path / "other").mkdir()
    own = (hospital.agent / "ca.crt").read_bytes()
    (hospital.agent / "ca.crt").write_bytes(new_authority(tmp_path / "other", "South").certificate)
    link.register(hospital.key)
    rounds.start()
    agent.start()
    agent.says("shows a certificate that is not the consortium's")
    assert agent.popen.poll() is None
    agent.kill(signal.SIGTERM)
    (hospital.agent / "ca.crt").write_bytes(own)


# --- the way out -------------------------------------------------------------------------------------------
@pytest.fixture
def proxy() -> Iterator[tuple[int, list[str]]]:
    """A CONNECT proxy's port, and what it was asked for."""
    asked: list[str] = []
    door = socket.create_server(("127.0.0.1", 0))

    def pump(a: socket.socket, b: socket.socket) -> None:
        with suppress(OSError):
            while data := a.recv(65536):
                b.sendall(data)
        with suppress(OSError):
            b.shutdown(socket.SHUT_RDWR)
        a.close()

    def serve() -> None:
        with suppress(OSError):
            while True:
                inside, _ = door.accept()
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    head += inside.recv(1)
                asked.append(head.decode().splitlines()[0])
                host, _, port = asked[-1].split()[1].rpartition(":")
                outside = socket.create_connection((host, int(port)))
                inside.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                for a, b in ((inside, outside), (outside, inside)):
                    threading.Thread(target=pump, args=(a, b), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield door.getsockname()[1], asked
    door.close()


def test_it_goes_through_a_proxy(consortium, hospital, rounds, agent, worker, proxy):
    port, asked = proxy
    rounds.start()
    rounds.listens()
    agent.start(HTTPS_PROXY=f"http://127.0.0.1:{port}", NO_PROXY="")
    assert worker().hears().has_content()
    assert set(asked) == {f"CONNECT localhost:{consortium.port} HTTP/1.1"}
    agent.says("(through the proxy 127.0.0.1")


DYING = """
import os, signal
from cloister_client import fleet
def side_by_side(work, things):
    things = list(things)
    if len(things) > 4 and work.__name__ == "stored":
        work(things[0])
        os.kill(os.getpid(), signal.SIGKILL)
    return map(work, things)
fleet.side_by_side = side_by_side
"""
