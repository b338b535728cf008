"""A message as the objects of its parcel, opened by a hospital that trusts nobody.

What arrives is built up again out of six kinds of plain values, and nothing else; nothing here imports, unpickles or
runs what it is given.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.common.serde import message_from_proto
from flwr.proto.message_pb2 import Message as MessageProto

from cloister_shared.carried import Octets
from cloister_shared.errors import TicketRefused
from cloister_shared.parcel import Delivered, Packing, Parcel, chunk_head

_HEAD = 2**12
"""Octets in which an object that has no parts has said what it is."""


# --- what arrives -------------------------------------------------------------------------------------------
def inflated(root: str, objects: Mapping[str, Octets]) -> Message:
    """The message that these objects are: a header of plain values and flat arrays.

    Raises:
        TicketRefused: it holds something else, or its parts do not fit together.
    """
    try:
        (content,), _ = _opened(objects, root, "Message")
        parts: dict[str, str] = _said(objects, content, "RecordDict")
        if set(parts) != {"vectors", "header"}:
            raise ValueError("other parts than header and vectors")
        vectors = ArrayRecord()
        for name, array in _said(objects, parts["vectors"], "ArrayRecord").items():
            vectors[name] = _array(objects, array)
        record = RecordDict({"vectors": vectors, "header": ConfigRecord.inflate(bytes(objects[parts["header"]]))})
        message = Message.inflate(bytes(objects[root]), {content: record})
    except MemoryError:
        raise
    except Exception as error:  # of many kinds, and their text may quote the content
        raise TicketRefused(
            f"The message is no ticket: its parts do not fit together ({type(error).__name__}).",
            mend="Run the same release of Cloister on both sides.",
        ) from None
    message.metadata.__dict__["_message_id"] = root  # which cannot be a part of what it is the hash of
    return message


def _array(objects: Mapping[str, Octets], name: str) -> Array:
    parts, body = _opened(objects, name, "Array")
    said: dict[str, Any] = json.loads(bytes(body))
    each = [_chunk(objects[part]) for part in parts]
    chunks = [each[at] for at in said["arraychunk_ids"]]
    (length,) = said["shape"]
    # Before it is put together: one chunk, named a million times, would be a large array.
    if sum(map(len, chunks)) != length * np.dtype(str(said["dtype"])).itemsize:
        raise ValueError("its length is not what it says")
    delivered = [(parts[at], len(each[at])) for at in said["arraychunk_ids"]]  # names that the agent looked at
    return Delivered(str(said["dtype"]), str(said["stype"]), b"".join(chunks), delivered)


def _chunk(content: Octets) -> memoryview:
    head, end, _ = bytes(content[:_HEAD]).partition(b"\x00")
    body = memoryview(content)[len(head + end) :]
    if head + end != chunk_head(len(body)):
        raise ValueError("not a whole chunk")
    return body


def _opened(objects: Mapping[str, Octets], name: str, kind: str) -> tuple[list[str], memoryview]:
    """Names of an object's parts, and its body."""
    content = objects[name]
    head, end, _ = bytes(content[:_HEAD]).partition(b"\x00")
    if not end:
        head, _, _ = bytes(content).partition(b"\x00")
    is_, parts, size = head.decode("ascii").split(" ")
    body = memoryview(content)[len(head) + 1 :]
    if is_ != kind or int(size) != len(body):
        raise ValueError(f"not a whole {kind}")
    return parts.split(",") if parts else [], body


# --- what leaves --------------------------------------------------------------------------------------------
def reply(message: bytes, header: str, arrays: Mapping[str, Array]) -> Parcel:
    """What the training process says to a message in Flower's protobuf, packed here: it names no object itself."""
    asked, vectors = message_from_proto(MessageProto.FromString(message)), ArrayRecord()
    for name, values in arrays.items():
        vectors[name] = values
    record = RecordDict({"vectors": vectors, "header": ConfigRecord({"json": header})})
    return deflated(Message(record, reply_to=asked), asked)


def deflated(reply: Message, to: Message) -> Parcel:
    """A reply as objects. The same answer to the same message has the same name, however often it is given.

    So one whose way was cut off can be sent again, by an agent that started anew, and is still one reply.
    """
    reply.metadata.created_at, reply.metadata.ttl = to.metadata.created_at, to.metadata.ttl
    packing = Packing()
    said, tree = packing.message(reply)
    return Parcel(said.SerializeToString(), tree.SerializeToString(), packing.objects)


def error_reply(message: bytes, code: int, reason: str) -> Parcel:
    """The reply that there is no work, to a message in Flower's protobuf."""
    asked = message_from_proto(MessageProto.FromString(message))
    return deflated(Message(Error(code=code, reason=reason), reply_to=asked), asked)


# --- what is in a reply, without its values -----------------------------------------------------------------
@dataclass(frozen=True)
class Contents:
    """What kinds of values a reply holds: of each vector name, type and length; of the header its keys."""

    run: int
    answers: str
    """The message that it replies to."""
    vectors: tuple[tuple[str, str, int], ...] = ()
    header: tuple[str, ...] = ()
    round: int | None = None
    error: int | None = None
    """Flower's code, if it is no work but an error."""


def contents(parcel: Parcel) -> Contents:
    """Read off the objects that are about to leave.

    Raises:
        ValueError: it holds what no reply of ours does.
    """
    children, message = _opened(parcel.objects, parcel.root, "Message")
    proto = MessageProto.FromString(bytes(message))
    to = proto.metadata.run_id, proto.metadata.reply_to_message_id
    if proto.HasField("error"):
        return Contents(*to, error=proto.error.code)
    parts = _said(parcel.objects, children[0], "RecordDict")
    if set(parts) != {"vectors", "header"}:
        raise ValueError("it has other parts than header and vectors")
    header: dict[str, Any] = json.loads(str(ConfigRecord.inflate(bytes(parcel.objects[parts["header"]]))["json"]))
    arrays = _said(parcel.objects, parts["vectors"], "ArrayRecord")
    found = {name: _said(parcel.objects, array, "Array") for name, array in arrays.items()}
    vectors = tuple((name, str(array["dtype"]), int(array["shape"][0])) for name, array in sorted(found.items()))
    number = header.get("round")
    return Contents(*to, vectors, tuple(_keys(header)), number if isinstance(number, int) else None)


def _keys(said: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """Keys of what is said at all; of a table, those inside it, after a dot."""
    for key, value in said.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{before}{key}.")
        elif value not in ("", None, []):
            yield f"{before}{key}"


def _said(objects: Mapping[str, Octets], name: str, kind: str) -> dict[str, Any]:
    return json.loads(bytes(_opened(objects, name, kind)[1]))
