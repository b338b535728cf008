"""What HL7's messages and documents say, each thing by the newest of them that says it: a correction replaces.

A rank is a message's own time in digits: of two that speak of the same result the later counts, in whatever order
their files are read.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from cloister_client.connectors.clinical import OUTPATIENT
from cloister_client.connectors.gathering import Chart

Answer = tuple[float, str | None, str | None]
"""Number, unit, and words, of which there may be none."""
NOTHING: Answer = (math.nan, None, None)
_TIME = re.compile(r"(\d{4})(\d\d)?(\d\d)?(?:(\d\d)(\d\d)?(\d\d)?(?:\.\d+)?)?([+-]\d\d)?(\d\d)?")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?")


class Newest:
    """What was told so far of one hospital."""

    def __init__(self, wanted: Callable[[str], bool]) -> None:
        """``wanted`` says of a code whether facts under it are kept."""
        self.chart = Chart()
        self.left_out = Counter[str]()
        """What could not be used, in words, and how often."""
        self.authorities = dict[str, set[str]]()
        """Who gave out the patients' numbers that were read, by the kind of message."""
        self.unwanted = set[tuple[str, str]]()
        """Codes of results that nobody asks for, as messages spell them and with their separators."""
        self._wanted = wanted
        self._known: dict[str, bool] = {}
        self._said: dict[tuple[str, int, int], tuple[str, Any]] = {}
        self._events: dict[tuple[Any, ...], tuple[int, str]] = {}
        self._gone: set[int] = set()

    def person(
        self, rank: str, name: str | None, sex: str | None, birth: str | None, death: str | None, dead: bool
    ) -> int:
        """The number of a patient of whom this is said; -1 of nobody."""
        if not name:
            return -1
        at = self.chart.people.place(name)
        of, born, died, gone = self._merged("person", at, rank, (sex, birth, death, dead or bool(death) or None))
        self.chart.patients[at] = (of, born, died, bool(gone))
        return at

    def stay(
        self, rank: str, person: int, name: str | None, kind: int | None, start: str | None, end: str | None
    ) -> int:
        """The number of an encounter of which this is said; -1 of none."""
        if not name or person < 0:
            return -1
        at = self.chart.stays.place(name)
        whose, begin, over, of = self._merged("stay", at, rank, (person, start, end, kind))
        self.chart.encounters[at] = (whose, begin, over, OUTPATIENT if of is None else of)
        return at

    def _merged(self, what: str, at: int, rank: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """The newest of each element that anybody said."""
        for place, value in enumerate(values):
            if value is not None and rank >= self._said.get((what, at, place), ("", None))[0]:
                self._said[what, at, place] = (rank, value)
        return tuple(self._said.get((what, at, place), ("", None))[1] for place in range(len(values)))

    def fact(
        self,
        rank: str,
        key: tuple[Any, ...],
        person: int,
        stay: int,
        time: tuple[str | None, bool],
        codes: Sequence[str],
        answer: Answer = NOTHING,
        *,
        so: bool = True,
    ) -> None:
        """One fact, known again by its key; ``so`` is False of what takes it back, or says that it was not."""
        if not (codes := [code for code in codes if self.wants(code)]):
            return
        if not so:
            self.left_out["results that say that nothing was"] += 1
        number, newest = self._events.setdefault((person, *key), (len(self._events), ""))
        if rank < newest:
            return
        self._events[person, *key] = (number, rank)
        (self._gone.discard if so else self._gone.add)(number)
        when, written = time
        value, unit, words = answer
        facts = self.chart.facts
        for code in codes if so else ():
            # A time that nobody can read is no reason to take the encounter's.
            place = -1 if written and when is None else stay
            facts.add((
                number, person, place, when, facts.codes.place(code), value, facts.units.place(unit),
                facts.answers.place(words),
            ))  # fmt: skip

    def wants(self, code: str) -> bool:
        """Whether facts under this code are kept."""
        known = self._known.get(code)
        if known is None:
            known = self._known[code] = self._wanted(code)
        return known

    @property
    def gone(self) -> frozenset[int]:
        """Events whose newest word is that they were not."""
        return frozenset(self._gone)


def rank(time: str | None) -> str:
    """Of a message's own time; of none the lowest."""
    digits = re.match(r"\d*", time or "")
    return digits[0].ljust(14, "0")[:14] if digits and digits[0] else ""


def moment(text: str | None, zone: str = "") -> str | None:
    """A time of HL7 (YYYYMMDDHHMMSS+ZZZZ, cut off anywhere) as ISO 8601 has it; None where it is none.

    ``zone`` is that of times that name none, as +01:00; of a day or more there is no zone.
    """
    found = _TIME.fullmatch(text or "")
    if not found or (found[8] and not found[7]):
        return None
    year, month, day, hour, minute, second, hours, minutes = found.groups()
    date = "-".join(filter(None, (year, month, day)))
    if hour is None:
        return date
    own = f"{hours}:{minutes or '00'}" if hours else zone
    return f"{date}T{hour}:{minute or '00'}:{second or '00'}{own}"


def day(text: str | None) -> str | None:
    """The day of such a time, or its month or year."""
    said = moment(text)
    return said[:10] if said else None


def number(text: str | None) -> float:
    """What is written as a plain number; NaN of all else."""
    return float(text) if text and _NUMBER.fullmatch(text) else math.nan
