"""What an outsider, and an enrolled hospital, can do at the hospitals' port that is not theirs to do. Nothing."""

import asyncio
import base64
import socket
import ssl
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.proto.control_pb2 import ListRunsRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from cloister_server.link import calls, gate, polls
from cloister_server.link.serve import PROCESSES
from cloister_shared import certificates, durable
from cloister_shared.certificates import Kind, new_authority, read_authority
from cloister_shared.versions import spoken

PLAN = "ef" * 32


def content(value: float = 1.0) -> RecordDict:
    vector = np.full(100, value, dtype="<f4")
    array = Array("float32", vector.shape, "cloister.float32.le", vector.tobytes())
    return RecordDict({"vectors": ArrayRecord({"model": array}), "header": ConfigRecord({"json": f"{value}"})})


def knock(port, context):
    """GET /health with this TLS context."""
    with httpx.Client(verify=context) as client:
        return client.get(f"https://127.0.0.1:{port}/health")


def post(hospital, path, body, **headers):
    """What a hospital's own key and certificate get it; a body is a message of Flower's, or octets."""
    said = {
        "content-type": "application/x-protobuf",
        "flwr-public-key": base64.b64encode(hospital.public_key).decode(),
        "x-cloister-protocol": spoken(),
        "x-cloister-wait": "0",
    }
    body = body if isinstance(body, bytes) or not hasattr(body, "SerializeToString") else body.SerializeToString()
    with httpx.Client(verify=hospital.context) as client:
        return client.post(f"https://127.0.0.1:{hospital.port}{path}", content=body, headers=said | headers)


@pytest.fixture
def victim(rounds):
    return rounds.enrol()


@pytest.fixture
def mallory(rounds):
    return rounds.enrol()


@pytest.fixture
def grid(rounds, victim):
    with rounds.link.run(PLAN) as grid:
        yield grid


def asked(grid, *hospitals):
    return grid.push_messages([Message(content(), hospital.node, "train") for hospital in hospitals])


# --- an outsider ---------------------------------------------------------------------------------------------
def test_with_the_authoritys_certificate_alone_nobody_gets_through_tls(rounds):
    with pytest.raises(httpx.TransportError):
        knock(rounds.port, ssl.create_default_context(cafile=rounds.folder / "ca.crt"))


def test_with_a_certificate_of_another_authority_nobody_gets_through_tls(rounds, tmp_path):
    key = certificates.new_key(tmp_path / "agent.key")
    other = new_authority(tmp_path, "Loopback")
    own = other.issue(certificates.public_key(key), Kind.SITE, "Hospital 0", timedelta(hours=1))
    durable.save_text(tmp_path / "agent.crt", own.decode())
    context = ssl.create_default_context(cafile=rounds.folder / "ca.crt")
    context.load_cert_chain(tmp_path / "agent.crt", tmp_path / "agent.key")
    with pytest.raises(httpx.TransportError):
        knock(rounds.port, context)


def test_an_invite_opens_no_door_here(rounds, tmp_path):
    key = certificates.new_key(tmp_path / "agent.key")
    invite = read_authority(rounds.folder).issue(
        certificates.public_key(key), Kind.INVITE, "Hospital 99", timedelta(hours=1)
    )
    durable.save_text(tmp_path / "agent.crt", invite.decode())
    context = certificates.client_context(tmp_path / "agent.crt", tmp_path / "agent.key", rounds.folder / "ca.crt")
    assert knock(rounds.port, context).status_code == 403


def test_plain_http_and_older_tls_get_nothing(rounds, mallory):
    with pytest.raises(httpx.TransportError), httpx.Client() as client:
        client.get(f"http://127.0.0.1:{rounds.port}/health")
    older = mallory.context
    mallory.context = certificates.client_context(
        mallory.folder / "agent.crt", mallory.folder / "agent.key", rounds.folder / "ca.crt"
    )
    older.minimum_version = older.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(httpx.TransportError):
        knock(rounds.port, older)


# --- routes that are nobody's --------------------------------------------------------------------------------
NINE = {
    f"/v1/fleet/{name}"
    for name in (
        *("activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages"),
        *("get-run", "push-object", "pull-object", "confirm-message-received"),
    )
}


