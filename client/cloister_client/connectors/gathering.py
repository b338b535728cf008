"""Facts one by one into columns: how a reader of many small records fills ``clinical.Records``."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister_client.connectors.clinical import (
    NEVER,
    Encounters,
    Facts,
    Patients,
    Places,
    Records,
    Times,
    births,
    meanings,
    seconds,
    sound,
)

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


@dataclass
class Chart:
    """Patients, encounters and facts so far, each patient and encounter by the number of its id in the words."""

    people: Words = field(default_factory=Words)
    patients: dict[int, tuple[str | None, str | None, str | None, bool]] = field(default_factory=dict)
    """Sex, birth, death, and whether dead."""
    stays: Words = field(default_factory=Words)
    encounters: dict[int, tuple[int, str | None, str | None, int]] = field(default_factory=dict)
    """The patient's number, start, end, and kind."""
    facts: Gathered = field(default_factory=Gathered)

    def records(self, wanted: frozenset[str] | None, left_out: dict[str, int], gone: Collection[int] = ()) -> Records:
        """In columns; there must be a patient. Events that are ``gone`` are as if they had never been told."""
        ids, stay_ids = list(self.people.places), list(self.stays.places)
        sexes, born, died, dead = zip(*self.patients.values(), strict=True)
        patients = Patients(
            np.array([ids[at] for at in self.patients], dtype=object),
            np.array(sexes, dtype=object),
            births(list(born)),
            seconds(list(died)),
            np.array(dead, bool),
        )
        places = _places(self.patients, len(ids))
        owner, start, end, kind = zip(*self.encounters.values(), strict=True) if self.encounters else ((), (), (), ())
        encounters = Encounters(
            np.array([stay_ids[at] for at in self.encounters], dtype=object),
            np.append(places, -1).astype(np.int32)[np.array(owner, np.int64)],
            seconds(list(start)),
            seconds(list(end)),
            np.array(kind, np.int32),
        )
        facts = self.facts.facts(places, _places(self.encounters, len(stay_ids)), encounters.start)
        if gone:
            facts = facts[np.flatnonzero(~np.isin(facts.event, list(gone)))]
        meant = meanings(facts.codes if wanted is None else wanted, facts.codes)
        return sound(patients, encounters, facts, meant, left_out)


def _places(known: Iterable[int], size: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Where each number stands among those that are known, or -1."""
    places = np.full(size, -1, np.int32)
    numbers = np.fromiter(known, np.int64)
    places[numbers] = np.arange(len(numbers))
    return places
