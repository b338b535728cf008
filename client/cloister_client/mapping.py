"""Which of a hospital's columns or codes fit a plan's features: proposals with what speaks for them, never a value.

Names are compared, codes looked up, and values held against the plan's range. Where most values lie outside the
range and another unit would bring them in, that unit is said: nobody should train on pounds taken for kilograms.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cloister_client.connectors.clinical import OF_PATIENT, Records
from cloister_client.connectors.coded import CodedConnector
from cloister_client.connectors.connector import Connector
from cloister_client.connectors.linked import LinkedConnector
from cloister_client.encoders.scalars import NO, YES, word
from cloister_client.site_file import SOURCES, Converted
from cloister_client.units import factor
from cloister_shared.errors import DataRefused
from cloister_shared.inputs import scalars
from cloister_shared.schema import (
    Binary,
    BooleanFeature,
    CategoryFeature,
    Channel,
    NumberFeature,
    Schema,
    SeriesFeature,
    target_columns,
)

if TYPE_CHECKING:
    import pandas as pd

_UNITS = (
    "kg", "lb", "g", "cm", "m", "inch", "degC", "degF", "kelvin", "mmHg", "kPa", "mg/dL", "g/L", "g/dL", "mg/L",
    "ug/dL", "ug/L", "ng/mL", "mmol/L", "umol/L", "nmol/L", "10*9/L", "1/uL", "1/min", "1/s", "year", "month", "day",
    "hour", "minute", "percent", "1", "kg/m2", "L", "mL",
)  # fmt: skip
_GRAMS = {
    "LOINC:2160-0": 113.12, "LOINC:2345-7": 180.16, "LOINC:2339-0": 180.16, "LOINC:2093-3": 386.65,
    "LOINC:2571-8": 885.4, "LOINC:2085-9": 386.65, "LOINC:1975-2": 584.66, "LOINC:17861-6": 40.08,
    "LOINC:3094-0": 28.01, "LOINC:3084-1": 168.11,
}  # fmt: skip
"""Grams in a mole of what is measured: creatinine, glucose, cholesterol, triglycerides, bilirubin, calcium, …"""
_FITS, _ALIKE = 0.9, 0.55
"""Shares: of values within the range by which a unit is believed, and of letters by which a name is proposed."""


@dataclass(frozen=True)
class Match:
    """One of the plan's columns and what there is of it here."""

    name: str
    here: str = ""
    """The column, or the codes with a comma between; "" where nothing fits."""
    told: bool = True
    """Whether the plan or site.yaml says so, rather than this proposal."""
    records: int = 0
    """How many have a value."""
    of: int = 0
    unit: str = ""
    """The unit that the values seem to be in, where it is not the plan's."""
    factor: float | None = None
    note: str = ""

    @property
    def sound(self) -> bool:
        """Whether nobody has to look at it again."""
        return bool(self.here) and not self.note


@dataclass(frozen=True)
class Mapping:
    """All matches, and the section of ``site.yaml`` that they go into."""

    section: str
    matches: Sequence[Match] = field(default_factory=tuple)

    def lines(self) -> Iterator[str]:
        """A table for 100 columns, then what to put into site.yaml."""
        widths = (23, 26, 20, 28)
        yield from _row(("In the plan", "Here", "With a value", ""), widths)
        for match in self.matches:
            here = match.here or "NOTHING FITS"
            share = f"{match.records} of {match.of}, {match.records / match.of:.0%}" if match.of else "no records"
            note = match.note or ("" if match.told else "proposed")
            yield from _row((match.name, here, share, note), widths)
        if yaml := list(self.yaml()):
            yield ""
            yield "Look at each proposal, then put this into site.yaml:"
            yield ""
            yield from yaml

    def yaml(self) -> Iterator[str]:
        """What differs from the plan, as it is written under the section's name."""
        proposed = [match for match in self.matches if match.here and not match.told]
        other = [match for match in self.matches if match.unit]
        if not proposed and not other:
            return
        yield f"{self.section}:"
        if proposed:
            yield "  columns:" if self.section == "table" else "  codes:"
            for match in proposed:
                listed = "[" + ", ".join(f'"{code}"' for code in match.here.split(", ")) + "]"
                yield f"    {match.name}: {_quoted(match.here) if self.section == 'table' else listed}"
        if other:
            yield "  units:"
            for match in other:
                by = f"{{unit: {match.unit}, factor: {match.factor:.6g}}}" if match.factor else match.unit
                yield f"    {match.name}: {by}"