def test_of_all_of_flowers_routes_nine_are_there(rounds, mallory):
    answers = {path: post(mallory, path, b"") for _, path in PROTOBUF_REQUEST_TYPES}
    absent = {path for path, answer in answers.items() if answer.text == "There is nothing here."}
    assert answers.keys() - absent == NINE
    assert {answers[path].status_code for path in absent} == {404}
    for path in ("/docs", "/openapi.json", "/", "/v1/fleet/", "/v1/fleet/%2e%2e/control/list-runs", "/HEALTH"):
        assert post(mallory, path, b"").status_code == 404
        assert knock(rounds.port, mallory.context).status_code == 200


@pytest.mark.parametrize(
    ("path", "request_"),
    [
        ("/v1/control/list-runs", ListRunsRequest()),
        ("/v1/control/start-run", b""),
        ("/v1/control/stop-run", b""),
        ("/v1/runtime/acquire-task", AcquireTaskRequest()),
        ("/v1/fleet/register-node", RegisterNodeFleetRequest(public_key=b"mine")),
        ("/v1/fleet/unregister-node", b""),
        ("/v1/fleet/get-fab", b""),
    ],
)
def test_a_hospital_cannot_control_runs_take_tasks_or_register_nodes(mallory, path, request_):
    assert post(mallory, path, request_).status_code == 404


# --- another hospital's ------------------------------------------------------------------------------------
def test_another_hospitals_objects_are_not_found_even_by_who_knows_their_names(grid, victim, mallory):
    (name,) = asked(grid, victim)
    asked_too = grid.run.run_id
    message = victim.receive()
    reply = Message(content(7.0), reply_to=message)
    parts = get_all_nested_objects(reply)
    announced = victim.announce(reply)
    for part in list(announced.objects_to_push)[:3]:
        assert victim.push_object(part, parts[part].deflate(), asked_too, announced.session_id)
    for part in {name, *get_all_nested_objects(message), *parts}:
        assert mallory.pull_object(part, asked_too) is None
    assert victim.pull_object(name, asked_too) is not None


def test_to_be_asked_oneself_opens_no_part_of_what_others_answer(grid, victim, mallory):
    asked(grid, victim, mallory)
    reply = Message(content(7.0), reply_to=victim.receive())
    victim.send(reply)
    for part in get_all_nested_objects(reply):
        assert mallory.pull_object(part, grid.run.run_id) is None


def test_to_confirm_anothers_message_takes_nothing_from_it(grid, victim, mallory):
    (name,) = asked(grid, victim)
    request = ConfirmMessageReceivedRequest(
        node=Node(node_id=mallory.node), run_id=grid.run.run_id, message_object_id=name
    )
    post(mallory, "/v1/fleet/confirm-message-received", request)
    assert victim.receive().metadata.message_id == name


def test_no_request_may_name_another_node(grid, victim, mallory):
    them = Node(node_id=victim.node)
    asked(grid, victim)
    for path, request in {
        "/v1/fleet/pull-messages": PullMessagesRequest(node=them),
        "/v1/fleet/push-messages": PushMessagesRequest(node=them),
        "/v1/fleet/send-node-heartbeat": SendNodeHeartbeatRequest(node=them, heartbeat_interval=30),
        "/v1/fleet/deactivate-node": DeactivateNodeRequest(node_id=victim.node),
        "/v1/fleet/push-object": PushObjectRequest(node=them, object_content=b"x"),
        "/v1/fleet/activate-node": ActivateNodeRequest(public_key=victim.public_key, heartbeat_interval=30),
    }.items():
        assert post(mallory, path, request).status_code in (400, 403), path
    assert victim.node in set(grid.get_node_ids())


def test_a_reply_in_anothers_name_is_refused(grid, victim, mallory):
    asked(grid, victim, mallory)
    forged = Message(content(666.0), reply_to=victim.receive())
    with pytest.raises(httpx.HTTPStatusError, match="403"):
        mallory.announce(forged)


def test_a_reply_to_anothers_message_is_not_taken(grid, victim, mallory):
    (name,) = asked(grid, victim)
    forged = Message(content(666.0), reply_to=victim.receive())
    forged.metadata.__dict__["_src_node_id"] = mallory.node
    announced = mallory.announce(forged)
    assert not announced.objects_to_push
    assert list(grid.pull_messages([name])) == []
    assert victim.receive().metadata.message_id == name


