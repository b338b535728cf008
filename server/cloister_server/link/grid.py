"""Flower's Grid for a round worker: straight on the LinkState, one reply in memory at a time.

What comes back is attributed by what the coordinator itself knows: which message was sent to which node, and where the
reply lay. A reply's own words about that are not read.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, Error, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from cloister_server.cores import each
from cloister_server.link.inflate import Reader, Room
from cloister_server.link.letters import Letter
from cloister_server.link.served import served_for
from cloister_shared.carried import attach
from cloister_shared.errors import LinkLost
from cloister_shared.parcel import Packing, names

if TYPE_CHECKING:
    from cloister_server.link.state import Link

log = logging.getLogger("cloister")

SLACK = 64 * 2**20
"""Octets that a reply may have in any case; besides these, eight for each octet that was asked with."""

GRACE = 10.0
"""Seconds past its own promise after which a hospital that gave no sign of life counts as gone."""

RETURN = 30.0
"""Seconds that hospitals have to come back after the coordinator itself was away."""

RECHECK = 1.0
"""Seconds after which replies are looked for even if nothing was written."""


class LinkGrid(Grid):
    """The verbs of Flower's Grid for one run. ``lost`` is set when the run is not ours any more."""

    def __init__(self, link: Link, run: Run, nodes: Collection[int] | None, lost: threading.Event) -> None:
        self._link, self._run, self._nodes, self._lost = link, run, nodes, lost
        self._post = link.reader()
        self._seen = (-1, 0.0)
        self._sent: dict[str, tuple[Metadata, int]] = {}
        """Of each message that waits for its reply: its metadata, and octets that the reply may have."""
        self._room = Room()

    def close(self) -> None:
        """The run is over."""
        self._post.close()

    def set_run(self, run: Run) -> None:
        """Part of Flower's interface; this grid is made for one run."""

    @property
    def run(self) -> Run:
        """The run as it was begun."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Part of Flower's interface."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """The nodes of the run that are there now."""
        online = self._link.online()
        return sorted(online if self._nodes is None else online & set(self._nodes))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Put messages in the post, all at once; what several of them hold is stored once.

        What was sent before and not collected is withdrawn: a round is over when the next thing is asked.

        Raises:
            LinkLost: the run was ended by somebody else.
        """
        messages = list(messages)
        self._check()
        for name in list(self._sent):
            self._drop(name)
        packing, letters = Packing(each), list[Letter]()
        for message in messages:
            said, tree = packing.message(message)
            name, node = tree.object_id, message.metadata.dst_node_id
            message.metadata.__dict__["_message_id"] = name
            told, parts = PullMessagesResponse(messages_list=[said], message_object_trees=[tree]), names(tree)
            attach(told, map(packing.objects.__getitem__, parts))
            letters.append(Letter(node, name, told.SerializeToString(), parts))
            self._sent[name] = message.metadata, SLACK + 8 * _octets(message)
        self._link.letters.post(self._run.run_id, letters, packing.objects)
        del packing  # a model's octets once more
        with self._link.state.session():
            stored = [self._link.state.store_message_ins(remove_content_from_message(message)) for message in messages]
        if messages and not any(stored) and not self._link.runs(self._run.run_id):
            self._lost.set()
            self._check()
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The replies that are there, each put together when it is asked for; then it is gone from the disk.

        A hospital that is not heard of any more gives an error, as does a reply that cannot be put together.

        Raises:
            LinkLost: the run was ended by somebody else.
        """
        self._check()
        version, now = self._post.version(), time.monotonic()
        if self._seen[0] == version and now < self._seen[1] + RECHECK:
            return
        waiting = [message for message in message_ids if message in self._sent]
        answered = self._post.answered(waiting)
        for message, reply in answered.items():
            yield self._take(message, reply)
        if served_for(self._link.folder) > RETURN:
            rest = [message for message in waiting if message not in answered]
            for message in self._post.silent(rest, time.time() - GRACE):
                yield self._give_up(message, "the hospital is not heard of any more")
        self._seen = version, now

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Part of Flower's interface; it holds all replies."""
        waiting, replies = set(self.push_messages(messages)), list[Message]()
        until = time.monotonic() + (timeout if timeout is not None else float("inf"))
        while waiting and time.monotonic() < until:
            for reply in self.pull_messages(waiting):
                replies.append(reply)
                waiting.discard(reply.metadata.reply_to_message_id)
            time.sleep(0.01)
        return replies

    def _take(self, message: str, reply: str) -> Message:
        asked, most = self._sent[message]
        try:
            place = self._link.letters.reply(asked.run_id, asked.dst_node_id, message, reply)
            taken = Reader(place, most, self._room).message(reply, _metadata(asked, reply))
        except Exception as odd:  # whatever a hospital makes of its bytes, it concerns that hospital alone
            log.warning("A reply cannot be put together: %r", odd)
            return self._give_up(message, f"its reply cannot be put together ({type(odd).__name__})")
        self._drop(message)
        return taken

    def _give_up(self, message: str, reason: str) -> Message:
        asked, _ = self._sent[message]
        self._drop(message)
        return make_message(_metadata(asked, ""), error=Error(ErrorCode.NODE_UNAVAILABLE, reason))

    def _drop(self, message: str) -> None:
        asked, _ = self._sent.pop(message)
        self._link.state.delete_messages({message})
        self._link.letters.drop(asked.run_id, asked.dst_node_id, message)
        if not self._sent:
            self._room = Room()  # a round's step needs the memory

    def _check(self) -> None:
        if self._lost.is_set():
            raise LinkLost("This run was ended: another worker began it anew.", mend="Run the study again.")


def _metadata(asked: Metadata, reply: str) -> Metadata:
    return Metadata(
        run_id=asked.run_id,
        message_id=reply,
        src_node_id=asked.dst_node_id,
        dst_node_id=asked.src_node_id,
        reply_to_message_id=asked.message_id,
        group_id=asked.group_id,
        created_at=time.time(),
        ttl=asked.ttl,
        message_type=asked.message_type,
    )


def _octets(message: Message) -> int:
    records = [record for record in message.content.values() if isinstance(record, ArrayRecord)]
    return sum(len(array.data) for record in records for array in record.values())