def mapped(schema: Schema, connector: Connector) -> Mapping:
    """Proposals for one hospital.

    Raises:
        DataRefused: its records cannot be read.
    """
    if isinstance(connector, CodedConnector):
        section = next(name for name in SOURCES if name in connector.site.model_fields_set)
        return Mapping(section, _of_records(schema, connector))
    if isinstance(connector, LinkedConnector):
        return _of_linked(schema, connector)
    return Mapping("table", _of_table(schema, connector))


def _of_linked(schema: Schema, connector: LinkedConnector) -> Mapping:
    """Proposals for the records, and of the files beside them what site.yaml tells."""
    own = mapped(connector.own_part(schema), connector.main)
    connector.describe()  # refuses files without their columns
    found = list(own.matches)
    for link in connector.site.link:
        part = connector.part(link, schema)
        names = [name for name in link.columns if name in {feature.name for feature in part.features}]
        found += _of_table(part, connector.file(link, names))
    return Mapping(own.section, found)


# --- a table -----------------------------------------------------------------------------------------------
def _of_table(schema: Schema, connector: Connector) -> list[Match]:
    frame, own = _table(connector), connector.site.table
    wanted: list[Any] = [*scalars(schema)]
    wanted += [schema.target] if isinstance(schema.target, Binary) else []
    names = [name for name in target_columns(schema.target) if name not in [w.name for w in wanted]]
    names += [schema.patient_id] if schema.patient_id else []
    taken = {own.columns.get(w.name, w.name) for w in wanted} | {own.columns.get(name, name) for name in names}
    found: list[Match] = []
    for each in wanted:
        here, told = own.columns.get(each.name, each.name), True
        if here not in frame.columns:
            free = [column for column in frame.columns if column not in taken]
            here, told = _closest(each, frame, free), False
            taken.add(here)
        if not here:
            found.append(Match(each.name, told=False, of=len(frame), note="name the column yourself"))
            continue
        cells = frame[here]
        match = Match(each.name, here, told, int(cells.notna().sum()), len(frame))
        given = own.units.get(each.name)
        found.append(_measured(match, each, _numbers(cells), given) if isinstance(each, NumberFeature) else match)
    for name in names:
        here = own.columns.get(name, name)
        there = here in frame.columns
        held = int(frame[here].notna().sum()) if there else 0
        found.append(
            Match(name, here if there else "", there, held, len(frame), note="" if there else "name it yourself")
        )
    return found


def _table(connector: Connector) -> pd.DataFrame:
    """The whole file, as text or as it is typed."""
    import pandas as pd

    connector.describe()  # refuses what is no table
    path = connector.folder / connector.site.table.path
    if path.suffix in (".parquet", ".pq"):
        return pd.read_parquet(path)
    return pd.read_csv(path, dtype=str, skipinitialspace=True)


def _closest(wanted: Any, frame: pd.DataFrame, free: Sequence[str]) -> str:
    """The column whose name and values speak for it most; "" where none does."""
    scores = {column: _alike(wanted, column) + 0.4 * _plausible(wanted, frame[column]) for column in free}
    best = max(scores, key=lambda column: scores[column], default="")
    return best if best and _alike(wanted, best) >= _ALIKE else ""


