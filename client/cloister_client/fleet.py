"""Flower's fleet API as this hospital speaks it: under its own certificate, through its proxy, held open while idle.

The one place at a hospital that calls the rounds' service, and with ``objects`` the only ones with private names of
Flower 1.41.0: its protobufs, and the paths and header that they travel with. What goes wrong on the way arrives as one
of three: the link is lost and worth trying again, the hospital is no longer enrolled, or a message's run is over.
"""

from __future__ import annotations

import http.client
import itertools
import json
import re
import threading
import time
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import flwr
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    DeactivateNodeResponse,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import (
    Message,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest, GetRunResponse
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from google.protobuf.message import DecodeError

from cloister_client.https import Answer, Https
from cloister_client.membership import consortium_of, site_of
from cloister_client.outage import lost, refused, unable
from cloister_client.proxy import proxy_to
from cloister_shared.carried import Download, Octets, attach, attached, download, upload
from cloister_shared.certificates import client_context, public_key, read_key
from cloister_shared.errors import CloisterError, EnrolmentRefused, KeyBroken, LinkLost, TicketRefused, VersionRefused
from cloister_shared.parcel import Parcel, name_of, names
from cloister_shared.versions import spoken

FLOWER = "1.41.0"
"""The release of Flower whose private names are used here and in ``objects``."""

HEARTBEAT = float(HEARTBEAT_DEFAULT_INTERVAL)
"""Seconds between signs of life; after two that are missing Flower counts a hospital as offline."""
HELD = 20.0
"""Seconds for which the coordinator holds a question for messages open, until there is one."""

_ANSWER = 30.0
"""Seconds in which a request is answered."""
_SIDE_BY_SIDE = 4
_MISSING = 20
"""Tries to get an object that the coordinator knows of and does not have yet."""

_ANSWERS: dict[type[Any], tuple[str, Callable[[bytes], Any]]] = {
    ActivateNodeRequest: ("activate-node", ActivateNodeResponse.FromString),
    DeactivateNodeRequest: ("deactivate-node", DeactivateNodeResponse.FromString),
    SendNodeHeartbeatRequest: ("send-node-heartbeat", SendNodeHeartbeatResponse.FromString),
    PullMessagesRequest: ("pull-messages", PullMessagesResponse.FromString),
    PushMessagesRequest: ("push-messages", PushMessagesResponse.FromString),
    GetRunRequest: ("get-run", GetRunResponse.FromString),
    PullObjectRequest: ("pull-object", download),
    PushObjectRequest: ("push-object", PushObjectResponse.FromString),
}
"""Of each request, where it is sent and how it is answered."""
_OVER = (ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED, ApiErrorCode.FLEET_GET_RUN_FAILED)

A = TypeVar("A")
B = TypeVar("B")


class RunOver(Exception):
    """The coordinator ended the run that a message belongs to; nobody waits for a reply."""


@dataclass(frozen=True)
class Instruction:
    """A message to this hospital, whose content is still at the coordinator."""

    message: bytes
    """Flower's protobuf, without the content."""
    root: str
    run: int
    kind: str
    objects: tuple[str, ...]
    along: Mapping[str, bytes]
    """Those of its objects that came with it."""


class Fleet:
    """The connection of the agent whose keys lie in ``agent``; any thread may call.

    Raises, from every call:
        LinkLost: the coordinator cannot be reached, or cannot answer now.
        EnrolmentRefused: this hospital's certificate has expired or was revoked.
        KeyBroken: a file of the enrolment is missing or damaged.
        VersionRefused: the coordinator's release does not work with this one.
    """

    def __init__(self, agent: Path) -> None:
        if flwr.__version__ != FLOWER:
            raise VersionRefused(
                f"Flower {flwr.__version__} is installed; this release of Cloister uses private parts of {FLOWER}.",
                mend=f"Run pip install flwr=={FLOWER}, or upgrade Cloister.",
            )
        self._agent, self._rounds = agent, consortium_of(agent).rounds
        host, _, port = self._rounds.rpartition(":")
        self._at = host.strip("[]"), int(port)
        self._proxy = proxy_to(self._at[0], site_of(agent).proxy)
        self._public = public_key(read_key(agent / "agent.key"))
        self._https: tuple[float, Https] | None = None
        self._lock = threading.Lock()
        self.node = 0

    @property
    def address(self) -> str:
        """Where the coordinator is, and which way leads there."""
        return f"{self._rounds}{f' (through the proxy {self._proxy})' if self._proxy else ''}"

    # --- this hospital among the nodes ----------------------------------------------------------------------
    def activate(self) -> None:
        """Be there: also where an earlier agent of ours died a moment ago, and is counted as online."""
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT)
        self.node = self._call(request).node_id

    def heartbeat(self) -> bool:
        """A sign of life, which also brings back a hospital that was counted as offline; False if Flower knows none."""
        return self._call(SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT)).success

    def deactivate(self) -> None:
        """Be there no longer."""
        self._call(DeactivateNodeRequest(node_id=self.node))

    # --- messages -------------------------------------------------------------------------------------------
    def pull(self, holding: Collection[str]) -> Instruction | None:
        """The next message, waited for at the coordinator's end, or None. ``holding``: those that are in work here.

        One that was delivered and is neither held nor answered is delivered again, so nothing is kept of it here.
        """
        waiting = {"x-cloister-wait": f"{HELD:g}", "x-cloister-holding": ",".join(holding)}
        answer = self._call(PullMessagesRequest(node=self._node), waiting, HELD + _ANSWER)
        if not answer.messages_list:
            return None
        message, tree = answer.messages_list[0], answer.message_object_trees[0]
        said = message.metadata
        if said.message_id != tree.object_id or said.dst_node_id != self.node:
            raise LinkLost("The coordinator sent a message that is not this hospital's.", mend="Tell the consortium.")
        parts = tuple(names(tree))
        along = {name: content for content in attached(answer) if (name := name_of(content)) in parts}
        return Instruction(message.SerializeToString(), tree.object_id, said.run_id, said.message_type, parts, along)

    def digest_of(self, run: int) -> str:
        """The digest of the plan that a run is of, as the coordinator says.

        Raises:
            RunOver: it is finished.
        """
        digest = self._call(GetRunRequest(node=self._node, run_id=run)).run.fab_hash
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise unable(self.address, "names no plan for a run")
        return digest

    def object(self, run: int, name: str) -> memoryview:
        """One object of a message.

        Raises:
            RunOver: it is gone, with its message.
            TicketRefused: it is not what its name says.
        """
        request = PullObjectRequest(node=self._node, run_id=run, object_id=name)
        for tries in range(_MISSING):
            answer: Download = self._call(request)
            if not answer.found:
                raise RunOver
            if answer.content is not None:
                if name_of(answer.content) != name:
                    raise TicketRefused("A part of the message is not what its name says.", mend="Tell the consortium.")
                return answer.content
            time.sleep(min(0.05 * 2**tries, 1.0))
        raise LinkLost("The coordinator has not got the whole message yet.", mend="It is tried again.")

    def push(self, run: int, parcel: Parcel) -> None:
        """Send a reply: of its objects those that the coordinator asks for. It may be sent again.

        Raises:
            RunOver: nobody waits for it.
        """
        announced = PushMessagesRequest(
            node=self._node,
            messages_list=[Message.FromString(parcel.message)],
            message_object_trees=[ObjectTree.FromString(parcel.tree)],
            clientapp_runtime_list=[0.0],
        )
        attach(announced, parcel.objects.values())
        answer = self._call(announced)

        def stored(name: str) -> bool:
            request = PushObjectRequest(node=self._node, run_id=run, object_id=name, session_id=answer.session_id)
            return self._call(request, content=parcel.objects[name]).stored

        asked = [name for name in answer.objects_to_push if name in parcel.objects]
        if not all(list(side_by_side(stored, asked))):
            raise LinkLost("The coordinator did not take the whole reply.", mend="It is sent again.")

    def close(self) -> None:
        """End the connection."""
        with self._lock:
            if self._https:
                self._https[1].close()

    # --- the connection -------------------------------------------------------------------------------------
    @property
    def _node(self) -> Node:
        return Node(node_id=self.node)

    def _call(
        self,
        request: Any,
        more: Mapping[str, str] | None = None,
        patience: float = _ANSWER,
        content: Octets | None = None,
    ) -> Any:
        """Ask, and tell apart what can go wrong. ``content`` goes along with the request that uploads it."""
        verb, read = _ANSWERS[type(request)]
        headers = {
            "content-type": PROTOBUF_MEDIA_TYPE,
            # Flower's way to say who asks; that it is true TLS has shown, whose key is the same.
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(self._public).decode(),
            "x-cloister-protocol": spoken(),
            **(more or {}),
        }
        made, https = self._current()
        try:
            body = (request.SerializeToString(),) if content is None else upload(request, content)
            answer = https.post(f"/v1/fleet/{verb}", body, headers, patience)
        except (OSError, http.client.HTTPException) as error:
            raise self._still(lost(error, self.address, self._agent), made) from None
        if answer.status != http.client.OK:
            if _over(answer) or (verb == "get-run" and answer.status == http.client.NOT_FOUND):
                raise RunOver
            raise self._still(refused(answer, self.address), made)
        try:
            return read(answer.body)
        except DecodeError:
            raise unable(self.address, "answered in another language") from None

    def _still(self, error: CloisterError, made: float) -> CloisterError:
        """What it means, on a connection under a certificate of this age: less, if there is a newer one by now."""
        if isinstance(error, EnrolmentRefused) and made != self._certificate_made():
            return unable(self.address, "ended a connection under the certificate from before the last renewal")
        return error

    def _certificate_made(self) -> float:
        try:
            return (self._agent / "agent.crt").stat().st_mtime
        except OSError:
            raise KeyBroken(
                f"{self._agent / 'agent.crt'} is not there.", mend="Restore it from a backup, or enrol again."
            ) from None

    def _current(self) -> tuple[float, Https]:
        """Connections under the certificate that lies there now: one that was renewed is used from then on."""
        made = self._certificate_made()
        with self._lock:
            if self._https is None or self._https[0] != made:
                if self._https:
                    self._https[1].close()  # whatever is in use ends by itself
                files = (self._agent / name for name in ("agent.crt", "agent.key", "ca.crt"))
                self._https = made, Https(*self._at, client_context(*files), self._proxy)
            return self._https


def _over(answer: Answer) -> bool:
    """Whether Flower says that a run is."""
    with suppress(ValueError, TypeError, KeyError):
        return json.loads(answer.body)["code"] in _OVER
    return False


def side_by_side(work: Callable[[A], B], things: Iterable[A]) -> Iterator[B]:
    """What ``work`` makes of each, in order; four at most are in work or wait to be taken."""
    waiting, things = deque[Future[B]](), iter(things)
    while True:
        waiting += [_begun(work, thing) for thing in itertools.islice(things, _SIDE_BY_SIDE - len(waiting))]
        if not waiting:
            return
        yield waiting.popleft().result()


def _begun(work: Callable[[A], B], thing: A) -> Future[B]:
    """In a thread that, unlike an executor's, holds up nobody's exit."""
    result: Future[B] = Future()

    def run() -> None:
        try:
            result.set_result(work(thing))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result
