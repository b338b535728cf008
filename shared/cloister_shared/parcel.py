"""A Flower message as the objects that travel: each a piece of bytes whose name is its SHA-256.

The root is the message, its children the records, arrays and chunks of 5 MiB. Flower 1.41 cuts and names them like
this; here each is made once, and what several messages hold is in one place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.serde_utils import error_to_proto, metadata_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto

from cloister_shared.carried import Octets

CHUNK = 5 * 2**20
"""Octets of an array in one object, as Flower cuts it."""


@dataclass(frozen=True)
class Parcel:
    """A message ready to be sent: what Flower wants to be told of it, and its objects."""

    message: bytes
    """Flower's protobuf, without the content."""
    tree: bytes
    """Flower's protobuf of which object is part of which."""
    objects: dict[str, Octets]

    @property
    def root(self) -> str:
        """The name of the message itself, which all its content follows from."""
        return ObjectTree.FromString(self.tree).object_id

    @property
    def size(self) -> int:
        """Octets of all its objects."""
        return sum(map(len, self.objects.values()))


class Delivered(Array):
    """A flat array that came in ``chunks`` of these names, each of which was held against its content on the way.

    There are none if it was cut otherwise than ``cut`` does. Its data is no copy, as Flower's would be.

    Raises:
        TypeError: there is no such type.
    """

    def __init__(self, dtype: str, stype: str, data: Octets, chunks: Sequence[tuple[str, int]]) -> None:
        """``chunks`` with their octets, in order."""
        super().__init__(dtype, (len(data) // np.dtype(dtype).itemsize,), stype, b"")
        self.data = data  # pyright: ignore[reportAttributeAccessIssue]
        as_we_cut = [size for _, size in chunks] == [len(chunk) for chunk in cut(data)]
        self.chunks = tuple(name for name, _ in chunks) if as_we_cut else ()


class Cut(Array):
    """A flat array as the ``objects`` that its chunks are, in order: of so many octets in all.

    Raises:
        TypeError: there is no such type.
    """

    def __init__(self, dtype: str, stype: str, octets: int, objects: Sequence[Octets]) -> None:
        super().__init__(dtype, (octets // np.dtype(dtype).itemsize,), stype, b"")
        self.objects = objects


def name_of(content: Octets) -> str:
    """The name of an object: its SHA-256, in hex."""
    return hashlib.sha256(content).hexdigest()


def cut(octets: Octets) -> list[memoryview]:
    """The chunks of an array."""
    view = memoryview(octets)
    return [view[at : at + CHUNK] for at in range(0, len(view), CHUNK)]


def chunk_head(size: int) -> bytes:
    """What stands before a chunk of so many octets, and makes an object of it."""
    return f"ArrayChunk  {size}\0".encode("ascii")


def chunk_name(octets: memoryview) -> str:
    """The name of the object that a chunk is, without making it."""
    hashed = hashlib.sha256(chunk_head(len(octets)))
    hashed.update(octets)
    return hashed.hexdigest()


def _chunk(octets: memoryview) -> bytes:
    return b"".join((chunk_head(len(octets)), octets))


def names(tree: ObjectTree) -> list[str]:
    """The objects of a tree, each once."""
    found, waiting = dict[str, None](), [tree]
    while waiting:
        node = waiting.pop()
        if node.object_id not in found:
            found[node.object_id] = None
            waiting += node.children
    return list(found)


Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


@dataclass
class Packing:
    """Objects of messages, as they are made. A message may not change while its objects are in use.

    ``each`` is ``map``, or what copies and hashes several chunks at once.
    """

    each: Each = map
    objects: dict[str, Octets] = field(default_factory=dict[str, Octets])
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

    def _put(self, kind: str, parts: Sequence[str], body: bytes) -> str:
        """Make an object of its parts and body; its name."""
        parts = list(dict.fromkeys(parts))
        content = f"{kind} {','.join(parts)} {len(body)}\0".encode("ascii") + body
        return self._keep(name_of(content), content, parts)

    def _keep(self, name: str, content: Octets, parts: Sequence[str] = ()) -> str:
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
        objects = array.objects if isinstance(array, Cut) else [*self.each(_chunk, cut(array.data))]
        chunks = [self._keep(*named) for named in zip(self.each(name_of, objects), objects, strict=True)]
        first = {name: at for at, name in enumerate(dict.fromkeys(chunks))}
        said = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype}
        return self._put("Array", chunks, json.dumps({**said, "arraychunk_ids": [first[c] for c in chunks]}).encode())