def _alike(wanted: Any, column: str) -> float:
    """0 to 1: how a column's name, or a code in it, speaks for a feature."""
    bare, name = (re.sub(r"[^a-z0-9]", "", text.lower()) for text in (column, wanted.name))
    code = re.sub(r"[^a-z0-9]", "", str(getattr(wanted, "code", None) or "").partition(":")[2].lower())
    if len(code) > 3 and code in bare:
        return 1.0
    if len(min(bare, name, key=len)) > 2 and (bare.startswith(name) or name.startswith(bare)):
        return 0.9
    return difflib.SequenceMatcher(None, bare, name).ratio()


def _plausible(wanted: Any, cells: pd.Series[Any]) -> float:
    """The share of cells that could be values of the feature, in whatever unit."""
    known = cells.dropna()
    if not len(known):
        return 0.0
    match wanted:
        case NumberFeature():
            return float(np.isfinite(_numbers(known)).mean())
        case CategoryFeature(categories=categories):
            spelt = {word(category) for category in categories}
            return float(np.mean([word(cell) in spelt for cell in known]))
        case BooleanFeature():
            return float(np.mean([word(cell).lower() in (*YES, *NO) for cell in known]))
        case Binary(positive=positive, negative=negative):
            return float(np.mean([word(cell) in (word(positive), word(negative)) for cell in known]))
        case _:
            return 0.0


def _numbers(cells: Any) -> NDArray[np.float64]:
    import pandas as pd

    return pd.to_numeric(pd.Series(cells), errors="coerce").to_numpy(dtype=float, na_value=np.nan)


# --- units -------------------------------------------------------------------------------------------------
def _measured(match: Match, wanted: NumberFeature | Channel, values: NDArray[np.float64], given: Any) -> Match:
    """Whether the values can be in the plan's unit, or which other unit fits them better."""
    values = values[np.isfinite(values)]
    if not len(values):
        return match
    if given is not None:
        by = (given.factor, 0.0) if isinstance(given, Converted) else factor(given, wanted.unit or "")
        if by is None:
            note = f"{getattr(given, 'unit', given)} cannot become {wanted.unit}"
            return Match(match.name, match.here, match.told, match.records, match.of, note=note)
        values = values * by[0] + by[1]
    inside = _inside(values, wanted.range)
    if inside >= _FITS:
        return match
    unit, times, fits = max(_candidates(wanted, values), key=lambda found: found[2], default=("", None, 0.0))
    said = f"CHECK: {inside:.0%} within the plan's range"
    if given is None and fits >= _FITS and fits > inside + 0.2:
        return Match(
            match.name, match.here, match.told, match.records, match.of, unit, times,
            f"{said} in {wanted.unit}; {unit} would fit",
        )  # fmt: skip
    return Match(match.name, match.here, match.told, match.records, match.of, note=said)


def _candidates(
    wanted: NumberFeature | Channel, values: NDArray[np.float64]
) -> Iterator[tuple[str, float | None, float]]:
    """Other units, the factor where dimensions alone do not give it, and the share within the range."""
    if not wanted.unit:
        return
    grams = _GRAMS.get(wanted.code or "")
    for unit in _UNITS:
        by, molar = factor(unit, wanted.unit), None
        if by is None and grams and (whole := factor(unit, "mol/L")) and (mass := factor("g/L", wanted.unit)):
            molar = whole[0] * grams * mass[0]
        elif by is None and grams and (whole := factor(unit, "g/L")) and (mass := factor("mol/L", wanted.unit)):
            molar = whole[0] / grams * mass[0]
        if molar:
            by = (molar, 0.0)
        if by is not None and by != (1.0, 0.0):
            yield unit, molar, _inside(values * by[0] + by[1], wanted.range)


def _inside(values: NDArray[np.float64], bounds: tuple[float, float]) -> float:
    return float(((values >= bounds[0]) & (values <= bounds[1])).mean())


