"""A message as objects: what Flower makes of one, and nothing that could run."""

import re
import time
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import make_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto

from cloister_client.objects import deflated, inflated
from cloister_client.trainer import _environment
from cloister_shared.errors import TicketRefused
from cloister_shared.wire import TicketHeader, pack, pack_vectors, unpack_ticket

from .letters import message


def test_objects_are_what_flower_makes_of_a_message():
    from flwr.app.message import remove_content_from_message
    from flwr.proto.message_pb2 import ObjectTree
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    vectors = {
        "model": np.random.default_rng(0).random(3_000_000, np.float32),
        "control": np.zeros(3_000_000, np.float32),
    }
    content = pack(TicketHeader(run="run-1", plan="p", round=1, site="a"), pack_vectors(vectors))
    ours = message(content)
    theirs = message_from_proto(MessageProto.FromString(ours.message))
    theirs = make_message(theirs.metadata, content=content)
    assert ours.root == theirs.object_id
    assert ours.objects == {name: part.deflate() for name, part in get_all_nested_objects(theirs).items()}
    assert ObjectTree.FromString(ours.tree) == get_object_tree(theirs)
    assert ours.message == message_to_proto(remove_content_from_message(theirs)).SerializeToString()
    back, as_theirs = inflated(ours.root, ours.objects), inflate_object_from_contents(ours.root, dict(ours.objects))
    assert back.content["header"] == as_theirs.content["header"]
    for name, array in as_theirs.content["vectors"].items():
        mine = back.content["vectors"][name]
        assert (mine.dtype, mine.shape, mine.stype, mine.data) == (array.dtype, array.shape, array.stype, array.data)
    ticket = unpack_ticket(back.content)
    assert [*map(len, ticket.chunks.values())] == [3, 3]
    assert ticket.digest == unpack_ticket(content).digest


def test_a_chunk_with_a_head_of_its_own_making_is_none():
    good = message(
        pack(TicketHeader(run="r", plan="p", round=1, site="a"), pack_vectors({"model": np.zeros(9, np.float32)}))
    )
    odd = {name: content.replace(b"ArrayChunk  36", b"ArrayChunk x 36") for name, content in good.objects.items()}
    with pytest.raises(TicketRefused, match="do not fit together"):
        inflated(good.root, odd)


def test_one_chunk_named_a_million_times_is_no_large_array():
    good = message(
        pack(TicketHeader(run="r", plan="p", round=1, site="a"), pack_vectors({"model": np.zeros(9, np.float32)}))
    )
    bomb = {
        name: content.replace(b'"arraychunk_ids": [0]', b'"arraychunk_ids": [' + b"0, " * 10**6 + b"0]")
        for name, content in good.objects.items()
    }
    (array,) = (content for content in bomb.values() if content.startswith(b"Array "))
    head, _, body = array.partition(b"\0")
    whole = b" ".join([*head.split(b" ")[:2], str(len(body)).encode()]) + b"\0" + body
    bomb = {name: whole if content is array else content for name, content in bomb.items()}
    with pytest.raises(TicketRefused, match="do not fit together"):
        inflated(good.root, bomb)


def test_the_same_answer_to_the_same_message_has_the_same_name():
    ticket = message(RecordDict({"vectors": ArrayRecord(), "header": ConfigRecord({"json": "{}"})}))
    to = inflated(ticket.root, ticket.objects)
    first = deflated(Message(RecordDict(), reply_to=to), to)
    time.sleep(0.01)
    assert deflated(Message(RecordDict(), reply_to=to), to).root == first.root


def test_no_way_leads_from_a_message_to_code():
    """What reads a message does nothing that could run, load or unpickle it."""
    here = Path(__file__).resolve().parents[3]
    files = [
        here / f"client/cloister_client/{name}.py" for name in ("agent", "channel", "child", "fleet", "objects", "app")
    ]
    files.append(here / "shared/cloister_shared/wire.py")
    banned = r"\b(pickle|marshal|shelve|dill|joblib|eval|exec|compile|__import__|import_module|torch\.load|np\.load)\b"
    found = {path.name: re.findall(banned, path.read_text()) for path in files}
    assert not any(found.values()), found


def test_its_environment_holds_no_proxy_and_no_token(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "AWS_SECRET_ACCESS_KEY", "FLWR_TOKEN"):
        monkeypatch.setenv(name, "http://user:secret@proxy")
    assert not [name for name, value in _environment().items() if "secret" in value]
    assert _environment()["FLWR_TELEMETRY_ENABLED"] == "0"
