"""The studies as they stand, read from the records once for everybody who watches them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from threading import Lock
from typing import TYPE_CHECKING, Any

from cloister_shared.control_pb2 import RoundReply, StudyNews, StudyReply
from cloister_shared.errors import PlanRefused, StudyRefused
from cloister_shared.plan_file import read_plan

if TYPE_CHECKING:
    from cloister_server.records import Glance, Study
    from cloister_server.registry import Registry

TICK = 0.2
"""Seconds after which whoever watches looks again."""

AT_ONCE = 200
"""Rounds in one message."""


@dataclass(frozen=True)
class Standing:
    """One study, what was decided upon it, and who took part in its last whole round."""

    study: Study
    rounds: int
    """Of its plan."""
    glance: Glance
    took_part: tuple[str, ...]

    def news(self, site: str) -> StudyNews:
        """As one of its hospitals is told."""
        study, glance = self.study, self.glance
        return StudyNews(
            digest=study.digest,
            offer=study.offer,
            state=glance.state,
            reason=glance.reason,
            round=glance.round,
            rounds=self.rounds,
            took_part=self.took_part,
            decision=glance.decisions.get(site, ""),
        )

    def reply(self) -> StudyReply:
        """As the consortium's people are told."""
        study, glance = self.study, self.glance
        return StudyReply(
            digest=study.digest,
            name=study.name,
            state=glance.state,
            reason=glance.reason,
            round=glance.round,
            rounds=self.rounds,
            decisions={site: glance.decisions.get(site, "") for site in study.roster},
        )


class Board:
    """At most one reading of the records every ``age`` seconds, however many watch. Any thread may ask.

    What did not change is the same object at every asking.
    """

    def __init__(self, registry: Registry, age: float = TICK, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry, self._age, self._clock = registry, age, clock
        self._lock, self._until = Lock(), 0.0
        self._held: dict[str, Standing] = {}

    def standings(self) -> list[Standing]:
        """Every study, as it was submitted.

        Raises:
            RegistryBroken: the records cannot be read.
        """
        with self._lock:
            if self._clock() >= self._until:
                self._held = {digest: self._standing(digest, seen) for digest, seen in self._registry.glances().items()}
                self._until = self._clock() + self._age
            return list(self._held.values())

    def standing(self, digest: str) -> Standing:
        """One study.

        Raises:
            StudyRefused: there is none of this digest.
            RegistryBroken: the records cannot be read.
        """
        found = next((standing for standing in self.standings() if standing.study.digest == digest), None)
        if found is None:
            raise StudyRefused(f"There is no study {digest[:12]}.", mend="List the studies for their names.")
        return found

    def look_again(self) -> None:
        """Something was changed here: who asks next is told of it."""
        with self._lock:
            self._until = 0.0

    def _standing(self, digest: str, glance: Glance) -> Standing:
        before = self._held.get(digest)
        if before is None:
            study = self._registry.study(digest)
            return Standing(study, _planned(study), glance, self._took_part(digest, glance.round))
        if before.glance == glance:
            return before
        same = before.glance.round == glance.round
        took_part = before.took_part if same else self._took_part(digest, glance.round)
        return replace(before, glance=glance, took_part=took_part)

    def _took_part(self, digest: str, number: int) -> tuple[str, ...]:
        last = self._registry.rounds(digest, number - 1) if number else ()
        return tuple(last[0]["answered"]) if last else ()


def _planned(study: Study) -> int:
    try:
        return read_plan(study.plan, study.file).rounds
    except PlanRefused:  # written by a release that knew other terms
        return 0


def round_reply(said: Mapping[str, Any]) -> RoundReply:
    """One round, from what the round worker wrote down of it: see ``store.RoundRecord``."""
    return RoundReply(
        round=said["round"],
        took_part=said["answered"],
        missed=said["rejected"],
        numbers={name: value for name, value in said["numbers"].items() if value is not None},
        seconds=said["seconds"],
    )
