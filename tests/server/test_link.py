"""The embedded SuperLink: one message there and back over mutual TLS, and what happens when any part of it dies."""

import hashlib
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from email.utils import parsedate_to_datetime
from pathlib import Path

import flwr
import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.proto.node_pb2 import Node

from cloister_server.link import grid as grid_module
from cloister_server.link import letters, open_link, state
from cloister_server.link.inflate import Reader, Room
from cloister_server.link.serve import PROCESSES
from cloister_server.rounds import collect
from cloister_shared.carried import attached
from cloister_shared.errors import EnrolmentRefused, LinkLost, VersionRefused
from cloister_shared.parcel import CHUNK, chunk_name, cut, names

PLAN = "ab" * 32


def content(value: float = 1.0, size: int = 1000) -> RecordDict:
    vector = np.full(size, value, dtype="<f4")
    array = Array("float32", vector.shape, "cloister.float32.le", vector.tobytes())
    return RecordDict({"vectors": ArrayRecord({"model": array}), "header": ConfigRecord({"json": "{}"})})


def value(message: Message) -> float:
    return float(np.frombuffer(message.content["vectors"]["model"].data, "<f4")[0])


def ask(grid, *hospitals, **said):
    return grid.push_messages([Message(content(**said), hospital.node, "train") for hospital in hospitals])


def pull(grid, names, seconds=10.0):
    """Replies to these messages, by message, waited for."""
    waiting, replies, until = set(names), {}, time.monotonic() + seconds
    while waiting and time.monotonic() < until:
        for reply in grid.pull_messages(waiting):
            replies[reply.metadata.reply_to_message_id] = reply
        waiting -= replies.keys()
        time.sleep(0.005)
    return replies


# --- Flower's private parts ----------------------------------------------------------------------------------
def test_every_private_part_of_flower_is_as_it_was():
    assert flwr.__version__ == state.FLOWER == "1.41.0", (
        f"Flower {flwr.__version__} is installed. The coordinator uses private parts of 1.41.0: read what changed in "
        "what this test lists and in cloister_server/link, run tests/server/test_link.py and tests/attacks, then name "
        "the new release in link/state.py and pyproject.toml."
    )
    from flwr.app.message import make_message, remove_content_from_message
    from flwr.common.serde import message_from_proto, message_to_proto
    from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
    from flwr.supercore.error.catalog import API_ERROR_MAP, ApiErrorSpec
    from flwr.supercore.inflatable import inflatable_object
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.superlink.servicer.fleet import fleet_handlers

    expected = {
        SqlLinkState.__init__: "self database_path federation_manager object_store",
        SqlLinkState.initialize: "self log_queries engine_kwargs",
        SqlLinkState.session: "self",
        SqlLinkState.create_node: "self owner_aid owner_name public_key heartbeat_interval location name",
        SqlLinkState.delete_node: "self owner_aid node_id",
        SqlLinkState.deactivate_node: "self node_id",
        SqlLinkState.get_node_id_by_public_key: "self public_key",
        SqlLinkState.get_node_info: "self node_ids owner_aids statuses",
        SqlLinkState.create_run: (
            "self fab_id fab_version fab_hash override_config federation_id federation_config flwr_aid "
            "primary_task_type series_id series_description connector_ids initial_task_event user_prompt"
        ),
        SqlLinkState.get_run_info: "self run_ids statuses flwr_aids federation_ids order_by ascending limit skip",
        SqlLinkState.claim_task: "self task_id",
        SqlLinkState.activate_task: "self task_id",
        SqlLinkState.finish_task: "self task_id sub_status details",
        SqlLinkState.acknowledge_task_heartbeat: "self task_id",
        SqlLinkState.stop_run: "self run_id",
        SqlLinkState.cleanup_run: "self run_id",
        SqlLinkState.store_message_ins: "self message",
        SqlLinkState.store_message_res: "self message",
        SqlLinkState.delete_messages: "self message_ins_ids",
        fleet_handlers.activate_node: "request state",
        fleet_handlers.send_node_heartbeat: "request state",
        fleet_handlers.get_run: "request state",
        inflatable_object.get_all_nested_objects: "obj",
        inflatable_object.get_object_tree: "obj",
        inflatable_object.iterate_object_tree: "tree",
        inflatable_object.no_object_id_recompute: "",
        make_message: "metadata content error",
        remove_content_from_message: "message",
        message_from_proto: "message_proto",
        message_to_proto: "message",
    }
    for function, parameters in expected.items():
        assert " ".join(inspect.signature(function).parameters) == parameters, f"{function.__qualname__} changed"
    assert {"http_status_code", "public_message"} <= set(ApiErrorSpec.__annotations__)
    assert API_ERROR_MAP
    assert isinstance(type(TaskIdentity).run_id, property)


