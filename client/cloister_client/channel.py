"""What the agent and a training process say to each other: frames over the one socket pair that they share.

A frame is a kind, a few words in JSON, and octets. Both ends read and write it as a file, because the training process
may not use a socket, not even this one.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_HEAD = struct.Struct(">IQ")
_MOST = 2**34
"""Octets of a frame: far more than any array has."""


@dataclass(frozen=True)
class Frame:
    """One thing said."""

    kind: str
    said: dict[str, Any]
    octets: memoryview


def send(end: int, kind: str, octets: bytes | memoryview = b"", **said: Any) -> None:
    """Say it on this file descriptor.

    Raises:
        OSError: the other end is gone.
    """
    words = json.dumps([kind, said]).encode()
    for part in (_HEAD.pack(len(words), len(octets)) + words, octets):
        left = memoryview(part)
        while left:
            left = left[os.write(end, left) :]


def receive(end: int, head: Callable[[int], bytes] = lambda _: b"") -> Frame:
    """The next thing said. Before its octets stands what ``head`` makes of their number.

    Raises:
        EOFError: the other end is gone.
    """
    words, octets = _HEAD.unpack(_read(end, _HEAD.size))
    if max(words, octets) > _MOST:
        raise EOFError("no frame")
    kind, said = json.loads(bytes(_read(end, words)))
    return Frame(kind, said, _read(end, octets, head(octets)))


def _read(end: int, count: int, head: bytes = b"") -> memoryview:
    import numpy as np  # not before the training process has said how many threads it may have

    at, count = len(head), len(head) + count
    view = np.empty(count, np.uint8).data  # which, unlike a bytearray, is not filled with zeros first
    view[:at] = head
    while at < count:
        got = os.readv(end, [view[at:]])
        if not got:
            raise EOFError("the other end is gone")
        at += got
    return view.toreadonly()
