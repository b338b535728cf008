"""What a hospital may ask of the rounds: nine of Flower's routes, in Flower's own words.

Flower's handlers ask of a node only that it is registered. Here a message, an object and a run are looked for where
those of this hospital lie, and a message is given until it is answered.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from flwr.common.serde import message_from_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.superlink.servicer.fleet import fleet_handlers
from google.protobuf.message import Message

from cloister_server.link import letters
from cloister_server.link.calls import Body, Call, Refused, Route
from cloister_server.link.letters import is_name
from cloister_server.link.polls import Polls
from cloister_server.link.post import Post
from cloister_server.link.state import Link
from cloister_shared.carried import Upload, attached, found

HOLDING, WAIT = b"x-cloister-holding", b"x-cloister-wait"
"""Headers: the messages that the agent works on; how many seconds it would wait for another."""

HELD = 25.0
"""Seconds for which a pull is held at most."""

BATCH, SMALL = 2**20, 2**16
"""Octets of an object that a thread writes at once; so few are written where they are."""

PATIENCE = 60.0
"""Seconds between two signs of life that a hospital may promise at most."""

T = TypeVar("T")


class Routes:
    """The answers."""

    def __init__(self, link: Link, post: Post, polls: Polls) -> None:
        self._state, self._letters, self._post, self._polls = link.state, link.letters, post, polls
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="link")

    def table(self) -> Mapping[str, Route]:
        """All that there is."""
        return {
            "/v1/fleet/activate-node": Route(fleet_pb2.ActivateNodeRequest, self.activate),
            "/v1/fleet/deactivate-node": Route(fleet_pb2.DeactivateNodeRequest, self.deactivate),
            "/v1/fleet/send-node-heartbeat": Route(heartbeat_pb2.SendNodeHeartbeatRequest, self.heartbeat),
            "/v1/fleet/pull-messages": Route(fleet_pb2.PullMessagesRequest, self.pull),
            "/v1/fleet/push-messages": Route(fleet_pb2.PushMessagesRequest, self.push),
            "/v1/fleet/get-run": Route(run_pb2.GetRunRequest, self.run),
            "/v1/fleet/push-object": Route(None, self.push_object),
            "/v1/fleet/pull-object": Route(message_pb2.PullObjectRequest, self.pull_object),
            "/v1/fleet/confirm-message-received": Route(message_pb2.ConfirmMessageReceivedRequest, self.confirm),
        }

    async def node(self, public_key: bytes) -> int | None:
        """The node with this key."""
        return await self._work(self._state.get_node_id_by_public_key, public_key)

    # --- there or not ----------------------------------------------------------------------------------------
    async def activate(self, call: Call, request: fleet_pb2.ActivateNodeRequest) -> Message:
        """The hospital is there. One that started anew within Flower's minute of patience is let in at once."""
        if request.public_key != call.bearer.public_key:
            raise Refused(403, "The key in the request is not that of the certificate.")
        request.heartbeat_interval = min(PATIENCE, request.heartbeat_interval)
        await self._work(self._state.deactivate_node, call.node)
        return await self._work(fleet_handlers.activate_node, request, self._state)

    async def deactivate(self, call: Call, request: fleet_pb2.DeactivateNodeRequest) -> Message:
        """The hospital leaves."""
        await self._work(self._state.deactivate_node, call.node)
        return fleet_pb2.DeactivateNodeResponse()

    async def heartbeat(self, call: Call, request: heartbeat_pb2.SendNodeHeartbeatRequest) -> Message:
        """The hospital is still there."""
        request.heartbeat_interval = min(PATIENCE, request.heartbeat_interval)
        return await self._work(fleet_handlers.send_node_heartbeat, request, self._state)

    # --- what is asked ---------------------------------------------------------------------------------------
    async def pull(self, call: Call, request: fleet_pb2.PullMessagesRequest) -> Body | None:
        """The next message, as soon as there is one; none after the time that the hospital would wait."""
        holding, loop = _holding(call.headers), asyncio.get_running_loop()
        until = loop.time() + _wait(call.headers)
        gone = asyncio.ensure_future(call.receive())  # the request is read: this ends when the connection does
        try:
            with self._polls.waiting(call.node, holding) as bell:
                if bell is None:
                    raise Refused(429, "This hospital waits for messages too often already.")
                while not gone.done():
                    bell.clear()
                    if (asked := self._post.next(call.node, holding, time.time())) and (
                        pulled := self._letters.pulled(asked[0], call.node, asked[1])
                    ):
                        call.admit()
                        return [pulled]
                    left = until - loop.time()
                    if left <= 0 or self._polls.closed:
                        return []
                    rung = asyncio.ensure_future(bell.wait())
                    await asyncio.wait({rung, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                    rung.cancel()
                return None
        finally:
            gone.cancel()

    async def pull_object(self, call: Call, request: message_pb2.PullObjectRequest) -> Body | Message:
        """One object of a message to this hospital."""
        if not is_name(request.object_id):
            raise Refused(400, "An object is named by its SHA-256.")
        content = self._letters.find(request.run_id, call.node, request.object_id)
        return message_pb2.PullObjectResponse() if content is None else found(content)

    async def run(self, call: Call, request: run_pb2.GetRunRequest) -> Message:
        """Of which plan a run is that asks this hospital."""
        if not self._post.asks(call.node, request.run_id):
            raise Refused(404, "No such run asks this hospital.")
        return await self._work(fleet_handlers.get_run, request, self._state)

    async def confirm(self, call: Call, request: message_pb2.ConfirmMessageReceivedRequest) -> Message:
        """Nothing is done: the message stays until it is answered, for a hospital that crashes is given it again."""
        return message_pb2.ConfirmMessageReceivedResponse()

    # --- what is answered ------------------------------------------------------------------------------------
    async def push(self, call: Call, request: fleet_pb2.PushMessagesRequest) -> Message:
        """A reply is announced, and which objects it consists of; it counts when they have all come."""
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            raise Refused(400, "One reply is pushed at a time.")
        (message,), (tree,) = request.messages_list, request.message_object_trees
        said = message.metadata
        if said.src_node_id != call.node:
            raise Refused(403, "A hospital answers in its own name.")
        names = {part.object_id for part in iterate_object_tree(tree)}
        if said.message_id != tree.object_id or not all(map(is_name, names)):
            raise Refused(400, "An object is named by its SHA-256, a reply by that of its first object.")
        asked = said.reply_to_message_id
        if not is_name(asked) or not self._post.asks(call.node, said.run_id, asked):
            return fleet_pb2.PushMessagesResponse()  # nobody asks that any more, or ever asked this hospital
        if self._post.answered([asked]).get(asked, said.message_id) != said.message_id:
            return fleet_pb2.PushMessagesResponse()  # it was answered; the first answer counts
        if len(names) > 32 + 4 * self._letters.parts(said.run_id, call.node, asked):  # masked, a vector doubles
            raise Refused(413, "The reply has more objects than one to this message may have.")
        if not message.HasField("error"):
            message.ClearField("content")
            message.content.SetInParent()  # Flower's way to say: see the objects
        place = self._letters.reply(said.run_id, call.node, asked, said.message_id)
        missing = await self._work(letters.announce, place, message.SerializeToString(), names, attached(request))
        if not missing:
            await self._work(self._deliver, place)
        return fleet_pb2.PushMessagesResponse(
            results={said.message_id: 0}, objects_to_push=missing, session_id=f"{asked}.{said.message_id}"
        )

    async def push_object(self, call: Call, _: None) -> Message:
        """One object of a reply that this hospital announced."""
        upload, incoming, batch, size = Upload(), None, list[bytes](), 0
        try:
            async for piece in call.pieces:
                if not (part := upload.feed(piece)):
                    continue
                if not incoming:
                    call.owns(begun := upload.request)
                    incoming = self._letters.receive(begun.run_id, call.node)
                batch.append(part)
                size += len(part)
                if size >= BATCH:
                    await self._work(incoming.write, batch)
                    batch, size = [], 0
            if not incoming or not upload.whole:
                raise ValueError("it ends early")
            if size > SMALL:
                await self._work(incoming.write, batch)
            else:
                incoming.write(batch)
            call.admit()
            request = upload.request
            message, reply = (*request.session_id.split("."), "")[:2]
            place = self._letters.reply(request.run_id, call.node, message, reply)
            if letters.take(place, request.object_id, incoming):
                await self._work(self._deliver, place)
            return message_pb2.PushObjectResponse(stored=True)
        except FileNotFoundError:  # it was not announced, or is not wanted any more
            async for _piece in call.pieces:
                pass
            return message_pb2.PushObjectResponse(stored=False)
        except ValueError as odd:
            raise Refused(400, f"The object is refused: {odd}.") from None
        finally:
            if incoming:
                incoming.close()

    def _deliver(self, place: Path) -> None:
        """All of a reply is there: now it is one, unless nobody asks any more or there is another."""
        said = letters.said(place)
        if said and not self._state.store_message_res(message_from_proto(message_pb2.Message.FromString(said))):
            shutil.rmtree(place, ignore_errors=True)

    def _work(self, task: Callable[..., T], *said: Any) -> Awaitable[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, task, *said)


def _holding(headers: Mapping[bytes, bytes]) -> list[str]:
    return [name for name in headers.get(HOLDING, b"").decode("ascii", "replace").split(",") if name][:64]


def _wait(headers: Mapping[bytes, bytes]) -> float:
    try:
        return max(0.0, min(HELD, float(headers.get(WAIT, b"20"))))
    except ValueError:
        return 0.0