def test_what_a_reply_says_of_itself_inside_does_not_count(grid, victim, mallory):
    """Flower's own grid goes by the message inside; there, one hospital can answer for another."""
    theirs, own = asked(grid, victim, mallory)
    reply = Message(content(666.0), reply_to=mallory.receive())
    reply.metadata.__dict__["_reply_to_message_id"] = theirs
    reply.metadata.__dict__["_src_node_id"] = victim.node
    inside = reply.object_id
    parts = {name: part.deflate() for name, part in get_all_nested_objects(reply).items()}
    tree = ObjectTree(object_id=inside, children=[ObjectTree(object_id=name) for name in parts if name != inside])
    reply.metadata.__dict__["_reply_to_message_id"] = own
    reply.metadata.__dict__["_src_node_id"] = mallory.node
    reply.__dict__["_object_id"] = inside
    announced = mallory.client.PushMessages(announcement(mallory, reply, inside, tree))
    for name in announced.objects_to_push:
        assert mallory.push_object(name, parts[name], grid.run.run_id, announced.session_id)
    (got,) = grid.pull_messages([theirs, own])
    assert got.metadata.reply_to_message_id == own
    assert got.metadata.src_node_id == mallory.node


def announcement(hospital, reply, name, tree):
    from flwr.app.message import remove_content_from_message
    from flwr.common.serde import message_to_proto

    reply.metadata.__dict__["_message_id"] = name
    return PushMessagesRequest(
        node=Node(node_id=hospital.node),
        messages_list=[message_to_proto(remove_content_from_message(reply))],
        message_object_trees=[tree],
    )


def test_nothing_can_be_pushed_into_anothers_upload(grid, victim, mallory):
    (name,) = asked(grid, victim)
    reply = Message(content(7.0), reply_to=victim.receive())
    parts, announced = get_all_nested_objects(reply), victim.announce(reply)
    for part in announced.objects_to_push:
        assert not mallory.push_object(part, parts[part].deflate(), grid.run.run_id, announced.session_id)
        assert not mallory.push_object(part, parts[part].deflate(), grid.run.run_id, "")
    assert list(grid.pull_messages([name])) == []
    victim.send(reply)
    assert len(list(grid.pull_messages([name]))) == 1


@pytest.mark.parametrize(
    "session", ["../../to/1", f"{'ab' * 32}.../../..", f"{'ab' * 32}.{'cd' * 32}", "\0", "." * 3000]
)
def test_an_upload_cannot_leave_its_folder(grid, mallory, session):
    asked(grid, mallory)
    reply = Message(content(), reply_to=mallory.receive())
    parts, announced = get_all_nested_objects(reply), mallory.announce(reply)
    name = announced.objects_to_push[0]
    request = PushObjectRequest(
        node=Node(node_id=mallory.node),
        run_id=grid.run.run_id,
        object_id=name,
        object_content=parts[name].deflate(),
        session_id=session,
    )
    answer = post(mallory, "/v1/fleet/push-object", request)
    assert answer.status_code == 400 or not answer.content  # an empty answer of Flower's says: not stored


# --- replays -------------------------------------------------------------------------------------------------
def test_a_captured_request_is_worth_nothing_under_another_certificate(grid, victim, mallory):
    captured = []
    victim.client._client.event_hooks["request"] = [captured.append]
    asked(grid, victim)
    victim.receive()
    assert len(captured) > 5
    with httpx.Client(verify=mallory.context) as client:
        for request in captured:
            answer = client.request(request.method, request.url, headers=request.headers, content=request.content)
            assert answer.status_code == 403


def test_a_push_that_is_replayed_counts_once(grid, victim):
    captured = []
    victim.client._client.event_hooks["request"] = [captured.append]
    (name,) = asked(grid, victim)
    victim.send(Message(content(2.0), reply_to=victim.receive(0)))
    victim.client._client.event_hooks["request"] = []

    def replay():
        for request in captured:
            victim.client._client.send(request)

    replay()
    assert len(list(grid.pull_messages([name]))) == 1
    replay()
    assert list(grid.pull_messages([name])) == []
    (other,) = asked(grid, victim)
    replay()
    assert list(grid.pull_messages([name, other])) == []


# --- certificates end on open connections --------------------------------------------------------------------
def revoke(rounds, *serials):
    """These alone are revoked from now on."""
    crl = read_authority(rounds.folder).crl(dict.fromkeys(serials, datetime.now(UTC)))
    durable.save_text(rounds.folder / "revoked.crl", crl.decode())


