"""The commands' way to the admin port: TLS by the consortium's own authority, and the token of an account."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cloister_shared.console import plain_errors
from cloister_shared.errors import (
    AccessRefused,
    CloisterError,
    KeyBroken,
    LinkLost,
    PlanRefused,
    RateRefused,
    StudyRefused,
    TokenRefused,
)

if TYPE_CHECKING:
    from cloister_shared.control_pb2_grpc import AdminStub

Folder = Annotated[
    Path,
    typer.Option(
        "--consortium",
        envvar="CLOISTER_CONSORTIUM",
        help="Folder that `init` made; $CLOISTER_CONSORTIUM if not given, else ./consortium.",
        show_envvar=False,
        show_default=False,
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(help="File with your token; $CLOISTER_TOKEN if not given, else officer.token in the folder."),
]
HERE = Path("consortium")

PATIENCE = 60.0
"""Seconds in which the service answers a call."""


@contextmanager
def desk(folder: Path, token_file: Path | None) -> Generator[AdminStub, None, None]:
    """The admin service, to be called within the block; whatever goes wrong there ends the command in a sentence."""
    with plain_errors():
        import grpc

        from cloister_server.folder import read_settings
        from cloister_shared.control_pb2_grpc import AdminStub

        address, token = dialled(read_settings(folder).admin), _token(folder, token_file)
        try:
            authority = (folder / "ca.crt").read_bytes()
        except FileNotFoundError:
            raise KeyBroken(f"{folder / 'ca.crt'} is not there.", mend="Copy it from the coordinator.") from None
        credentials = grpc.composite_channel_credentials(
            grpc.ssl_channel_credentials(authority), grpc.access_token_call_credentials(token)
        )
        try:
            with grpc.secure_channel(address, credentials, [("grpc.enable_http_proxy", 0)]) as channel:
                yield AdminStub(channel)
        except grpc.RpcError as error:
            raise _meant(error, address, folder) from None


def call(method: Callable[..., Any], request: Any) -> Any:
    """One call and its reply."""
    return method(request, timeout=PATIENCE)


def dialled(address: str) -> str:
    """Where a port is dialled that is opened at ``address``: one that is opened everywhere, on this machine."""
    host, _, port = address.rpartition(":")
    return f"localhost:{port}" if host in ("0.0.0.0", "[::]") else address


def _token(folder: Path, given: Path | None) -> str:
    path, token = given or folder / "officer.token", "" if given else os.environ.get("CLOISTER_TOKEN", "")
    held = "$CLOISTER_TOKEN" if token else path
    try:
        if not token and path.stat().st_mode & 0o077:
            raise KeyBroken(f"Others on this machine can read {path}.", mend=f"Run chmod 600 {path}.")
        token = token or path.read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        raise TokenRefused(f"{path} is not there.") from None
    if not re.fullmatch(r"[A-Za-z0-9_\-]+", token):
        raise TokenRefused(f"{held} holds no token.", mend="Have an operator renew it.")
    return token


def _meant(error: Any, address: str, folder: Path) -> CloisterError:
    """The coordinator's own sentence, which has its mend in it; else what is known of the connection."""
    import grpc

    code, said = error.code(), error.details() or ""
    refusals: dict[Any, type[CloisterError]] = {
        grpc.StatusCode.UNAUTHENTICATED: TokenRefused,
        grpc.StatusCode.PERMISSION_DENIED: AccessRefused,
        grpc.StatusCode.FAILED_PRECONDITION: StudyRefused,
        grpc.StatusCode.INVALID_ARGUMENT: PlanRefused,
        grpc.StatusCode.RESOURCE_EXHAUSTED: RateRefused,
    }
    if code in refusals:
        return refusals[code](said, mend="")
    if code is grpc.StatusCode.UNAVAILABLE and "CERTIFICATE_VERIFY_FAILED" in said:
        return LinkLost(
            f"What answers at {address} is not the coordinator of {folder}.",
            mend="Check admin in coordinator.yaml, and that ca.crt beside it is the coordinator's.",
        )
    if code is grpc.StatusCode.UNAVAILABLE:
        return LinkLost(
            f"The coordinator does not answer at {address}.",
            mend=f"If it is not running, start it: cloister-coordinator start {folder}",
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return LinkLost(f"The coordinator at {address} did not answer within {PATIENCE:g} s.", mend="Try again.")
    return LinkLost(said or "The connection to the coordinator was cut.", mend="")
