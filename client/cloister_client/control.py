"""The hospital's calls to the control service: gRPC over mutual TLS, straight or through a CONNECT proxy.

The only place at a hospital that knows gRPC. A refusal of the coordinator's arrives as the error that it was there;
a connection that fails, as ``LinkLost``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc

from cloister_client.proxy import Proxy
from cloister_shared.control_pb2 import (
    DecideRequest,
    EnrolReply,
    EnrolRequest,
    HelloReply,
    HelloRequest,
    RenewRequest,
    StudiesRequest,
    StudyNews,
)
from cloister_shared.control_pb2_grpc import ControlStub, EnrolmentStub
from cloister_shared.errors import (
    CloisterError,
    EnrolmentRefused,
    LinkLost,
    Refusal,
    StudyRefused,
    VersionRefused,
)
from cloister_shared.versions import spoken

PATIENCE = 30.0
"""Seconds in which a call is answered."""

_ALIVE = 60_000
"""Milliseconds of silence after which a standing call asks whether the other end is there: firewalls forget a
connection sooner than its two ends do."""


class Control:
    """A connection to the control service under one certificate. To be closed; any thread may."""

    def __init__(
        self, address: str, authority: bytes, certificate: bytes, key: bytes, proxy: Proxy | None = None
    ) -> None:
        """``address`` is host:port, ``key`` the private key of the certificate; all of them PEM."""
        self.address, self._through = address, f" through the proxy {proxy}" if proxy else ""
        way = ("grpc.http_proxy", proxy.url) if proxy else ("grpc.enable_http_proxy", 0)
        options = [
            way,
            ("grpc.keepalive_time_ms", _ALIVE),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.max_pings_without_data", 0),
        ]
        credentials = grpc.ssl_channel_credentials(authority, key, certificate)
        self._channel = grpc.secure_channel(address, credentials, options)
        self._stub, self._enrolment = ControlStub(self._channel), EnrolmentStub(self._channel)

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, and with it whatever call still stands."""
        self._channel.close()

    def enrol(self, request: bytes, identity: str, proof: str) -> EnrolReply:
        """Trade the invite whose certificate this connection shows for one of the hospital's own.

        Raises:
            EnrolmentRefused: the invite is unknown, used or expired, or the name is taken.
            VersionRefused: the coordinator's release does not work with this one.
            LinkLost: no answer.
        """
        asked = EnrolRequest(version=spoken(), request=request.decode(), identity=identity, proof=proof)
        return self._answer(self._enrolment.Enrol, asked)

    def hello(self) -> HelloReply:
        """Whom the coordinator takes us for, its version and its clock.

        Raises:
            EnrolmentRefused: the certificate is revoked, or is none of a hospital.
            VersionRefused: the coordinator's release does not work with this one.
            LinkLost: no answer.
        """
        return self._answer(self._stub.Hello, HelloRequest(version=spoken()))

    def renew(self, request: bytes) -> bytes:
        """A new certificate, PEM, for the same key.

        Raises:
            EnrolmentRefused: the certificate is revoked, or the request is for another key.
            LinkLost: no answer.
        """
        return self._answer(self._stub.Renew, RenewRequest(request=request.decode())).certificate.encode()

    def decide(self, envelope: str) -> str:
        """Tell what the hospital decided; the study's state after it.

        Raises:
            StudyRefused: there is no such study, or it is over.
            LinkLost: no answer.
        """
        return self._answer(self._stub.Decide, DecideRequest(envelope=envelope), StudyRefused).state

    def studies(self) -> Iterator[StudyNews]:
        """Every study the hospital is invited to, now and whenever one changes, until the connection is closed.

        Raises:
            EnrolmentRefused: the certificate is revoked, or is none of a hospital.
            VersionRefused: the coordinator's release does not work with this one.
            LinkLost: no answer, or the connection was cut.
        """
        try:
            yield from self._stub.Studies(StudiesRequest(version=spoken()))
        except ValueError:  # gRPC's word for a connection that was closed before the call began
            return
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.CANCELLED:  # by our own close()
                raise self._meant(error, VersionRefused) from None

    def _answer(self, call: Any, request: Any, refused: type[Refusal] = VersionRefused) -> Any:
        try:
            return call(request, timeout=PATIENCE)
        except grpc.RpcError as error:
            raise self._meant(error, refused) from None

    def _meant(self, error: Any, refused: type[Refusal]) -> CloisterError:
        """The coordinator's own sentence if it said one, with its mend; else what is known of the connection."""
        code, said = error.code(), error.details() or ""
        where = f"The coordinator at {self.address}{self._through}"
        match code:
            case grpc.StatusCode.PERMISSION_DENIED | grpc.StatusCode.UNAUTHENTICATED:
                return EnrolmentRefused(said)
            case grpc.StatusCode.FAILED_PRECONDITION:
                return refused(said)
            case grpc.StatusCode.ABORTED:
                return LinkLost(said, mend="")
            case grpc.StatusCode.RESOURCE_EXHAUSTED | grpc.StatusCode.INTERNAL | grpc.StatusCode.INVALID_ARGUMENT:
                return LinkLost(f"{where} did not do what was asked: {said}", mend="")
            case grpc.StatusCode.UNIMPLEMENTED:
                return LinkLost(f"{where} is no control service.", mend="Check the address with the consortium.")
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return LinkLost(f"{where} did not answer in {PATIENCE:g} s.")
            case _:
                return LinkLost(f"{where} cannot be reached{_why(said)}.")


def _why(said: str) -> str:
    """gRPC's own words made short: they are of its inside."""
    reasons = {
        "CERTIFICATE_VERIFY_FAILED": "its certificate is not one of the consortium's, or for another host",
        "SSL": "no TLS connection came about",
        "HTTP proxy": "the proxy does not let us through",
        "DNS": "its name is not known here",
        "Domain name": "its name is not known here",
        "refused": "nothing listens there",
        "timed out": "no answer",
    }
    return next((f": {reason}" for words, reason in reasons.items() if words.lower() in said.lower()), "")