def test_a_revoked_certificate_is_refused_on_a_connection_that_is_open(rounds, mallory):
    assert not mallory.wait(0).messages_list
    revoke(rounds, certificates.bearer(mallory.certificate).serial)
    try:
        with pytest.raises(httpx.HTTPStatusError) as refused:
            mallory.wait(0)
        assert refused.value.response.status_code == 403
        assert "revoked" in refused.value.response.text
    finally:
        revoke(rounds)
    assert not mallory.wait(0).messages_list


def test_a_pull_that_is_held_is_not_answered_to_who_was_expelled_meanwhile(rounds, plain, grid, victim):
    serial = certificates.bearer(victim.certificate).serial
    with plain.in_thread(victim.wait, 20.0) as waited:
        time.sleep(0.3)
        revoke(rounds, serial)
        try:
            asked(grid, victim)
            with pytest.raises(httpx.HTTPStatusError, match="403"):
                waited.result(15)
        finally:
            revoke(rounds)


def test_without_a_revocation_list_everybody_is_refused(rounds, mallory):
    (rounds.folder / "revoked.crl").unlink()
    try:
        with pytest.raises(httpx.HTTPStatusError, match="403"):
            mallory.wait(0)
    finally:
        revoke(rounds)


def test_an_expired_certificate_is_refused_on_a_connection_that_is_open(rounds):
    hospital = rounds.enrol(lifetime=timedelta(seconds=2))
    until = certificates.bearer(hospital.certificate).not_after.timestamp()
    assert not hospital.wait(0).messages_list
    time.sleep(max(0.0, until - time.time()) + 0.01)
    with pytest.raises(httpx.HTTPStatusError) as refused:
        hospital.wait(0)
    assert "expired" in refused.value.response.text


# --- too much ------------------------------------------------------------------------------------------------
def test_a_body_that_is_too_large_is_refused_before_it_is_read(mallory):
    assert post(mallory, "/v1/fleet/push-object", bytes(gate.OBJECT + 1)).status_code == 413
    assert post(mallory, "/v1/fleet/pull-messages", bytes(gate.LETTER + 1)).status_code == 413


def test_a_body_that_does_not_say_its_length_is_cut_off(mallory):
    def long():
        for _ in range(512):
            yield b"\x2a\x80\x80\x80\x40" + bytes(2**16)

    with suppress(httpx.TransportError):  # it may be writing still
        assert post(mallory, "/v1/fleet/pull-messages", long()).status_code == 413


def test_a_head_without_end_is_cut_off(rounds, mallory):
    raw = socket.create_connection(("127.0.0.1", rounds.port), timeout=10)
    with mallory.context.wrap_socket(raw, server_hostname="127.0.0.1") as tls:
        tls.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: x\r\nx: ")
        with pytest.raises((ConnectionError, ssl.SSLError)):
            tls.sendall(b"a" * 2**26)


def test_a_reply_of_too_many_objects_is_refused(grid, mallory):
    asked(grid, mallory)
    reply = Message(content(), reply_to=mallory.receive())
    many = ObjectTree(
        object_id=reply.object_id, children=[ObjectTree(object_id=f"{number:064x}") for number in range(200)]
    )
    with pytest.raises(httpx.HTTPStatusError, match="413"):
        mallory.announce(reply, many)


def test_so_many_pulls_and_no_more_are_held(rounds, plain, mallory):
    from concurrent.futures import ThreadPoolExecutor

    request, many = PullMessagesRequest(node=Node(node_id=mallory.node)), (PROCESSES + 1) * polls.EACH
    with ThreadPoolExecutor(many) as threads:
        held = [
            threads.submit(post, mallory, "/v1/fleet/pull-messages", request, **{"x-cloister-wait": "2"})
            for _ in range(many)
        ]
        answers = [each.result().status_code for each in held]
    assert answers.count(429) >= many - PROCESSES * polls.EACH  # so many for each of the processes
    assert answers.count(200) >= polls.EACH


def test_a_request_that_stops_coming_is_given_up(monkeypatch):
    monkeypatch.setattr(gate, "SLOW", 0.05)

    async def stuck():
        await asyncio.sleep(60)
        return {}

    async def read():
        return [piece async for piece in gate._pieces({}, stuck, 10)]

    with pytest.raises(calls.Refused) as refused:
        asyncio.run(read())
    assert refused.value.status == 408
