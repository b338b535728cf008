"""Flower's two messages that carry an object, without ever holding the object whole.

``PushObjectRequest`` is read in pieces: its fourth field is the content, what comes before and after that is parsed as
the same message without it. ``PullObjectResponse`` is written as its other fields and then the content.
"""

from __future__ import annotations

from flwr.proto.message_pb2 import PullObjectResponse, PushObjectRequest
from google.protobuf.message import DecodeError

_CONTENT = (4 << 3) | 2
"""Tag of the content: field 4, with a length."""

_FOUND = PullObjectResponse(object_found=True, object_available=True).SerializeToString() + bytes([(3 << 3) | 2])
"""The answer up to the length of the content, which is its field 3."""

_MOST = 4096
"""Octets of all other fields."""


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


def found(content: memoryview) -> tuple[bytes, memoryview]:
    """The answer that gives this content."""
    left, size = len(content), b""
    while left > 0x7F:
        size += bytes([left & 0x7F | 0x80])
        left >>= 7
    return _FOUND + size + bytes([left]), content


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
