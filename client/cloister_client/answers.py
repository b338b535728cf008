"""What the hospital has said and what it keeps, on disk: a crash makes it say the same again, never something new.

``Answers`` holds the last reply to a coordinator; ``LocalState`` what never leaves (local layers, SCAFFOLD's
control variate), one file a round so that a round can be done over; ``drawn_moments`` what ComBat goes by.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from cloister_shared import durable
from cloister_shared.durable import Arrays
from cloister_shared.tally import Numbers
from cloister_shared.wire import Reply, ReplyHeader


class Answers:
    """The last reply of each run, by the ticket that it answered."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def locked(self, run: str) -> AbstractContextManager[None]:
        """Wait until no other request of the run is being worked on."""
        return durable.locked(self._path(run))

    def saving(self, ticket: str, reply: Reply) -> AbstractContextManager[None]:
        """Keep a reply before it is sent: it is on disk when the block ends, which may make of it what is sent."""
        header = {"ticket": ticket, "reply": reply.header.model_dump_json()}
        return durable.saving(self._path(reply.header.run), header, {**reply.vectors, **reply.octets})

    def find(self, run: str, ticket: str) -> Reply | None:
        """The very reply that this ticket had, if it was the last one answered."""
        path = self._path(run)
        if not path.exists() or durable.load_header(path)["ticket"] != ticket:
            return None
        header, arrays = durable.load(path)
        octets = {name: array for name, array in arrays.items() if array.dtype == np.uint8}
        vectors = {name: array for name, array in arrays.items() if name not in octets}
        return Reply(ReplyHeader.model_validate_json(header["reply"]), vectors, octets)

    def _path(self, run: str) -> Path:
        return self._folder / f"{run}.answer.safetensors"


def drawn_moments(folder: Path, plan: str, draw: Callable[[], Numbers]) -> Numbers:
    """The hospital's own statistics of a plan (its digest) that is harmonised, on disk before anybody uses them.

    There is one draw of noise and one charge for it, however many runs ask.
    """
    path = _moments(folder, plan)
    with durable.locked(path):
        if not path.exists():
            durable.save_secret(path, json.dumps(draw()))
    return json.loads(path.read_text(encoding="utf-8"))


def known_moments(folder: Path, plan: str) -> Numbers | None:
    """The same at a hospital that took part; None at another."""
    path = _moments(folder, plan)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _moments(folder: Path, plan: str) -> Path:
    return folder / f"{plan}.moments.json"


class LocalState:
    """Arrays that stay at the hospital, after each round of a plan (its digest) that it took part in.

    By plan, not by run: hospitals that come late begin a new run, and the study goes on.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, plan: str, number: int, arrays: Arrays) -> None:
        """Keep the state after round ``number``; the states before the last one are let go."""
        durable.save(self._folder / f"{plan}.local-{number:06d}.safetensors", {}, arrays)
        for path in self._rounds(plan, number)[:-1]:
            path.unlink()

    def before(self, plan: str, number: int) -> Arrays | None:
        """The state that round ``number`` begins with, or None in the first round."""
        earlier = self._rounds(plan, number)
        return durable.load(earlier[-1])[1] if earlier else None

    def _rounds(self, plan: str, before: int) -> list[Path]:
        found = sorted(self._folder.glob(f"{plan}.local-*.safetensors"))
        return [path for path in found if int(path.name.removesuffix(".safetensors").rpartition("-")[2]) < before]
