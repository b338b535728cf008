"""A port of the coordinator, over gRPC: who may call, how much at once, and how an error crosses it.

Who calls is settled before anything of a request is read, so a stranger's octets are never parsed and a caller who
opens calls without finishing them holds no more than a few threads.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Lock
from typing import Any, Protocol

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from cloister_shared import control_pb2
from cloister_shared.errors import (
    AccessRefused,
    CloisterError,
    EnrolmentRefused,
    EnvelopeRefused,
    LinkLost,
    PlanRefused,
    RateRefused,
    Refusal,
    TokenRefused,
)

log = logging.getLogger("cloister")

THREADS = 320
"""At most. A stream holds one, and a plan may have 200 hospitals."""

AT_ONCE = 8
"""Calls of one caller at the same time, streams included."""

LONGEST_ERROR = 2000
"""Characters; gRPC carries an error in a header of 8 KB, and writes a letter with an accent as six octets."""

_CODES: tuple[tuple[type[CloisterError], grpc.StatusCode], ...] = (
    (TokenRefused, grpc.StatusCode.UNAUTHENTICATED),
    (RateRefused, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (AccessRefused, grpc.StatusCode.PERMISSION_DENIED),
    (EnrolmentRefused, grpc.StatusCode.PERMISSION_DENIED),
    (EnvelopeRefused, grpc.StatusCode.PERMISSION_DENIED),
    (PlanRefused, grpc.StatusCode.INVALID_ARGUMENT),
    (LinkLost, grpc.StatusCode.ABORTED),
    (Refusal, grpc.StatusCode.FAILED_PRECONDITION),
)
"""The first that fits. Anything else is a fault of ours, and the caller learns no more than that."""


class Caller(Protocol):
    """Somebody who was let in; calls are counted by ``name``."""

    @property
    def name(self) -> str: ...  # noqa: D102


# --- serving -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Door:
    """A port that is being served, from threads of its own, until ``stop``."""

    server: grpc.Server
    port: int

    def stop(self, grace: float = 1.0) -> None:
        """Take no more calls; those under way have ``grace`` seconds, streams end at once after it."""
        self.server.stop(grace).wait()


def open_door(
    address: str, credentials: grpc.ServerCredentials, services: list[grpc.GenericRpcHandler], most: int
) -> Door:
    """Serve at ``address`` (host:port; port 0 takes any) messages of at most ``most`` octets.

    Raises:
        LinkLost: the address cannot be listened on.
    """
    server = grpc.server(
        ThreadPoolExecutor(THREADS, thread_name_prefix="door"),
        handlers=services,
        options=[
            ("grpc.max_receive_message_length", most),
            ("grpc.so_reuseport", 0),  # a second coordinator on the port is a mistake, not a helper
            ("grpc.max_concurrent_streams", 32),
            # A hospital that is gone without a word is noticed within a minute; its own pings are welcome.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 15_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ],
    )
    try:
        port = server.add_secure_port(address, credentials)
    except RuntimeError:
        raise LinkLost(
            f"{address} cannot be listened on.",
            mend="Stop what listens there already, or change the address in coordinator.yaml.",
        ) from None
    server.start()
    return Door(server, port)


def service(
    name: str, admit: Callable[[str, grpc.ServicerContext], Caller], methods: Mapping[str, Callable[..., Any]]
) -> grpc.GenericRpcHandler:
    """A service of ``control.proto``, its methods given by name.

    ``admit(method, context)`` says who calls, or refuses. A method takes the request and the caller and returns the
    reply; one whose replies stream takes an event besides, which is set once nobody listens, and yields them.
    """
    described = control_pb2.DESCRIPTOR.services_by_name[name]
    slots = _Slots()
    handlers = {each.name: _handler(each, methods[each.name], admit, slots) for each in described.methods}
    return grpc.method_handlers_generic_handler(described.full_name, handlers)


def _handler(
    method: MethodDescriptor,
    answer: Callable[..., Any],
    admit: Callable[[str, grpc.ServicerContext], Caller],
    slots: _Slots,
) -> grpc.RpcMethodHandler:
    """On the wire a request of one message; here a stream of requests, because gRPC calls us before it is read."""
    kind = GetMessageClass(method.input_type)

    def one(requests: Iterator[bytes], context: grpc.ServicerContext) -> Message:
        with _plainly(method.name, context):
            caller = admit(method.name, context)
            with slots.held(caller.name):
                return answer(_read(kind, requests), caller)
        raise AssertionError

    def many(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Message]:
        ended = Event()
        if not context.add_callback(ended.set):
            return
        with _plainly(method.name, context):
            caller = admit(method.name, context)
            with slots.held(caller.name):
                yield from answer(_read(kind, requests), caller, ended)

    if method.server_streaming:
        return grpc.stream_stream_rpc_method_handler(many, None, _written)
    return grpc.stream_unary_rpc_method_handler(one, None, _written)


def _read(kind: type[Message], requests: Iterator[bytes]) -> Message:
    try:
        return kind.FromString(next(requests))
    except (DecodeError, StopIteration):
        raise PlanRefused("The request is no message of this service.", mend="Upgrade the caller.") from None


def _written(reply: Message) -> bytes:
    return reply.SerializeToString()


@contextmanager
def _plainly(method: str, context: grpc.ServicerContext) -> Generator[None, None, None]:
    """Let a refusal cross as a status and its sentence, and nothing cross of what is not one."""
    try:
        yield
        return
    except CloisterError as error:
        found = next((code for kind, code in _CODES if isinstance(error, kind)), None)
        if found is None:
            log.error("%s: %s", method, error)
        code, said = found or grpc.StatusCode.INTERNAL, str(error)
    except Exception:
        here = context.is_active()  # else the caller hung up while we read from it
        if here:
            log.exception("%s failed", method)
        code, said = grpc.StatusCode.INTERNAL if here else grpc.StatusCode.CANCELLED, ""
    if code is grpc.StatusCode.INTERNAL:
        said = "Something broke at the coordinator; its log says more."
    context.abort(code, said if len(said) <= LONGEST_ERROR else said[:LONGEST_ERROR] + " ...")


# --- limits ------------------------------------------------------------------------------------------------
class _Slots:
    """Places for calls under way: a few for each caller."""

    def __init__(self) -> None:
        self._lock, self._held = Lock(), Counter[str]()

    @contextmanager
    def held(self, name: str) -> Generator[None, None, None]:
        with self._lock:
            if self._held[name] >= AT_ONCE:
                raise RateRefused(f"{name} has {AT_ONCE} calls open.", mend="Let one of them end first.")
            self._held[name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._held[name] -= 1
                if not self._held[name]:
                    del self._held[name]


class Buckets:
    """Token buckets in memory, one a key: ``burst`` calls at once, then ``rate`` a second."""

    def __init__(self, burst: int, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst, self._rate, self._clock = burst, rate, clock
        self._lock, self._empty_until = Lock(), dict[str, float]()

    def take(self, key: str) -> float:
        """0 if the call may pass, else the seconds after which one may.

        A bucket is kept as the moment at which it will be full again: one that is full is not kept at all.
        """
        with self._lock:
            now = self._clock()
            if len(self._empty_until) > 10_000:
                self._empty_until = {key: at for key, at in self._empty_until.items() if at > now}
            full = max(self._empty_until.get(key, now), now) + 1 / self._rate
            wait = full - now - self._burst / self._rate
            if wait > 1e-9:
                return wait
            self._empty_until[key] = full
            return 0.0