# --- clinical records --------------------------------------------------------------------------------------
def _of_records(schema: Schema, connector: CodedConnector) -> list[Match]:
    from cloister_client.connectors.selection import select

    own, found = connector.terms, list[Match]()
    wanted: list[Any] = [f for f in schema.features if isinstance(f, NumberFeature | CategoryFeature | BooleanFeature)]
    series = [f for f in schema.features if isinstance(f, SeriesFeature)]
    channels = [(f"{feature.name}.{channel.name}", channel) for feature in series for channel in feature.channels]
    named = [*((each.name, each) for each in wanted), *channels, (schema.target.name, schema.target)]
    asked_by = {
        name: own.codes.get(name) or (() if getattr(each, "code", None) is None else (each.code,))
        for name, each in named
    }
    sought = frozenset({code for codes in asked_by.values() for code in codes} | set(schema.anchor.having))
    records: Records = connector.records(sought - set(OF_PATIENT))
    everything: list[Records] = []
    for name, each in named:
        codes, among = asked_by[name], records
        here = [code for code in codes if code in OF_PATIENT or len(records.stand_for(code))]
        told = bool(here)
        if not here:
            everything = everything or [connector.records(None)]
            among = everything[0]
            here = list(filter(None, [_closest_code(each, name, among)]))
        if not here:
            said = f"no fact under {', '.join(codes)}" if codes else "the plan gives no code"
            found.append(Match(name, told=False, note=said))
            continue
        own_codes = own.model_copy(update={"codes": own.codes | {name: tuple(here)}})
        alone: Any = {"features": (each,), "target": schema.target}
        match = Match(name, ", ".join(here), told)
        if isinstance(each, Channel):
            parent = next(f for f in series if name.startswith(f"{f.name}."))
            alone["features"] = (parent.model_copy(update={"channels": (each,)}),)
        elif each is schema.target:
            alone["features"] = (NumberFeature(kind="number", name="age", code="LOCAL:age", range=(0.0, 150.0)),)
        kept = {key: value for key, value in own_codes.codes.items() if key in (name, schema.target.name)}
        own_codes = own_codes.model_copy(
            update={"codes": kept, "units": {key: value for key, value in own.units.items() if key == name}}
        )
        try:
            frame = select(among, schema.model_copy(update=alone), own_codes, connector.site.site)
        except DataRefused as refusal:
            found.append(Match(name, match.here, told, note=refusal.said))
            continue
        column = frame[name.partition(".")[0] if isinstance(each, Channel) else name]
        held = column.map(len) > 0 if isinstance(each, Channel) else column.notna()
        match = Match(name, match.here, told, int(held.sum()), len(frame))
        if isinstance(each, NumberFeature) and (each.window is None or each.window.take not in ("count", "any")):
            match = _measured(match, each, _numbers(column), None)
            match = Match(match.name, match.here, match.told, match.records, match.of, note=match.note)
        found.append(match)
    return found


def _closest_code(wanted: Any, name: str, records: Records) -> str:
    """The hospital's code of numbers in a unit that converts and within the range, whose text is most like the name."""
    facts = records.facts
    best, score = "", _ALIKE
    for number, code in enumerate(facts.codes):
        alike = _alike(wanted, code.partition(":")[2])
        if alike <= score:
            continue
        if isinstance(wanted, NumberFeature | Channel):
            at = np.flatnonzero(facts.code == number)
            units = {facts.units[unit] for unit in np.unique(facts.unit[at]) if unit >= 0}
            if any(factor(unit, wanted.unit or "") is None for unit in units):
                continue
        best, score = code, alike
    return best


# --- printing ----------------------------------------------------------------------------------------------
def _row(cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    wrapped = [wrap(cell, width) or [""] for cell, width in zip(cells, widths, strict=True)]
    for parts in zip_longest(*wrapped, fillvalue=""):
        yield " ".join(f"{part:<{width}}" for part, width in zip(parts, widths, strict=True)).rstrip()


def _quoted(text: str) -> str:
    return text if re.fullmatch(r"[A-Za-z_][\w.]*", text) else f'"{text}"'
