"""How objects travel in Flower's messages: a large one in a message of its own, small ones along with what names them.

The two messages that carry an object are written as their other fields and then the content, of which protobuf would
make copies. ``PushObjectRequest`` is read in pieces, without ever being held whole: its fourth field is the content,
what comes before and after that is parsed as the same message without it.

A message has a handful of small objects. They are attached where they are announced, in a field that Flower does not
have and skips; or each would cost a request, and a round without a model consist of little else.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from flwr.proto.message_pb2 import PullObjectResponse, PushObjectRequest
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

_CONTENT = (4 << 3) | 2
"""Tag of the content: field 4, with a length."""

_FOUND = PullObjectResponse(object_found=True, object_available=True).SerializeToString() + bytes([(3 << 3) | 2])
"""The answer up to the length of the content, which is its field 3."""

_ATTACHED = 100
"""The field of small objects."""

_SMALL, _TOGETHER = 2**16, 2**18
"""Octets of an object that is attached, at most, and of all that are."""

Octets = bytes | memoryview

_MOST = 4096
"""Octets of all other fields."""


def attach(to: Message, objects: Iterable[Octets]) -> None:
    """Let the small ones of these go along."""
    left = _TOGETHER
    for content in objects:
        if len(content) <= min(_SMALL, left):
            left -= len(content)
            to.MergeFromString(b"".join((_varint(_ATTACHED << 3 | 2), _varint(len(content)), content)))


def attached(to: Message) -> list[bytes]:
    """What went along."""
    return [field.data for field in UnknownFieldSet(to) if (field.field_number, field.wire_type) == (_ATTACHED, 2)]


class Upload:
    """One request, as it comes."""

    def __init__(self) -> None:
        self._others = b""
        self._left: int | None = None

    def feed(self, piece: bytes) -> bytes:
        """The part of a piece of the request that is content.

        Raises:
            ValueError: it is no such request.
        """
        content = b""
        if self._left is None:
            self._others += piece
            if not (found := _content(self._others)):
                piece = b""
            else:
                begin, at, self._left = found
                piece, self._others = self._others[at:], self._others[:begin]
        if self._left is not None:
            content = piece if len(piece) <= self._left else piece[: self._left]
            self._left -= len(content)
            self._others += piece[len(content) :]
        if len(self._others) > _MOST:
            raise ValueError("it has other fields")
        return content

    @property
    def request(self) -> PushObjectRequest:
        """What came so far besides the content.

        Raises:
            ValueError: it is no such request.
        """
        try:
            return PushObjectRequest.FromString(self._others)
        except DecodeError:
            raise ValueError("it cannot be read") from None

    @property
    def whole(self) -> bool:
        """Whether all of the content came."""
        return self._left == 0


def upload(request: PushObjectRequest, content: Octets) -> tuple[Octets, ...]:
    """A request that has all but its content, and the content, as what is sent."""
    return request.SerializeToString() + bytes([_CONTENT]) + _varint(len(content)), content


def found(content: Octets) -> tuple[Octets, ...]:
    """The answer that gives this content."""
    return _FOUND + _varint(len(content)), content


class Download(NamedTuple):
    """An answer, as it came."""

    found: bool
    content: memoryview | None
    """Nothing, if it is known and not there yet."""


def download(answer: bytes) -> Download:
    """Read it; the content is not copied where the answer is as ``found`` makes one.

    Raises:
        DecodeError: it is no such answer.
    """
    with suppress(IndexError):
        size, at = _number(answer, len(_FOUND))
        if answer.startswith(_FOUND) and len(answer) == at + size:
            return Download(True, memoryview(answer)[at:])
    said = PullObjectResponse.FromString(answer)
    return Download(said.object_found, memoryview(said.object_content) if said.object_available else None)


def _varint(value: int) -> bytes:
    octets = bytearray()
    while value > 0x7F:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*octets, value])


def _content(octets: bytes) -> tuple[int, int, int] | None:
    """Where the content's field begins, where the content itself does, and its length; None if more must come."""
    at = 0
    try:
        while True:
            begin = at
            tag, at = _number(octets, at)
            value, at = _number(octets, at)
            if tag == _CONTENT:
                return begin, at, value
            if tag & 7 == 2:  # a field with a length; any other kind here is a number
                at += value
    except IndexError:
        return None


def _number(octets: bytes, at: int) -> tuple[int, int]:
    """A protobuf varint, and where it ends."""
    value = shift = 0
    while octets[at] & 0x80:
        value |= (octets[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | octets[at] << shift, at + 1
