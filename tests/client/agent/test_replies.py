"""What the agent lets leave: a reply to this very message, of a study that is approved when it leaves."""

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import flwr
import numpy as np
import pytest
from flwr.app import Message, RecordDict
from flwr.superlink.routers.fleet.router import router

from cloister_client import fleet
from cloister_client.agent import _Agent
from cloister_client.fleet import Fleet, Instruction, side_by_side
from cloister_client.objects import deflated, inflated
from cloister_client.patience import Patience
from cloister_shared.errors import TrainingLost, VersionRefused
from cloister_shared.parcel import Parcel
from cloister_shared.wire import FAILED, REFUSED, ReplyHeader, TicketHeader, pack, pack_vectors

from .letters import message

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def agent(hospital, plan) -> Iterator[_Agent]:
    made = _Agent(hospital.folder, Patience(threading.Event()))
    yield made
    made._egress.close()


def asked(number: int = 1) -> tuple[Instruction, Parcel]:
    ticket = message(pack(TicketHeader(run="run-1", plan="p", round=number, site="a"), pack_vectors({})))
    return Instruction(ticket.message, ticket.root, 7, "train", tuple(ticket.objects), {}), ticket


def answer(to: Parcel, header: ReplyHeader | None = None) -> Parcel:
    got = inflated(to.root, to.objects)
    said = header or ReplyHeader(run="run-1", round=1, site="a", metrics={"loss": 0.5})
    return deflated(Message(pack(said, pack_vectors({"update": np.ones(3, np.float32)})), reply_to=got), got)


def test_a_reply_leaves(agent, plan, monkeypatch):
    instruction, ticket = asked()
    monkeypatch.setattr(agent, "_worked_on", lambda *_: answer(ticket))
    reply, held = agent._reply(plan.digest, instruction)
    assert held.vectors == (("update", "float32", 3),)
    assert held.header == ("run", "round", "site", "rows", "metrics.loss")
    assert reply.root == answer(ticket).root


def test_what_was_revoked_while_it_was_worked_on_does_not_leave(agent, hospital, plan, monkeypatch):
    instruction, ticket = asked()

    def worked_on(*_: object) -> Parcel:
        hospital.revokes(plan.digest)
        return answer(ticket)

    monkeypatch.setattr(agent, "_worked_on", worked_on)
    _, held = agent._reply(plan.digest, instruction)
    assert (held.error, held.vectors) == (REFUSED, ())


def test_the_reply_to_another_message_does_not_leave(agent, plan, monkeypatch):
    instruction, _ = asked(1)
    _, other = asked(2)
    monkeypatch.setattr(agent, "_worked_on", lambda *_: answer(other))
    _, held = agent._reply(plan.digest, instruction)
    assert (held.error, held.answers) == (FAILED, instruction.root)


@pytest.mark.parametrize("spoil", ["parts", "no header"])
def test_what_is_no_reply_does_not_leave(agent, plan, monkeypatch, spoil):
    instruction, ticket = asked()
    got = inflated(ticket.root, ticket.objects)
    parts = pack(ReplyHeader(run="run-1", round=1, site="a"), pack_vectors({}))
    parts = RecordDict({"vectors": parts["vectors"]} if spoil == "parts" else {**parts, "more": parts["header"]})
    reply = deflated(Message(parts, reply_to=got), got)
    monkeypatch.setattr(agent, "_worked_on", lambda *_: reply)
    _, held = agent._reply(plan.digest, instruction)
    assert held.error == FAILED


def test_what_leaves_is_on_record_before_and_no_value_of_it(hospital, agent, plan, monkeypatch):
    instruction, ticket = asked()
    header = ReplyHeader(run="run-1", round=1, site="a", metrics={"loss": 0.123456}, signed="an-envelope")
    monkeypatch.setattr(agent, "_worked_on", lambda *_: answer(ticket, header))
    on_record: list[int] = []
    monkeypatch.setattr(agent._fleet, "push", lambda *_: on_record.append(len(hospital.sent())))
    agent._answer(plan.digest, instruction)
    assert on_record == [1], "it is on disk before it is sent"
    text = json.dumps(hospital.sent())
    assert "metrics.loss" in text
    assert "0.123456" not in text
    assert "an-envelope" not in text


def test_an_error_says_no_more_abroad_than_it_may(agent, plan, monkeypatch):
    instruction, _ = asked()

    def worked_on(*_: object) -> Parcel:
        raise TrainingLost("The training process of /srv/hospital was killed.")

    monkeypatch.setattr(agent, "_worked_on", worked_on)
    reply, held = agent._reply(plan.digest, instruction)
    assert held.error == FAILED
    assert b"its own log says why" in reply.message
    assert b"/srv/hospital" not in reply.message


# --- Flower's private names --------------------------------------------------------------------------------
def test_the_release_of_flower_is_the_one_that_was_read():
    assert flwr.__version__ == fleet.FLOWER, (
        f"Flower {flwr.__version__} is installed. Its private parts were read in {fleet.FLOWER}: protobufs and paths in"
        " cloister_client/fleet.py, the form of objects in cloister_client/objects.py. Read them, and change FLOWER."
    )


def test_another_release_of_flower_is_refused_in_a_sentence(hospital, monkeypatch):
    monkeypatch.setattr(flwr, "__version__", "1.42.0")
    with pytest.raises(VersionRefused, match=r"Flower 1\.42\.0 is installed"):
        Fleet(hospital.agent)


def test_flower_answers_at_the_paths_that_are_asked():
    known = {route.path for route in router.routes}
    assert {f"/v1/fleet/{verb}" for verb, _ in fleet._ANSWERS.values()} <= known


def test_private_names_of_flower_are_in_two_files():
    public = r"^\s*from flwr\.(app|clientapp) import|^\s*import flwr$"
    private = {
        path.name
        for path in (ROOT / "client").rglob("*.py")
        for line in path.read_text().splitlines()
        if re.match(r"\s*(from|import) flwr\b", line) and not re.match(public, line)
    }
    assert private == {"fleet.py", "objects.py"}


# --- four at a time ----------------------------------------------------------------------------------------
def test_side_by_side_keeps_the_order_and_the_bound():
    working, most, lock = [], [], threading.Lock()

    def work(thing: int) -> int:
        with lock:
            working.append(thing)
            most.append(len(working))
        threading.Event().wait(0.01)
        with lock:
            working.remove(thing)
        return thing * 2

    assert list(side_by_side(work, range(20))) == [2 * thing for thing in range(20)]
    assert 1 < max(most) <= 4


def test_side_by_side_raises_what_was_raised():
    with pytest.raises(ZeroDivisionError):
        list(side_by_side(lambda thing: 1 // thing, [1, 0, 1]))