def test_the_tables_that_are_read_directly_have_these_columns(tmp_path):
    link = open_link(tmp_path / "link")
    for table, columns in {
        "message_ins": {"message_id", "run_id", "dst_node_id", "created_at", "ttl"},
        "message_res": {"message_id", "reply_to_message_id"},
        "node": {"node_id", "status", "online_until"},
    }.items():
        assert columns <= {row["name"] for row in link.state.query(f"PRAGMA table_info({table})")}, table


def test_another_release_of_flower_is_refused_in_plain_words(tmp_path, monkeypatch):
    monkeypatch.setattr(flwr, "__version__", "1.42.0")
    with pytest.raises(VersionRefused, match=r"Flower 1\.42\.0 is installed.*pip install flwr==1\.41\.0"):
        open_link(tmp_path / "link")


# --- hospitals -----------------------------------------------------------------------------------------------
def test_a_key_is_one_node_and_does_not_come_back(tmp_path):
    link = open_link(tmp_path / "link")
    node = link.register(b"key")
    assert link.register(b"key") == node != link.register(b"other key")
    assert open_link(tmp_path / "link").register(b"key") == node
    link.forget(b"key")
    with pytest.raises(EnrolmentRefused, match="expelled"):
        link.register(b"key")


# --- letters -------------------------------------------------------------------------------------------------
def named(octets: bytes) -> str:
    return hashlib.sha256(octets).hexdigest()


def test_what_letters_share_is_stored_once(tmp_path):
    post = letters.Letters(tmp_path / "letters")
    model, name = b"model", named(b"model")
    own = [named(b"to 1"), named(b"to 2")]
    post.post(
        7,
        [letters.Letter(node, own[node - 1], b"told", [name, own[node - 1]]) for node in (1, 2)],
        {name: model, own[0]: b"to 1", own[1]: b"to 2"},
    )
    (first, second) = (tmp_path / "letters").rglob(name)
    assert first.samefile(second)
    assert bytes(post.find(7, 1, name) or b"") == model
    assert post.find(7, 1, own[1]) is None  # another's
    post.drop(7, 1, own[0])
    assert bytes(post.find(7, 2, name) or b"") == model


def test_a_reply_is_whole_when_its_last_object_came_however_often_each_does(tmp_path):
    post, message, reply = letters.Letters(tmp_path / "letters"), named(b"message"), named(b"reply")
    place, parts = post.reply(7, 1, message, reply), [b"reply", b"one", b"two"]
    names = [named(part) for part in parts]

    def come(octets, name=""):
        incoming = post.receive(7, 1)
        try:
            incoming.write([octets])
            return letters.take(place, name or named(octets), incoming)
        finally:
            incoming.close()

    with pytest.raises(FileNotFoundError):
        come(b"reply")
    assert letters.announce(place, b"said", names) == sorted(names)
    assert not come(b"one")
    assert not come(b"one")
    with pytest.raises(FileNotFoundError):
        come(b"not announced")
    with pytest.raises(ValueError, match="SHA-256"):
        come(b"three", name=named(b"two"))
    assert letters.announce(place, b"said", names) == sorted(set(names) - {named(b"one")})
    assert not come(b"two")
    assert come(b"reply")
    assert come(b"reply")
    assert letters.announce(place, b"said", names) == []
    assert {path.name for path in place.iterdir()} == {*names, "names", "said"}
    assert not list(place.parent.parent.glob("coming-*"))


def test_what_comes_along_with_the_announcement_is_there(tmp_path):
    post, message, parts = letters.Letters(tmp_path / "letters"), named(b"message"), [b"reply", b"one", b"two"]
    place, names = post.reply(7, 1, message, named(b"reply")), [named(part) for part in parts]
    assert letters.announce(place, b"said", names, [b"one", b"not announced", b"one"]) == sorted({*names} - {names[1]})
    assert letters.announce(place, b"said", names, [b"reply", b"two"]) == []
    assert [(place / name).read_bytes() for name in names] == parts
    assert {path.name for path in place.iterdir()} == {*names, "names", "said"}


