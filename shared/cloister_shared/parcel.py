"""A Flower message as the objects that travel: each a piece of bytes whose name is its SHA-256.

The root is the message, its children the records, arrays and chunks of 5 MiB. Flower 1.41 cuts and names them like
this; here each is made once, and what several messages hold is in one place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.serde_utils import error_to_proto, metadata_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto

CHUNK = 5 * 2**20
"""Octets of an array in one object, as Flower cuts it."""


@dataclass(frozen=True)
class Parcel:
    """A message ready to be sent: what Flower wants to be told of it, and its objects."""

    message: bytes
    """Flower's protobuf, without the content."""
    tree: bytes
    """Flower's protobuf of which object is part of which."""
    objects: dict[str, bytes]

    @property
    def root(self) -> str:
        """The name of the message itself, which all its content follows from."""
        return ObjectTree.FromString(self.tree).object_id

    @property
    def size(self) -> int:
        """Octets of all its objects."""
        return sum(map(len, self.objects.values()))


def name_of(content: bytes | memoryview) -> str:
    """The name of an object: its SHA-256, in hex."""
    return hashlib.sha256(content).hexdigest()


def names(tree: ObjectTree) -> list[str]:
    """The objects of a tree, each once."""
    found, waiting = dict[str, None](), [tree]
    while waiting:
        node = waiting.pop()
        if node.object_id not in found:
            found[node.object_id] = None
            waiting += node.children
    return list(found)


@dataclass
class Packing:
    """Objects of messages, as they are made. A message may not change while its objects are in use."""

    objects: dict[str, bytes] = field(default_factory=dict[str, bytes])
    _trees: dict[str, ObjectTree] = field(default_factory=dict[str, ObjectTree])
    _arrays: dict[int, str] = field(default_factory=dict[int, str])
    """Of each record of arrays, by its identity: its name."""

    def message(self, message: Message) -> tuple[MessageProto, ObjectTree]:
        """Make a message's objects: what Flower is told of it, without its content, and which object is where."""
        children = [self._content(message.content)] if message.has_content() else []
        metadata = metadata_to_proto(message.metadata)
        metadata.message_id = ""
        error = error_to_proto(message.error) if message.has_error() else None
        said = MessageProto(metadata=metadata, error=error)
        root = self._put("Message", children, said.SerializeToString(deterministic=True))
        said.metadata.message_id = root
        if error is None:
            said.content.CopyFrom(RecordDictProto())
        return said, self._trees[root]

    def _put(self, kind: str, parts: Sequence[str], body: bytes | memoryview) -> str:
        """Make an object of its parts and body; its name. The large ones are copied once."""
        parts = list(dict.fromkeys(parts))
        content = b"".join((f"{kind} {','.join(parts)} {len(body)}\0".encode("ascii"), body))
        name = name_of(content)
        self.objects[name] = content
        self._trees[name] = ObjectTree(object_id=name, children=[self._trees[part] for part in parts])
        return name

    def _content(self, content: RecordDict) -> str:
        parts: dict[str, str] = {}
        for key, record in content.items():
            if isinstance(record, ArrayRecord):
                if id(record) not in self._arrays:
                    self._arrays[id(record)] = self._record(record)
                parts[key] = self._arrays[id(record)]
            else:
                assert isinstance(record, ConfigRecord), "a header and vectors are all that travels"
                _, _, body = record.deflate().partition(b"\x00")
                parts[key] = self._put("ConfigRecord", [], body)
        return self._put("RecordDict", [*parts.values()], json.dumps(parts).encode())

    def _record(self, record: ArrayRecord) -> str:
        arrays = {name: self._array(array) for name, array in record.items()}
        return self._put("ArrayRecord", [*arrays.values()], json.dumps(arrays).encode())

    def _array(self, array: Array) -> str:
        data = memoryview(array.data)
        chunks = [self._put("ArrayChunk", [], data[at : at + CHUNK]) for at in range(0, len(data), CHUNK)]
        first = {name: at for at, name in enumerate(dict.fromkeys(chunks))}
        said = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype}
        return self._put("Array", chunks, json.dumps({**said, "arraychunk_ids": [first[c] for c in chunks]}).encode())
