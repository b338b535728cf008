"""A hospital for the tests of faults: the deployed one, which stands still where it is told to, and notes what it says.

A file ``agent/hold/STAGE`` makes the training process stand still when it comes there, once: it renames the file to
``STAGE.held`` and goes on when that is gone. The stages: ``advertise``, before it gives a key; ``training``, after its
budget was spent and before its first local step; ``unmask``, before it helps to open a sum; ``evaluate``.
``agent/said.jsonl`` has a line for each masked reply that it made and for each time that it helped to open a sum: the
digest of what it said, never anything of it.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from cloister_simulations import deployed_hospital

Made = TypeVar("Made")

PROGRAM = "cloister_simulations.held_hospital"


def main() -> None:
    """The agent, or what the agent starts: see ``deployed_hospital``."""
    if len(sys.argv) == 2:
        from cloister_client.consortium_commands import run

        return run(Path(sys.argv[1]), program=PROGRAM)
    from cloister_client.child import main as serve

    end, folder, digest = sys.argv[1:]
    _watch(Path(folder) / "agent")
    serve(int(end), Path(folder), digest, deployed_hospital.opened)


def _watch(agent: Path) -> None:
    from cloister_client import site
    from cloister_client.secure import SecureSum
    from cloister_shared.wire import Reply, Ticket, UnmaskHeader, digest_of

    def mask(self: SecureSum, ticket: Ticket, reply: Reply, made: Callable[..., Reply] = SecureSum.mask) -> Reply:
        masked = made(self, ticket, reply)
        _note(agent, ticket.header.run, ticket.header.round, "masked", digest_of(masked.octets))
        return masked

    def unmask(self: SecureSum, request: UnmaskHeader, made: Callable[..., Reply] = SecureSum.unmask) -> Reply:
        keys = made(self, request)
        asked = hashlib.sha256(json.dumps([request.transcript, request.active, request.dropped]).encode()).hexdigest()
        _note(agent, request.run, request.round, "opened", f"{asked} {digest_of(keys.octets)}")
        return keys

    SecureSum.mask, SecureSum.unmask = mask, unmask
    for where, stage, name in (
        (site.Site, "advertise", "advertise"),
        (site, "training", "train"),
        (site.Site, "unmask", "unmask"),
        (site.Site, "evaluate", "evaluate"),
    ):
        setattr(where, name, _standing(agent, stage, getattr(where, name)))


def _standing(agent: Path, stage: str, work: Callable[..., Made]) -> Callable[..., Made]:
    asked, held = agent / "hold" / stage, agent / "hold" / f"{stage}.held"

    @wraps(work)
    def stand(*args: Any, **kwargs: Any) -> Made:
        if asked.exists():
            asked.rename(held)
            while held.exists():
                time.sleep(0.01)
        return work(*args, **kwargs)

    return stand


def _note(agent: Path, run: str, number: int, what: str, digest: str) -> None:
    with (agent / "said.jsonl").open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"run": run, "round": number, "what": what, "digest": digest}) + "\n")


if __name__ == "__main__":
    main()