def test_a_message_brings_its_small_objects_along(rounds):
    hospital = rounds.enrol()
    with rounds.link.run(PLAN) as grid:
        ask(grid, hospital, size=2**20)
        pulled = hospital.wait()
        (tree,) = pulled.message_object_trees
        came = {named(content) for content in attached(pulled)}
        assert tree.object_id in came
        (large,) = set(names(tree)) - came
        assert len(hospital.pull_object(large, grid.run.run_id)) > 4 * 2**20


def test_a_name_with_a_path_in_it_is_no_name(tmp_path):
    post = letters.Letters(tmp_path / "letters")
    for name in ("../" * 10 + "etc/passwd", "", "AB" * 32, "ab" * 31):
        with pytest.raises(ValueError, match="SHA-256"):
            post.reply(1, 1, "ab" * 32, name)
        with pytest.raises(ValueError, match="SHA-256"):
            post.find(1, 1, name)


# --- there and back ------------------------------------------------------------------------------------------
def test_a_message_goes_there_and_its_reply_comes_back(rounds):
    hospital = rounds.enrol()
    with rounds.link.run(PLAN, [hospital.node]) as grid:
        assert grid.get_node_ids() == [hospital.node]
        (name,) = ask(grid, hospital, value=3.0)
        message = hospital.receive()
        assert value(message) == 3.0
        hospital.send(Message(content(4.0), reply_to=message))
        (reply,) = pull(grid, [name]).values()
        assert value(reply) == 4.0
        assert reply.metadata.src_node_id == hospital.node
        assert reply.metadata.reply_to_message_id == name


def test_of_a_run_nothing_remains(rounds):
    hospital = rounds.enrol()

    def stumble():
        with rounds.link.run(PLAN) as grid:
            ask(grid, hospital)
            hospital.receive()
            raise RuntimeError("the worker stumbles")

    with pytest.raises(RuntimeError, match="stumbles"):
        stumble()
    assert rounds.link.letters.runs() == []
    assert rounds.link.state.num_message_ins() == rounds.link.state.num_message_res() == 0


def test_the_run_names_the_plan_to_whom_it_asks_and_nobody_else(rounds):
    from flwr.proto.run_pb2 import GetRunRequest

    asked, other = rounds.enrol(), rounds.enrol()
    with rounds.link.run(PLAN) as grid:
        ask(grid, asked)
        question = {"run_id": grid.run.run_id}
        run = asked.client.GetRun(GetRunRequest(node=Node(node_id=asked.node), **question)).run
        assert run.fab_hash == PLAN
        with pytest.raises(httpx.HTTPStatusError, match="404"):
            other.client.GetRun(GetRunRequest(node=Node(node_id=other.node), **question))


def test_a_held_pull_ends_with_the_message_or_with_its_time(rounds, plain):
    hospital = rounds.enrol()
    began = time.monotonic()
    assert not hospital.wait(0.3).messages_list
    assert 0.25 < time.monotonic() - began < 5
    with rounds.link.run(PLAN) as grid, plain.in_thread(hospital.wait, 20.0) as waited:
        time.sleep(0.2)
        (name,) = ask(grid, hospital)
        sent = time.monotonic()
        assert waited.result(10).messages_list[0].metadata.message_id == name
        assert time.monotonic() - sent < 5


def test_a_message_is_given_again_until_it_is_answered_or_held(rounds):
    hospital = rounds.enrol()
    with rounds.link.run(PLAN) as grid:
        (name,) = ask(grid, hospital)
        first, again = hospital.receive(), hospital.receive()
        assert first.metadata.message_id == again.metadata.message_id == name
        assert hospital.receive(0.1, holding=[name]) is None
        hospital.send(Message(content(), reply_to=again))
        assert hospital.receive(0.1) is None
        assert len(pull(grid, [name])) == 1


def test_a_reply_counts_when_all_of_it_came_and_once(rounds):
    hospital = rounds.enrol()
    with rounds.link.run(PLAN) as grid:
        (name,) = ask(grid, hospital)
        message = hospital.receive()
        broken, whole = (Message(content(number), reply_to=message) for number in (5.0, 6.0))
        announced = hospital.announce(broken)
        assert len(announced.objects_to_push) == 6
        assert list(grid.pull_messages([name])) == []
        assert hospital.receive(0.1) is not None  # of what is half answered it is told again
        hospital.send(whole)
        hospital.send(whole)
        assert list(hospital.announce(broken).objects_to_push) == []  # the first whole answer counts
        (reply,) = pull(grid, [name]).values()
        assert value(reply) == 6.0
        hospital.send(whole)  # and is gone now: nobody asks any more
        assert list(grid.pull_messages([name])) == []
        assert rounds.link.state.num_message_res() == 0


