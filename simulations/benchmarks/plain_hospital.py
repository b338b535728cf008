"""A consortium's folder, its rounds served by a process of their own, and hospitals that are Flower's client alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import httpx
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from cloister_shared import certificates, durable
from cloister_shared.certificates import Kind, read_authority
from cloister_shared.versions import spoken

T = TypeVar("T")

SERVE = """
import logging, sys
from pathlib import Path
logging.basicConfig(level=logging.INFO)
from cloister_server.link import serve_rounds
serve_rounds(Path(sys.argv[1]), "127.0.0.1", int(sys.argv[2]))
"""


def found_consortium(folder: Path) -> Path:
    """An authority, the coordinator's certificate for this machine, and an empty revocation list."""
    folder.mkdir(parents=True, exist_ok=True)
    authority = certificates.new_authority(folder, "Loopback")
    key = certificates.new_key(folder / "coordinator.key")
    own = authority.issue(
        certificates.public_key(key), Kind.COORDINATOR, "Loopback", timedelta(days=1), ["127.0.0.1", "localhost"]
    )
    durable.save_text(folder / "coordinator.crt", own.decode())
    durable.save_text(folder / "revoked.crl", authority.crl({}).decode())
    return folder


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def _listened_at(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def start_serving(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """The rounds of a consortium in a process of their own; it answers when this returns."""
    while _listened_at(port):  # by one that is just being killed
        time.sleep(0.01)
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(folder), str(port)])
    while process.poll() is None:
        if _listened_at(port):
            return process
        time.sleep(0.05)
    raise RuntimeError(f"the rounds are not served: exit {process.returncode}")


@contextmanager
def serving(folder: Path, port: int) -> Generator[subprocess.Popen[bytes], None, None]:
    """The same, ended afterwards."""
    process = start_serving(folder, port)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def in_thread(task: Callable[..., T], *said: object) -> Generator[Future[T], None, None]:
    """The task runs while the block does."""
    with ThreadPoolExecutor(1) as thread:
        yield thread.submit(task, *said)


class _Says:
    """Adds the agent's headers to each request."""

    def __init__(self) -> None:
        self.headers = {"x-cloister-protocol": spoken()}

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers.update(self.headers)
        return call_next(context)


class PlainHospital:
    """A hospital of the consortium in ``folder``: enrolled by hand, registered as ``node``."""

    def __init__(self, folder: Path, name: str, port: int, lifetime: timedelta = timedelta(hours=1)) -> None:
        self.folder, self.name, self.port = folder / name, name, port
        self.folder.mkdir()
        self.key = certificates.new_key(self.folder / "agent.key")
        self.public_key = certificates.public_key(self.key)
        self.certificate = read_authority(folder).issue(self.public_key, Kind.SITE, name, lifetime)
        durable.save_text(self.folder / "agent.crt", self.certificate.decode())
        self.context = certificates.client_context(
            self.folder / "agent.crt", self.folder / "agent.key", folder / "ca.crt"
        )
        self.node = 0
        self.client = FleetHttpClient("https://nowhere")
        self.connect()

    def connect(self, context_of: PlainHospital | None = None) -> None:
        """A new connection; with another hospital's certificate, if one is named."""
        self.close()
        self.says = _Says()
        self.client = FleetHttpClient(
            f"https://127.0.0.1:{self.port}",
            interceptors=[NodeAuthHttpInterceptor(self.key, self.key.public_key()), self.says],
            verify=(context_of or self).context,
        )

    def close(self) -> None:
        """Close the connection."""
        self.client.close()

    def activate(self) -> None:
        """Say that it is there."""
        answer = self.client.ActivateNode(ActivateNodeRequest(public_key=self.public_key, heartbeat_interval=30))
        self.node = answer.node_id

    def wait(self, seconds: float = 20.0, holding: Sequence[str] = ()) -> PullMessagesResponse:
        """The next message, by name only, and what it consists of."""
        self.says.headers |= {"x-cloister-wait": str(seconds), "x-cloister-holding": ",".join(holding)}
        return self.client.PullMessages(PullMessagesRequest(node=Node(node_id=self.node)))

    def fetch(self, pulled: PullMessagesResponse) -> Message:
        """The message itself."""
        (tree,), (said,) = pulled.message_object_trees, pulled.messages_list
        contents: dict[str, bytes] = {}
        for part in iterate_object_tree(tree):
            if part.object_id not in contents:
                found = self.pull_object(part.object_id, said.metadata.run_id)
                assert found is not None
                contents[part.object_id] = found
        message = inflate_object_from_contents(tree.object_id, contents)
        assert isinstance(message, Message)
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message

    def pull_object(self, name: str, run: int) -> bytes | None:
        """One object, if the coordinator gives it."""
        answer = self.client.PullObject(PullObjectRequest(node=Node(node_id=self.node), run_id=run, object_id=name))
        return answer.object_content if answer.object_available else None

    def receive(self, seconds: float = 20.0, holding: Sequence[str] = ()) -> Message | None:
        """Wait for a message and fetch it."""
        pulled = self.wait(seconds, holding)
        return self.fetch(pulled) if pulled.messages_list else None

    def announce(self, reply: Message, tree: ObjectTree | None = None) -> PushMessagesResponse:
        """Say which objects a reply consists of."""
        reply.metadata.__dict__["_message_id"] = reply.object_id
        return self.client.PushMessages(
            PushMessagesRequest(
                node=Node(node_id=self.node),
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[tree or get_object_tree(reply)],
            )
        )

    def push_object(self, name: str, content: bytes, run: int, session: str) -> bool:
        """One object of a reply."""
        request = PushObjectRequest(
            node=Node(node_id=self.node), run_id=run, object_id=name, object_content=content, session_id=session
        )
        return self.client.PushObject(request).stored

    def send(self, reply: Message) -> None:
        """A whole reply."""
        announced = self.announce(reply)
        objects = get_all_nested_objects(reply)
        for name in announced.objects_to_push:
            stored = self.push_object(name, objects[name].deflate(), reply.metadata.run_id, announced.session_id)
            assert stored, name


def envelope(pulled: PullMessagesResponse) -> Message:
    """A pulled message without its content."""
    return message_from_proto(pulled.messages_list[0])


def memory(pid: int, what: str = "VmHWM") -> float:
    """MB of a process, at its peak."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) / 1024
    return 0.0


def disk(folder: Path) -> float:
    """MB of the files in a folder."""
    sizes: dict[int, int] = {}
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.stat(os.path.join(root, name))
            except FileNotFoundError:
                continue
            sizes[found.st_ino] = found.st_size  # one file may have several names
    return sum(sizes.values()) / 1e6
