"""Who may do what at the admin port: accounts by their tokens, what each role is for, and what is written down of it.

Whatever changes something is written to the audit log, and so is whatever was refused; a token never is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil
from threading import Event
from typing import Any

import grpc

from cloister_server.door import Buckets
from cloister_server.folder import Consortium, record
from cloister_server.records import Role, State
from cloister_shared.errors import AccessRefused, CloisterError, RateRefused, Refusal, TokenRefused

MAY: Mapping[Role, frozenset[str]] = {
    Role.OPERATOR: frozenset(
        ["invite", "expel", "hospitals", "run", "stop", "resume", "list", "watch", "account", "accounts"]
    ),
    Role.RESEARCHER: frozenset(["submit", "list", "watch"]),
    Role.PRIVACY_OFFICER: frozenset(["stop", "audit", "hospitals", "list", "watch"]),
    Role.AUDITOR: frozenset(["audit", "hospitals", "list", "watch"]),
}
"""What each role may do. None may both submit a study and run it."""

READS = frozenset(["hospitals", "list", "watch", "accounts", "audit"])
"""What changes nothing, so that the audit log holds it only where it was refused."""

FROM: Mapping[str, tuple[State, ...]] = {
    "run": ("submitted",),
    "stop": ("submitted", "running", "waiting"),
    "resume": ("stopped",),
}
"""The states that a study may be steered from."""


@dataclass(frozen=True)
class Caller:
    """Who calls, and with what."""

    name: str
    role: Role
    token: str = field(repr=False)


class Access:
    """Lets callers in, and holds what they ask against their roles."""

    def __init__(self, consortium: Consortium) -> None:
        self._folder, self._registry = consortium.folder, consortium.registry
        self._wrong = Buckets(burst=10, rate=1 / 30)
        self._calls = Buckets(burst=60, rate=2)

    def admit(self, method: str, context: grpc.ServicerContext) -> Caller:
        """Who calls, by the token. A right one passes however many wrong ones came from the same address: on loopback
        everybody has the same, and a token of 256 random bits is not found by trying.

        Raises:
            TokenRefused: there is none, or no account has it.
            RateRefused: too many wrong ones came from the same address, or too many calls of the account.
        """
        shown = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
        scheme, _, token = str(shown[0]).partition(" ") if len(shown) == 1 else ("", "", "")
        account = self._registry.account(token) if scheme == "Bearer" and token else None
        if account is None:
            peer = context.peer().rpartition(":")[0]
            if wait := self._wrong.take(peer):
                raise RateRefused("Too many wrong tokens came from this address.", mend=f"Wait {ceil(wait)} s.")
            record(self._folder, "", "", method.lower(), peer, "refused: no account has the token")
            raise TokenRefused("No account has the token that was shown." if shown else "No token was shown.")
        if wait := self._calls.take(account.name):
            raise RateRefused(f"{account.name} calls too often.", mend=f"Wait {ceil(wait)} s.")
        return Caller(account.name, account.role, token)

    def checked(self, method: str, answer: Callable[..., Any]) -> Callable[..., Any]:
        """The method, for the roles that may use it, and written to the audit log."""

        def answered(request: Any, caller: Caller, *ended: Event) -> Any:
            action, about = _action(method, request), _about(method, request)

            def write(outcome: str) -> None:
                record(self._folder, caller.name, caller.role, action, about, outcome)

            try:
                if action not in MAY[caller.role]:
                    others = ", ".join(role for role in Role if action in MAY[role])
                    raise AccessRefused(
                        f"{caller.name} is {caller.role}, who may not {action}.", mend=f"Ask an account of: {others}."
                    )
                reply = answer(request, caller, *ended)
            except CloisterError as error:
                if action not in READS or isinstance(error, AccessRefused):
                    write(f"{'refused' if isinstance(error, Refusal) else 'failed'}: {error}")
                raise
            except Exception:
                write("failed")
                raise
            if action not in READS:
                write("done")
            return reply

        return answered

    def still(self, caller: Caller) -> None:
        """For whoever watches for hours.

        Raises:
            TokenRefused: the account was removed since, or its token renewed.
        """
        account = self._registry.account(caller.token)
        if account is None or (account.name, account.role) != (caller.name, caller.role):
            raise TokenRefused(f"The token of {caller.name} no longer counts.")


def _action(method: str, request: Any) -> str:
    """What ``MAY`` calls it."""
    match method:
        case "Steer":
            return request.verb if request.verb in FROM else "run"
        case "Account":
            return "accounts" if request.verb == "list" else "account"
        case _:
            return method.lower()


def _about(method: str, request: Any) -> str:
    """What the audit log calls that which was asked for."""
    match method:
        case "Invite":
            words = [request.hospital]
        case "Expel":
            words = [request.hospital, request.reason]
        case "Submit":
            words = [os.path.basename(request.file)]
        case "Steer":
            words = [request.study, request.reason]
        case "Watch":
            words = [request.study]
        case "Account":
            words = [request.verb, request.name, request.role]
        case _:
            words = []
    return ": ".join(word for word in words if word)