def test_what_is_not_collected_is_withdrawn_when_the_next_thing_is_asked(rounds):
    hospital = rounds.enrol()
    with rounds.link.run(PLAN) as grid:
        (old,) = ask(grid, hospital, value=1.0)
        late = hospital.receive()
        (new,) = ask(grid, hospital, value=2.0)
        assert not hospital.announce(Message(content(9.0), reply_to=late)).objects_to_push
        message = hospital.receive()
        assert message.metadata.message_id == new
        assert hospital.pull_object(old, grid.run.run_id) is None
        hospital.send(Message(content(3.0), reply_to=message))
        assert {value(reply) for reply in pull(grid, [new]).values()} == {3.0}
        assert list(grid.pull_messages([old, new])) == []


def test_an_error_comes_back_with_its_reason_cut_to_size(rounds):
    hospital = rounds.enrol()
    with rounds.link.run(PLAN) as grid:
        (name,) = ask(grid, hospital)
        hospital.send(Message(Error(7, "no " * 5000), reply_to=hospital.receive()))
        (reply,) = pull(grid, [name]).values()
        assert reply.error.code == 7
        assert len(reply.error.reason) == 2000


def test_the_grid_serves_the_round_that_collects(rounds):
    hospitals = [rounds.enrol() for _ in range(3)]
    with rounds.link.run(PLAN) as grid:
        names = ask(grid, *hospitals)
        sent = dict(zip(names, "abc", strict=True))
        for number, hospital in enumerate(hospitals[:2]):
            hospital.send(Message(content(number), reply_to=hospital.receive()))
        got = {}
        silent = collect(grid, sent, 0.5, lambda who, message: got.update({who: value(message)}))
    assert got == {"a": 0.0, "b": 1.0}
    assert silent == {"c": "no answer within 0.5 s"}


def test_a_hospital_that_is_not_heard_of_any_more_is_an_error_unless_the_port_was_closed(rounds, monkeypatch):
    hospital, left = rounds.enrol(), rounds.enrol()
    monkeypatch.setattr(grid_module, "GRACE", 0.0)
    with rounds.link.run(PLAN) as grid:
        names = ask(grid, hospital, left)
        rounds.link.state.deactivate_node(left.node)
        monkeypatch.setattr(grid_module, "served_for", lambda _: 1.0)
        assert list(grid.pull_messages(names)) == []
        monkeypatch.setattr(grid_module, "served_for", lambda _: 1000.0)
        (gone,) = pull(grid, names, 2.0).values()
        assert gone.metadata.reply_to_message_id == names[1]
        assert "not heard of" in gone.error.reason


def test_a_hospital_that_starts_anew_is_let_in_at_once(rounds):
    hospital = rounds.enrol()
    node = hospital.node
    hospital.connect()
    hospital.activate()
    assert hospital.node == node
    assert node in rounds.link.online()


def test_a_second_worker_takes_the_run_from_the_first(rounds, monkeypatch):
    hospital = rounds.enrol()
    monkeypatch.setattr(state, "BEAT", 0.05)
    with rounds.link.run(PLAN) as first:
        (old,) = ask(first, hospital)
        with open_link(rounds.folder / "link").run(PLAN) as second:
            (name,) = ask(second, hospital)
            assert hospital.receive().metadata.message_id == name
            with pytest.raises(LinkLost, match="ended"):
                pull(first, [old])
            with pytest.raises(LinkLost, match="ended"):
                ask(first, hospital)
            assert hospital.receive().metadata.message_id == name


def test_an_agent_of_another_version_is_told_what_to_upgrade(rounds):
    hospital = rounds.enrol()
    hospital.says.headers["x-cloister-protocol"] = "2.0 (cloister 9)"
    with pytest.raises(httpx.HTTPStatusError) as refused:
        hospital.wait()
    assert refused.value.response.status_code == 426
    assert "Upgrade the coordinator to the release of the agent of" in refused.value.response.text


def test_every_answer_says_what_time_it_is(rounds):
    hospital = rounds.enrol()
    with httpx.Client(verify=hospital.context) as client:
        answer = client.get(f"https://127.0.0.1:{rounds.port}/health")
    assert abs(parsedate_to_datetime(answer.headers["date"]).timestamp() - time.time()) < 5


