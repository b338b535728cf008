"""Dated records to the plan's rows: one row an encounter, each cell what its code and window choose.

Every step works on whole columns: the facts of a feature are sorted by patient and time once, and an encounter's
window is then a stretch of them, found by two binary searches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cloister_client.connectors.clinical import (
    EARLIEST,
    INPATIENT,
    LATEST,
    NEVER,
    NO,
    Encounters,
    Facts,
    Records,
    Times,
    ages,
    asked,
)
from cloister_client.site_file import Coded, Converted
from cloister_client.units import factor, known
from cloister_shared.errors import DataRefused
from cloister_shared.schema import (
    Binary,
    BooleanFeature,
    CategoryFeature,
    Channel,
    Classes,
    NumberFeature,
    Quantity,
    Schema,
    SeriesFeature,
    Survival,
    Window,
    target_columns,
)

if TYPE_CHECKING:
    import pandas as pd

_KINDS = ("inpatient", "emergency", "outpatient")
_SPAN = LATEST - EARLIEST
_DAY = 86400
Cells = NDArray[Any]


@dataclass(frozen=True)
class _Chosen:
    """The facts of one feature that lie in any record's window, by patient and time, and each record's stretch."""

    facts: Facts
    value: NDArray[np.float64]
    low: NDArray[np.int64]
    high: NDArray[np.int64]


def select(records: Records, schema: Schema, own: Coded, site: str, encounter: str | None = None) -> pd.DataFrame:
    """The plan's columns, one row for each encounter that its anchor takes, by patient and time.

    ``encounter`` names a further column, of the encounters' ids.

    Of one value the last fact of a time is the one that counts: of numbers the greatest, of words the last in the
    alphabet, so that no order of a file decides. ``frame.attrs["notes"]`` says what could not be used.

    Raises:
        DataRefused: a code, a unit or a window is missing, or a value cannot come into the plan's unit.
    """
    selection = _Selection(records, schema, own, site)
    frame = selection.frame()
    if encounter is not None:
        frame[encounter] = selection.anchors.id
    return frame


class _Selection:
    """One plan at one hospital."""

    def __init__(self, records: Records, schema: Schema, own: Coded, site: str) -> None:
        self.records, self.schema, self.own, self.site = records, schema, own, site
        self.codes = asked(schema, own, site)
        self.notes = [f"{said}: {count}" for said, count in records.left_out.items()]
        self.anchors = records.encounters
        self.anchors = self._anchored()

    def frame(self) -> pd.DataFrame:
        """See ``select``."""
        import pandas as pd

        columns: dict[str, Cells] = {}
        for feature in self.schema.features:
            if isinstance(feature, SeriesFeature):
                columns[feature.name] = self._series(feature)
            elif isinstance(feature, NumberFeature | CategoryFeature | BooleanFeature):
                columns[feature.name] = self._cells(feature, feature.window or Window(), self.anchors.start)
        columns |= self._outcome()
        if name := self.schema.patient_id:
            columns[name] = self.records.patients.id[self.anchors.patient]
        frame = pd.DataFrame(columns, index=range(1, len(self.anchors.id) + 1))
        frame.attrs["notes"] = self.notes
        return frame

    # --- which encounters -------------------------------------------------------------------------------------
    def _anchored(self) -> Encounters:
        """The encounters of the plan's cohort, by patient and start."""
        found, terms = self.anchors, self.schema.anchor
        kept = np.ones(len(found.id), bool)
        if terms.encounter != "any":
            kept &= found.kind == _KINDS.index(terms.encounter)
        if terms.ages is not None:
            low, high = terms.ages
            years = ages(self.records.patients.birth[found.patient], found.start)
            with np.errstate(invalid="ignore"):
                kept &= (years >= low) & (years < high)
        if terms.having:
            chosen = self._chosen(terms.having, terms.window, found.start)
            kept &= chosen.high > chosen.low
        found = found[np.flatnonzero(kept)]
        ids = self.records.patients.id[found.patient].astype(str)
        found = found[np.lexsort((found.id.astype(str), found.start, ids))]
        if terms.which != "every" and len(found.id):
            changes = found.patient[1:] != found.patient[:-1]
            ends = np.append(True, changes) if terms.which == "first" else np.append(changes, True)
            found = found[np.flatnonzero(ends)]
        return found

    # --- one value --------------------------------------------------------------------------------------------
    def _cells(
        self,
        asked_for: NumberFeature | CategoryFeature | BooleanFeature | Binary | Classes | Quantity,
        window: Window,
        since: Times,
    ) -> Cells:
        codes = self.codes[asked_for.name]
        if special := [code for code in codes if code in _OF_PATIENT]:
            return _OF_PATIENT[special[0]](self, asked_for, window)
        take, yes_no = window.take, isinstance(asked_for, BooleanFeature | Binary)
        if take in ("mean", "min", "max") and not isinstance(asked_for, NumberFeature | Quantity):
            raise DataRefused(
                f"The plan takes the {take} of {asked_for.name}, which is no number.", mend="Take last, first or any."
            )
        if yes_no and take in (None, "any"):
            chosen = self._chosen(codes, window, since, spoken=True)
            return _yes_no(asked_for, chosen.high > chosen.low)
        if take in ("count", "any"):
            chosen = self._chosen(codes, window, since)
            many = (chosen.high - chosen.low).astype(float)
            return many if take == "count" else (many > 0).astype(float)
        if not isinstance(asked_for, NumberFeature | Quantity):
            chosen = self._chosen(codes, window, since, words=True)
            at = chosen.low if take == "first" else chosen.high - 1
            words = np.array([*chosen.facts.answers, None], dtype=object)[chosen.facts.answer]
            return _where(chosen.high > chosen.low, words, at, None)
        chosen = self._chosen(codes, window, since, number=asked_for)
        return _taken(chosen, take or "last")

    def _chosen(
        self,
        codes: tuple[str, ...],
        window: Window,
        since: Times,
        *,
        number: NumberFeature | Quantity | Channel | None = None,
        words: bool = False,
        spoken: bool = False,
        name: str = "",
    ) -> _Chosen:
        """Facts of these codes in the window of any record. ``number`` wants values in its unit, ``words`` answers,
        and ``spoken`` leaves out what says no.
        """
        facts = self.records.facts
        asked_for = np.zeros(len(facts.codes) + 1, bool)
        for code in codes:
            asked_for[self.records.stand_for(code)] = True
        facts = facts[np.flatnonzero(asked_for[facts.code])]
        if number is not None:
            facts = self._with(facts, np.isfinite(facts.value), number.name, "no number")
        if words:
            facts = _worded(facts)
            facts = self._with(facts, facts.answer >= 0, "", "")
        if spoken:
            says_no = np.array([bool(NO.fullmatch(answer)) for answer in facts.answers] + [False], bool)
            facts = facts[~says_no[facts.answer]]
        key = _key(facts.patient, facts.time)
        order = np.argsort(key, kind="stable")
        facts, key = facts[order], key[order]
        low, high = (self._bound(key, since, hours) for hours in (window.since, window.until))
        high = np.maximum(low, high)
        covered = np.zeros(len(facts) + 1, np.int64)
        np.add.at(covered, low, 1)
        np.add.at(covered, high, -1)
        facts = facts[np.flatnonzero(np.cumsum(covered)[:-1] > 0)]
        value = self._converted(facts, number, name or number.name) if number is not None else facts.value
        rank = np.argsort(np.argsort(np.array([*facts.answers, ""], dtype=str), kind="stable"), kind="stable")
        key = _key(facts.patient, facts.time)
        order = np.lexsort((facts.event, rank[facts.answer], np.nan_to_num(value), key))
        facts, value, key = facts[order], value[order], key[order]
        # A fact with two codings that are both asked for counts once; so does one that two encounters claim.
        _, first = np.unique(facts.event, return_index=True)
        if len(first) < len(facts):
            first.sort()
            facts, value, key = facts[first], value[first], key[first]
        low, high = (self._bound(key, since, hours) for hours in (window.since, window.until))
        return _Chosen(facts, value, low, np.maximum(low, high))

    def _bound(self, key: NDArray[np.int64], since: Times, hours: float) -> NDArray[np.int64]:
        return np.searchsorted(key, _key(self.anchors.patient, since + int(np.ceil(hours * 3600))), side="left")

    def _with(self, facts: Facts, kept: NDArray[np.bool_], name: str, lacking: str) -> Facts:
        if lacking and not kept.all():
            self.notes.append(f"facts of {name} with {lacking}: {int((~kept).sum())}")
        return facts if kept.all() else facts[np.flatnonzero(kept)]

    def _converted(self, facts: Facts, wanted: NumberFeature | Quantity | Channel, name: str) -> NDArray[np.float64]:
        """Values in the plan's unit."""
        value, given = facts.value, self.own.units.get(name)
        there = wanted.unit or ""
        for at, count in zip(*np.unique(facts.unit, return_counts=True), strict=True):
            here = facts.units[at] if at >= 0 else ""
            if isinstance(given, Converted) and here in (given.unit, ""):
                by = (given.factor, 0.0)
            elif not here and isinstance(given, str):
                by = factor(given, there)
            elif not here and there:
                raise DataRefused(
                    f"{self.site}: {count} values of {name} come without a unit, and the plan's is {there}.",
                    mend=f"Write units: {{{name}: UNIT}} in site.yaml, for values without one.",
                )
            else:
                by = factor(here, there)
            if by is None:
                said = here if known(here) else "a unit that is not known"
                raise DataRefused(
                    f"{self.site}: {count} values of {name} are in {said}, which cannot become"
                    f" {there or 'a bare number'}.",
                    mend=f"Write units: {{{name}: {{unit: UNIT, factor: NUMBER}}}} in site.yaml, with value * factor in"
                    f" {there or 'the scale of the plan'}; or correct the records.",
                )
            if by != (1.0, 0.0):
                value = np.where(facts.unit == at, value * by[0] + by[1], value)
        return value

    # --- many values ------------------------------------------------------------------------------------------
    def _series(self, feature: SeriesFeature) -> Cells:
        """Of each record an array [k, 3]: hours from its start, the channel's number, the value in the plan's unit."""
        window = Window(since=0.0, until=feature.steps * feature.step_hours)
        parts = list[NDArray[np.float64]]()
        owners = list[NDArray[np.int64]]()
        for number, channel in enumerate(feature.channels):
            name = f"{feature.name}.{channel.name}"
            chosen = self._chosen(self.codes[name], window, self.anchors.start, number=channel, name=name)
            record, at = _stretched(chosen)
            hours = (chosen.facts.time[at] - self.anchors.start[record]) / 3600
            parts.append(np.stack([hours, np.full(len(at), float(number)), chosen.value[at]], axis=1))
            owners.append(record)
        whole, owner = np.concatenate(parts), np.concatenate(owners)
        order = np.lexsort((whole[:, 1], whole[:, 0], owner))
        ends = np.searchsorted(owner[order], np.arange(1, len(self.anchors.id)))
        cells = np.empty(len(self.anchors.id), dtype=object)
        if len(cells):
            for row, cell in enumerate(np.split(whole[order], ends)):
                cells[row] = cell
        return cells

    # --- outcomes ---------------------------------------------------------------------------------------------
    def _outcome(self) -> dict[str, Cells]:
        match self.schema.target:
            case Survival() as target:
                return self._survival(target)
            case Binary() | Classes() | Quantity() as target:
                if target.window is None:
                    raise DataRefused(
                        f"The plan gives no window for the outcome {target.name}: when it counts is not said.",
                        mend="Have the plan give one, such as window: {since: 0, until: 720} for 30 days.",
                    )
                return {target.name: self._cells(target, target.window, self.anchors.start)}
            case target:
                return {
                    name: self._cells(BooleanFeature(kind="boolean", name=name), Window(since=0.0), self.anchors.start)
                    for name in target_columns(target)
                }

    def _survival(self, target: Survival) -> dict[str, Cells]:
        """Days from the encounter's start to the event, or to the last that is known of the patient."""
        start, patient, people = self.anchors.start, self.anchors.patient, self.records.patients
        codes = self.codes[target.name]
        event = np.full(len(start), LATEST)
        if "LOCAL:death" in codes:
            event = np.where(people.death[patient] == NEVER, LATEST, people.death[patient])
        elif others := [code for code in codes if code in _OF_PATIENT]:
            raise DataRefused(f"{others[0]} is no event to wait for.", mend="Name LOCAL:death or a code of facts.")
        else:
            chosen = self._chosen(codes, Window(since=0.0, until=(LATEST - EARLIEST) / 3600), start, spoken=True)
            event = _where(chosen.high > chosen.low, chosen.facts.time, chosen.low, LATEST).astype(np.int64)
        seen = np.full(len(people.id), EARLIEST)
        for times in (self.records.encounters.start, self.records.encounters.end):
            np.maximum.at(seen, self.records.encounters.patient, np.maximum(times, EARLIEST))
        np.maximum.at(seen, self.records.facts.patient, self.records.facts.time)
        last = np.where(people.death[patient] == NEVER, seen[patient], people.death[patient])
        came = event < LATEST
        days = np.maximum(np.where(came, event, last) - start, 0) / _DAY
        unknown = people.dead[patient] & (people.death[patient] == NEVER) & ("LOCAL:death" in codes)
        said = came.astype(float).astype(object)
        said[unknown] = None
        return {target.name: np.where(unknown, np.nan, days), target.event: said}

    # --- of the patient and the encounter ---------------------------------------------------------------------
    def _age(self, wanted: Any, window: Window) -> Cells:
        years = ages(self.records.patients.birth[self.anchors.patient], self.anchors.start)
        return years * self._in_unit(wanted, "year")

    def _sex(self, wanted: Any, window: Window) -> Cells:
        said = self.records.patients.sex[self.anchors.patient]
        if isinstance(wanted, BooleanFeature | NumberFeature):
            raise DataRefused(f"{wanted.name} is LOCAL:sex, a category.", mend="Give it the kind category.")
        return said

    def _stay(self, wanted: Any, window: Window) -> Cells:
        days = (self.anchors.end - self.anchors.start) / _DAY
        return np.where(self.anchors.end == NEVER, np.nan, days) * self._in_unit(wanted, "day")

    def _in_unit(self, wanted: Any, unit: str) -> float:
        by = factor(unit, wanted.unit) if getattr(wanted, "unit", None) else (1.0, 0.0)
        if by is None or not isinstance(wanted, NumberFeature | Quantity):
            raise DataRefused(
                f"{wanted.name} is in {unit}s, which cannot become what the plan says of it.",
                mend=f"Give it the kind number and the unit {unit}.",
            )
        return by[0]

    def _death(self, wanted: Any, window: Window) -> Cells:
        people, patient = self.records.patients, self.anchors.patient
        came = _within(people.death[patient], self.anchors.start, window)
        said = _yes_no(wanted, came)
        said[people.dead[patient] & (people.death[patient] == NEVER)] = None
        return said

    def _readmission(self, wanted: Any, window: Window) -> Cells:
        """Another inpatient encounter that begins in the window, counted from the end of this one."""
        every = self.records.encounters
        stays = every[np.flatnonzero(every.kind == INPATIENT)]
        key = np.sort(_key(stays.patient, stays.start))
        end = np.where(self.anchors.end == NEVER, EARLIEST, self.anchors.end)
        first = np.maximum(end + int(np.ceil(window.since * 3600)), self.anchors.start + 1)  # and not this one itself
        low = np.searchsorted(key, _key(self.anchors.patient, first), side="left")
        high = np.searchsorted(key, _key(self.anchors.patient, end + int(np.ceil(window.until * 3600))), side="left")
        said = _yes_no(wanted, high > low)
        said[self.anchors.end == NEVER] = None
        return said


