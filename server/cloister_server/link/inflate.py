"""A reply put together from its objects: memory for the reply itself, and nothing that it says is trusted.

Each object names its parts by hash; what is not in the letter is no part of the reply. One that asks for more memory
than it may is refused before it gets any.
"""

from __future__ import annotations

import json
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.proto.message_pb2 import Message as MessageProto

from cloister_server.cores import each
from cloister_server.link.letters import named
from cloister_shared.parcel import Delivered, chunk_head

LONGEST = 2000
"""Characters of an error that a hospital reports."""

_HEAD = 256
"""Octets in which a chunk has said what it is."""

_LARGE = 2**20
"""Octets from which on an array is worth keeping room for."""

_OURS = 2
"""References to an array that nobody uses: the room's own, and the question's."""


class Room:
    """Memory for a large array of one reply after another: it is used again when nobody uses what was in it.

    The kernel clears all memory that a process asks for anew, which for large replies takes as long as reading them.
    """

    def __init__(self) -> None:
        self._held = np.empty(0, np.uint8)

    def take(self, size: int) -> memoryview:
        """So many octets, with anything in them."""
        if size < _LARGE:
            return np.empty(size, np.uint8).data
        if self._held.size != size or sys.getrefcount(self._held) > _OURS:
            self._held = np.empty(size, np.uint8)
        return self._held.data


class Reader:
    """Reads one reply from its folder; ``most`` are the octets that it may take."""

    def __init__(self, letter: Path, most: int, room: Room) -> None:
        self._letter, self._left, self._room = letter, most, room

    def message(self, object_id: str, metadata: Metadata) -> Message:
        """The reply, with what the coordinator knows of it for metadata, whatever it says itself.

        Raises:
            ValueError: it is no message, or too large.
            KeyError, TypeError, IndexError, OSError: its parts do not fit together.
        """
        _, body = self._open(object_id, "Message")
        said = MessageProto.FromString(body)
        if said.HasField("error"):
            return make_message(metadata, error=Error(said.error.code, said.error.reason[:LONGEST]))
        (content,) = self._parts
        _, body = self._open(content, "RecordDict")
        records: dict[str, str] = json.loads(body)
        return make_message(metadata, RecordDict({name: self._record(part) for name, part in records.items()}))

    def _record(self, object_id: str) -> ArrayRecord | ConfigRecord | MetricRecord:
        content, body = self._open(object_id, "ArrayRecord", "ConfigRecord", "MetricRecord")
        if content.startswith(b"ConfigRecord"):
            return ConfigRecord.inflate(content)
        if content.startswith(b"MetricRecord"):
            return MetricRecord.inflate(content)
        record = ArrayRecord()
        for name, part in json.loads(body).items():
            record[name] = self._array(part)
        return record

    def _array(self, object_id: str) -> Array:
        _, body = self._open(object_id, "Array")
        said: dict[str, Any] = json.loads(body)
        chunks = [self._chunk(part) for part in self._parts]
        order = [chunks[index] for index in said["arraychunk_ids"]]
        size = sum(length for _, _, length in order)
        self._take(size)  # one chunk may be named many times
        data = self._room.take(size)
        begins = accumulate((length for _, _, length in order), initial=0)
        each(_read, [(path, at, data[to : to + length]) for (path, at, length), to in zip(order, begins, strict=False)])
        delivered = [(path.name, length) for path, _, length in order]  # names that ``letters`` looked at
        array = Delivered(str(said["dtype"]), str(said["stype"]), data, delivered)
        if [*array.shape] != said["shape"]:
            raise ValueError("its length is not what it says")
        return array

    def _chunk(self, object_id: str) -> tuple[Path, int, int]:
        """File, begin and length of a part of an array."""
        path = self._letter / named(object_id)
        with path.open("rb") as file:
            head, end, _ = file.read(_HEAD).partition(b"\x00")
        size = path.stat().st_size - len(head + end)
        if head + end != chunk_head(size):
            raise ValueError("an array has parts that are no chunks")
        return path, len(head + end), size

    def _open(self, object_id: str, *kinds: str) -> tuple[bytes, bytes]:
        """An object, and its body alone; its parts are in ``_parts`` then."""
        path = self._letter / named(object_id)
        self._take(path.stat().st_size)
        content = path.read_bytes()
        at = content.index(b"\x00")
        kind, parts, _ = content[:at].decode().split(" ")
        if kind not in kinds:
            raise ValueError(f"it has a part in the place of a {kinds[0]}")
        self._parts = parts.split(",") if parts else []
        return content, content[at + 1 :]

    def _take(self, octets: int) -> None:
        self._left -= octets
        if self._left < 0:
            raise ValueError("it is larger than a reply to this message may be")


def _read(part: tuple[Path, int, memoryview]) -> None:
    path, begin, into = part
    with path.open("rb") as file:
        file.seek(begin)
        if file.readinto(into) != len(into):
            raise ValueError("a chunk is shorter than it was")