def test_connections_are_spread_over_the_processes(rounds):
    hospital, parent = rounds.enrol(), rounds.process.pid
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()

    def sockets(pid):
        return sum(os.readlink(path).startswith("socket") for path in Path(f"/proc/{pid}/fd").iterdir())

    before = [sockets(pid) for pid in (parent, *children)]
    with ExitStack() as stack:
        for _ in range(15 * PROCESSES):
            client = stack.enter_context(httpx.Client(verify=hospital.context))
            assert client.get(f"https://127.0.0.1:{rounds.port}/health").status_code == 200
        after = [sockets(pid) for pid in (parent, *children)]
    assert len(after) == PROCESSES
    assert all(now >= then + 3 for now, then in zip(after, before, strict=True))


# --- what a hospital may make of its bytes -------------------------------------------------------------------
def lay(folder: Path, kind: str, body: bytes, parts=()) -> str:
    octets = f"{kind} {','.join(parts)} {len(body)}\0".encode() + body
    (folder / named(octets)).write_bytes(octets)
    return named(octets)


def message_of(folder: Path, *content: str) -> str:
    from flwr.proto.message_pb2 import Message as MessageProto

    return lay(folder, "Message", MessageProto().SerializeToString(), content)


@pytest.fixture
def asked():
    from flwr.app import Metadata

    return Metadata(1, "m", 2, 1, "asked", "g", 1.0, 1.0, "train")


def test_one_chunk_named_a_million_times_is_refused_before_it_is_read(tmp_path, asked):
    chunk = lay(tmp_path, "ArrayChunk", bytes(1000))
    said = {"dtype": "float32", "shape": [1], "stype": "x", "arraychunk_ids": [0] * 1_000_000}
    reply = reply_of(tmp_path, said, chunk)
    with pytest.raises(ValueError, match="larger"):
        Reader(tmp_path, 64 * 2**20, Room()).message(reply, asked)


def reply_of(folder: Path, said: dict, *chunks: str) -> str:
    array = lay(folder, "Array", json.dumps(said).encode(), chunks)
    record = lay(folder, "ArrayRecord", json.dumps({"a": array}).encode(), [array])
    return message_of(folder, lay(folder, "RecordDict", json.dumps({"vectors": record}).encode(), [record]))


@pytest.mark.parametrize(("sizes", "kept"), [([CHUNK, 9], True), ([CHUNK], True), ([9, CHUNK], False), ([3, 3], False)])
def test_names_of_chunks_are_kept_if_they_are_cut_as_we_cut(tmp_path, asked, sizes, kept):
    chunks = [lay(tmp_path, "ArrayChunk", os.urandom(size)) for size in sizes]
    said = {"dtype": "uint8", "shape": [sum(sizes)], "stype": "x", "arraychunk_ids": [*range(len(sizes))]}
    array = Reader(tmp_path, 2**30, Room()).message(reply_of(tmp_path, said, *chunks), asked).content["vectors"]["a"]
    assert array.chunks == (tuple(chunks) if kept else ())
    assert [*map(chunk_name, cut(array.data))] == [*array.chunks] or not kept


def test_room_is_used_again_when_nobody_uses_what_was_in_it():
    room = Room()
    first = np.frombuffer(room.take(2**21), np.uint8)
    where = first.ctypes.data
    assert np.frombuffer(room.take(2**21), np.uint8).ctypes.data != where  # the first is in use
    del first
    kept = np.frombuffer(room.take(2**21), np.uint8)[5:]
    where = kept.ctypes.data
    del kept
    assert np.frombuffer(room.take(2**21), np.uint8).ctypes.data == where - 5


@pytest.mark.parametrize("octets", [b"ArrayChunk x 9\0123456789", b"ArrayChunk  8\0123456789", b"Array  9\0123456789"])
def test_a_chunk_with_a_head_of_its_own_making_is_none(tmp_path, asked, octets):
    (tmp_path / named(octets)).write_bytes(octets)
    said = {"dtype": "uint8", "shape": [9], "stype": "x", "arraychunk_ids": [0]}
    with pytest.raises(ValueError, match="no chunks"):
        Reader(tmp_path, 2**20, Room()).message(reply_of(tmp_path, said, named(octets)), asked)