_OF_PATIENT = {
    "LOCAL:age": _Selection._age,
    "LOCAL:sex": _Selection._sex,
    "LOCAL:stay": _Selection._stay,
    "LOCAL:death": _Selection._death,
    "LOCAL:readmission": _Selection._readmission,
}


def _key(patient: NDArray[Any], time: Times) -> NDArray[np.int64]:
    """One number that sorts by patient and then by time."""
    return patient.astype(np.int64) * _SPAN + np.clip(time - EARLIEST, 0, _SPAN - 1)


def _within(time: Times, start: Times, window: Window) -> NDArray[np.bool_]:
    after = np.where(time == NEVER, 0, time - start)
    return (time != NEVER) & (after >= window.since * 3600) & (after < window.until * 3600)


def _yes_no(wanted: Any, came: NDArray[np.bool_]) -> Cells:
    """As the plan spells an outcome, or 1 and 0."""
    yes, no = (wanted.positive, wanted.negative) if isinstance(wanted, Binary) else (1.0, 0.0)
    said = np.empty(len(came), dtype=object)
    said[:] = no
    said[came] = yes
    return said


def _where(found: NDArray[np.bool_], values: NDArray[Any], at: NDArray[np.int64], otherwise: object) -> Cells:
    said = np.empty(len(found), dtype=object)
    said[:] = otherwise
    said[found] = values[at[found]]
    return said


