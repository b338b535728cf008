"""One request of a hospital, as the gate hands it to the routes, and how a route says no."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from google.protobuf.message import Message

from cloister_shared.certificates import Bearer

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Body = Sequence[bytes | memoryview]


class Refused(Exception):
    """What is said to the caller instead of an answer: a status of HTTP and a sentence."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(said)
        self.status = status


@dataclass(frozen=True)
class Call:
    """One request that passed the door."""

    node: int
    bearer: Bearer
    headers: Mapping[bytes, bytes]
    pieces: AsyncIterator[bytes]
    """Its body, where the route reads it itself."""
    receive: Receive
    admit: Callable[[], None]
    """Holds the caller against its certificate once more, for what took a while."""

    def owns(self, request: Message | None) -> None:
        """Hold whatever node the request names against the caller's.

        Raises:
            Refused: it is another's.
        """
        said = getattr(request, "node", request)
        if getattr(said, "node_id", self.node) != self.node:
            raise Refused(403, "A hospital speaks for its own node alone.")


class Answer(Protocol):
    """A route: a message of Flower's, or its octets; None when the caller is gone."""

    async def __call__(self, call: Call, request: Any, /) -> Message | Body | None:
        """Answer one request."""
        ...


@dataclass(frozen=True)
class Route:
    """What is asked, if it is read before it is answered, and who answers."""

    request: type[Message] | None
    answer: Answer
