"""Facts one by one into columns: how a reader of many small records fills ``clinical.Facts``."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np

from cloister_client.connectors.clinical import NEVER, Facts, Places, Times, seconds

_CHUNK = 100_000


class Words:
    """Texts that come again and again, each kept once."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}

    def place(self, text: str | None) -> int:
        """Its place in ``list(self.places)``; -1 of nothing."""
        if not text:
            return -1
        return self.places.setdefault(text, len(self.places))


class Times64:
    """Times as text, made numbers so many at a time."""

    def __init__(self) -> None:
        self._texts: list[str | None] = []
        self._parts: list[Times] = []

    def add(self, text: str | None) -> None:
        """One more."""
        self._texts.append(text)
        if len(self._texts) == _CHUNK:
            self._flush()

    def _flush(self) -> None:
        self._parts.append(seconds(self._texts))
        self._texts = []

    def whole(self) -> Times:
        """All of them."""
        self._flush()
        return np.concatenate(self._parts)


class Gathered:
    """Facts so far."""

    def __init__(self) -> None:
        self.codes, self.units, self.answers = Words(), Words(), Words()
        self._event, self._value = array("q"), array("d")
        self._patient, self._encounter = array("i"), array("i")
        self._code, self._unit, self._answer = array("i"), array("i"), array("i")
        self._time = Times64()

    def add(
        self,
        event: int,
        patient: int,
        encounter: int,
        time: str | None,
        code: int,
        value: float,
        unit: int,
        answer: int,
    ) -> None:
        """One more fact under one of its codes."""
        self._event.append(event)
        self._patient.append(patient)
        self._encounter.append(encounter)
        self._time.add(time)
        self._code.append(code)
        self._value.append(value)
        self._unit.append(unit)
        self._answer.append(answer)

    def facts(self, patients: Places, encounters: Places, starts: Times) -> Facts:
        """In columns; a fact without a time is of its encounter's start.

        ``patients`` and ``encounters`` have the place, or -1, of each number that was given as patient and encounter.
        """
        said = np.frombuffer(self._encounter, np.int32)
        place = np.append(encounters, -1)[said]
        time = self._time.whole()
        start = np.append(starts, NEVER)[place]
        time = np.where((time == NEVER) & (place >= 0), start, time)
        found = Facts(
            np.frombuffer(self._event, np.int64),
            np.append(patients, -1).astype(np.int32)[np.frombuffer(self._patient, np.int32)],
            time,
            np.frombuffer(self._code, np.int32),
            np.frombuffer(self._value, np.float64),
            np.frombuffer(self._unit, np.int32),
            np.frombuffer(self._answer, np.int32),
            list(self.codes.places),
            list(self.units.places),
            list(self.answers.places),
        )
        return _once(found)


def _once(facts: Facts) -> Facts:
    """Each event under each code once: the last that was read, as a later version of the same record."""
    order: Any = np.lexsort((facts.code, facts.event))
    event, code = facts.event[order], facts.code[order]
    last = np.append((event[1:] != event[:-1]) | (code[1:] != code[:-1]), True) if len(order) else order.astype(bool)
    return facts[np.sort(order[last])]