def _taken(chosen: _Chosen, take: str) -> NDArray[np.float64]:
    """One number of each record's stretch; NaN of an empty one."""
    found = chosen.high > chosen.low
    said = np.full(len(found), np.nan)
    if not found.any():
        return said
    if take in ("last", "first"):
        at = chosen.high - 1 if take == "last" else chosen.low
        said[found] = chosen.value[at[found]]
        return said
    _, at = _stretched(chosen)
    counts = (chosen.high - chosen.low)[found]
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    reduce = {"mean": np.add, "min": np.minimum, "max": np.maximum}[take]
    said[found] = reduce.reduceat(chosen.value[at], starts)
    if take == "mean":
        said[found] /= counts
    return said


def _stretched(chosen: _Chosen) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Every fact of every record's stretch: the record's place, and the fact's."""
    counts = chosen.high - chosen.low
    record = np.repeat(np.arange(len(counts)), counts)
    first = np.cumsum(counts) - counts
    return record, np.arange(int(counts.sum())) - first[record] + chosen.low[record]


def _worded(facts: Facts) -> Facts:
    """A number is an answer in words too, where the plan asks for a category: 1.0 reads as 1."""
    bare = np.flatnonzero((facts.answer < 0) & np.isfinite(facts.value))
    if not len(bare):
        return facts
    spelt, places = np.unique(facts.value[bare], return_inverse=True)
    answer = facts.answer.copy()
    answer[bare] = len(facts.answers) + places
    answers = facts.answers + [f"{value:g}" for value in spelt]
    return Facts(
        facts.event, facts.patient, facts.time, facts.code, facts.value, facts.unit, answer,
        facts.codes, facts.units, answers,
    )  # fmt: skip