def test_what_is_not_in_the_letter_is_no_part_of_the_reply(tmp_path, asked):
    (tmp_path / "other").mkdir()
    (tmp_path / "mine").mkdir()
    theirs = lay(tmp_path / "other", "ConfigRecord", b"")
    for part, error in ((theirs, OSError), (f"../other/{theirs}", ValueError)):
        whole = lay(tmp_path / "mine", "RecordDict", json.dumps({"a": part}).encode(), [theirs])
        with pytest.raises(error):
            Reader(tmp_path / "mine", 2**20, Room()).message(message_of(tmp_path / "mine", whole), asked)


def test_a_part_in_another_parts_place_is_refused(tmp_path, asked):
    config = lay(tmp_path, "ConfigRecord", b"")
    with pytest.raises(ValueError, match="in the place of a Message"):
        Reader(tmp_path, 2**20, Room()).message(config, asked)
    with pytest.raises(ValueError, match="in the place of a RecordDict"):
        Reader(tmp_path, 2**20, Room()).message(message_of(tmp_path, config), asked)


# --- when a process dies -------------------------------------------------------------------------------------
WORKER = """
import sys, time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from cloister_server.link import open_link
link = open_link(Path(sys.argv[1]))
with link.run(sys.argv[2]) as grid:
    grid.push_messages([Message(RecordDict({"a": ConfigRecord({"json": "{}"})}), int(sys.argv[3]), "train")])
    print(grid.run.run_id, flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_when_the_rounds_are_killed_and_served_again_nothing_is_lost(plain, tmp_path):
    folder, port = plain.found_consortium(tmp_path / "consortium"), plain.free_port()
    first = plain.start_serving(folder, port)
    link = open_link(folder / "link")
    hospital = plain.PlainHospital(folder, "St Mary's", port)
    link.register(hospital.public_key)
    hospital.activate()
    with closing(hospital), link.run(PLAN) as grid:
        (name,) = ask(grid, hospital)
        message = hospital.receive()
        reply = Message(content(8.0), reply_to=message)
        announced = hospital.announce(reply)
        first.send_signal(signal.SIGKILL)  # in the midst of an upload
        first.wait()
        with plain.serving(folder, port):
            hospital.connect()
            assert hospital.receive().metadata.message_id == name
            assert sorted(hospital.announce(reply).objects_to_push) == sorted(announced.objects_to_push)
            hospital.send(reply)
            (got,) = pull(grid, [name]).values()
            assert value(got) == 8.0


@pytest.mark.slow
def test_a_killed_worker_leaves_a_run_that_the_next_one_clears_away(rounds):
    hospital = rounds.enrol()
    plan = "cd" * 32
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(rounds.folder / "link"), plan, str(hospital.node)], stdout=subprocess.PIPE
    )
    assert worker.stdout
    run = int(worker.stdout.readline())
    old = hospital.wait()
    worker.kill()
    worker.wait()
    assert rounds.link.letters.runs() == [run]
    with rounds.link.run(plan) as grid:
        assert rounds.link.letters.runs() == []
        (name,) = ask(grid, hospital)
        pulled = hospital.wait(holding=[old.messages_list[0].metadata.message_id])
        assert pulled.messages_list[0].metadata.message_id == name
        hospital.send(Message(content(2.0), reply_to=hospital.fetch(pulled)))
        assert [value(reply) for reply in pull(grid, [name]).values()] == [2.0]


@pytest.mark.slow
def test_it_ends_within_three_seconds_though_pulls_are_held(plain, tmp_path):
    folder, port = plain.found_consortium(tmp_path / "consortium"), plain.free_port()
    with plain.serving(folder, port) as process:
        link = open_link(folder / "link")
        hospital = plain.PlainHospital(folder, "St Mary's", port)
        link.register(hospital.public_key)
        hospital.activate()
        with closing(hospital), plain.in_thread(hospital.wait, 20.0) as waited:
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            assert process.wait(10) == 0
            assert time.monotonic() - began < 3
            assert not waited.result(5).messages_list


@pytest.mark.slow
def test_one_folder_is_served_once_and_no_process_outlives_the_first(plain, tmp_path):
    folder, port = plain.found_consortium(tmp_path / "consortium"), plain.free_port()
    with plain.serving(folder, port) as process:
        with pytest.raises(RuntimeError, match="not served"):
            plain.start_serving(folder, plain.free_port())
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert children
        process.kill()
        process.wait()
        until = time.monotonic() + 5
        while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < until:
            time.sleep(0.02)
        assert not any(Path(f"/proc/{child}").exists() for child in children)
