"""Facts one by one into columns: how a reader of many small records fills ``clinical.Facts``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister_client.connectors.clinical import NEVER, Facts, Places, Times, seconds

Row = tuple[int, int, int, str | None, int, float, int, int]
"""Event, patient, encounter, time, code, value, unit, answer."""
_CHUNK = 20_000


class Words:
    """Texts that come again and again, each kept once."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}

    def place(self, text: str | None) -> int:
        """Its place in ``list(self.places)``; -1 of nothing."""
        if not text:
            return -1
        return self.places.setdefault(text, len(self.places))


class Gathered:
    """Facts so far."""

    def __init__(self) -> None:
        self.codes, self.units, self.answers = Words(), Words(), Words()
        self._rows: list[Row] = []
        self._parts: list[tuple[NDArray[Any], ...]] = []

    def add(self, row: Row) -> None:
        """One more fact under one of its codes."""
        self._rows.append(row)
        if len(self._rows) == _CHUNK:
            self._flush()

    def _flush(self) -> None:
        event, patient, encounter, time, code, value, unit, answer = (
            zip(*self._rows, strict=True) if self._rows else [()] * 8
        )
        self._rows = []
        numbers = (np.array(column, np.int32) for column in (patient, encounter, code, unit, answer))
        self._parts.append((np.array(event, np.int64), seconds(list(time)), np.array(value, float), *numbers))

    def facts(self, patients: Places, encounters: Places, starts: Times) -> Facts:
        """In columns; a fact without a time is of its encounter's start.

        ``patients`` and ``encounters`` have the place, or -1, of each number that was given as patient and encounter.
        """
        self._flush()
        event, time, value, patient, said, code, unit, answer = map(np.concatenate, zip(*self._parts, strict=True))
        place = np.append(encounters, -1)[said]
        start = np.append(starts, NEVER)[place]
        time = np.where((time == NEVER) & (place >= 0), start, time)
        known = np.append(patients, -1).astype(np.int32)[patient]
        words = (list(self.codes.places), list(self.units.places), list(self.answers.places))
        found = Facts(event, known, time, code, value, unit, answer, *words)
        return _once(found)


def _once(facts: Facts) -> Facts:
    """Each event under each code once: the last that was read, as a later version of the same record."""
    order: Any = np.lexsort((facts.code, facts.event))
    event, code = facts.event[order], facts.code[order]
    last = np.append((event[1:] != event[:-1]) | (code[1:] != code[:-1]), True) if len(order) else order.astype(bool)
    return facts[np.sort(order[last])]
