"""Flower's Grid in this process: real ClientApps, no sockets, and faults on demand.

A message waits until it is pulled and is then answered by the hospital's own ClientApp, one at a time, in the
order sent. So a run is deterministic, and as many hospitals as you like need the memory of one reply. Contents
are immutable bytes (``wire``), hence no copy is made on the way.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from cloister_shared.errors import PlanRefused
from cloister_shared.wire import pack, pack_vectors, unpack_reply

LOST = 1003
"""Flower's error code, here, for a reply that was lost on the way."""

FAULTS = ("drop", "delay", "corrupt", "nan")


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one hospital's reply in one round.

    ``drop``: no reply. ``delay``: it comes ``seconds`` late. ``corrupt``: its vector is cut short. ``nan``:
    one value is not a number, or under the secure sum another one.
    """

    kind: str
    site: str
    round: int
    seconds: float = 5.0


def read_fault(text: str) -> Fault:
    """``nan:hospital-2:3`` is a NaN from hospital-2 in round 3; ``delay:hospital-2:3:10`` is 10 s late.

    Raises:
        PlanRefused: it has another form.
    """
    parts = text.split(":")
    try:
        if parts[0] in FAULTS and len(parts) in (3, 4):
            return Fault(parts[0], parts[1], int(parts[2]), *(float(part) for part in parts[3:]))
    except ValueError:
        pass
    raise PlanRefused(
        f"The fault {text!r} cannot be read.",
        mend=f"Write KIND:HOSPITAL:ROUND with a kind of {', '.join(FAULTS)}; delay may add :SECONDS.",
    )


class InProcessGrid(Grid):
    """The verbs of Flower's Grid over the hospitals of this process."""

    def __init__(self, app: ClientApp, sites: Iterable[str], faults: Iterable[Fault] = ()) -> None:
        # Flower's Message constructor asks who is talking; here it is always the one simulated task.
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        self._app = app
        self._contexts = {node: _context(node, site) for node, site in enumerate(sites, start=1)}
        self._faults = {(fault.site, fault.round): fault for fault in faults}
        self._waiting: dict[str, Message] = {}
        self._late: dict[str, tuple[float, Message]] = {}
        self._sent = 0

    def set_run(self, run: Run) -> None:
        """Part of Flower's interface; one process holds one run."""

    @property
    def run(self) -> Run:
        """An empty run: nothing of it is used here."""
        return Run.create_empty(1)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Part of Flower's interface."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """One node a hospital."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Put messages in the post; nobody works yet."""
        pushed: list[str] = []
        for message in messages:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = name = f"message-{self._sent}"
            self._waiting[name] = message
            pushed.append(name)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Let the next of these hospitals work, and give its reply; or a late one whose time has come."""
        for name in message_ids:
            if name in self._late and self._late[name][0] <= time.monotonic():
                return [self._late.pop(name)[1]]
            if name in self._waiting:
                reply = self._answer(self._waiting.pop(name), name)
                return [reply] if reply else self.pull_messages(message_ids)
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Part of Flower's interface."""
        replies: list[Message] = []
        names = self.push_messages(messages)
        while pulled := self.pull_messages(names):
            replies += pulled
        return replies

    def _answer(self, message: Message, name: str) -> Message | None:
        context = self._contexts[message.metadata.dst_node_id]
        reply = self._app(message, context)
        if message.metadata.message_type != "train":
            return reply
        fault = self._faults.get((str(context.node_config["site"]), int(message.metadata.group_id)))
        match fault:
            case None:
                return reply
            case Fault(kind="drop"):
                # As the deadline would have it, without the wait: a plan may allow a round ten minutes.
                return Message(Error(code=LOST, reason="no answer within the round's time"), reply_to=message)
            case Fault(kind="delay", seconds=seconds):
                self._late[name] = (time.monotonic() + seconds, reply)
                return None
            case Fault(kind=kind):
                return _spoilt(reply, message, kind)


def _context(node: int, site: str) -> Context:
    return Context(run_id=1, node_id=node, node_config={"site": site}, state=RecordDict(), run_config={})


def _spoilt(reply: Message, message: Message, kind: str) -> Message:
    if reply.has_error():
        return reply
    read = unpack_reply(reply.content)
    masked = "update" in read.octets
    vector = np.array(read.octets["update"] if masked else read.vectors["update"])
    if kind == "corrupt":
        vector = vector[:-1]
    else:
        vector[vector.size // 2] = 255 - vector[vector.size // 2] if masked else np.nan
    spoilt = {"update": vector}
    return Message(pack(read.header, pack_vectors(read.vectors, read.octets, spoilt)), reply_to=message)
