"""A file with one measurement a row, as hospitals keep vitals and laboratory values, to the cells of a series."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cloister_client.connectors.flat_file import read_file
from cloister_client.encoders.scalars import word
from cloister_client.quality import rows_text
from cloister_client.site_file import SeriesFile
from cloister_shared.errors import DataRefused
from cloister_shared.schema import SeriesFeature

if TYPE_CHECKING:
    import pandas as pd

NOBODY = -1
"""Of a measurement whose record the table does not have."""


@dataclass(frozen=True)
class Measurements:
    """What the file says, a row a measurement, those of one record side by side; ``where`` is it, in words."""

    where: str
    record: NDArray[np.int64]
    """The record's place in the table."""
    name: NDArray[np.int64]
    names: tuple[str, ...]
    """What the file calls the quantity that ``name`` numbers."""
    hours: NDArray[np.float64]
    value: NDArray[np.float64]
    """NaN where nothing is written."""
    unread: NDArray[np.bool_]
    """Where what is written is not a number."""
    row: NDArray[np.int64]
    """The row's number in the file, from 1 after the header."""

    def cells(
        self,
        feature: SeriesFeature,
        records: int,
        called: Mapping[str, str],
        factors: Mapping[str, tuple[float, float]],
    ) -> NDArray[Any]:
        """Of each of so many records an array [k, 3] of hours, channel and value in the plan's unit, or None.

        ``called`` and ``factors`` are of channels: the name here where it differs, and what makes its unit the plan's.

        Raises:
            DataRefused: none of the channels is in the file, or a value of one is not a number.
        """
        channel_of = {called.get(channel.name, channel.name): at for at, channel in enumerate(feature.channels)}
        known = np.array([channel_of.get(name, NOBODY) for name in self.names], dtype=np.int64)
        if (known < 0).all():
            raise DataRefused(
                f"{self.where} has none of the channels of {feature.name}.",
                mend="Map them in site.yaml under table.columns: the plan's name on the left, the file's on the right.",
            )
        channel = known[self.name]
        wanted = (channel >= 0) & (self.record >= 0)
        _refuse(self.where, "a value that is not a number", self.row[wanted & self.unread])
        wanted &= ~np.isnan(self.value)
        times = np.array([factors.get(channel.name, (1.0, 0.0)) for channel in feature.channels])
        channel, value = channel[wanted], self.value[wanted]
        events = np.column_stack([self.hours[wanted], channel, value * times[channel, 0] + times[channel, 1]])
        counts = np.bincount(self.record[wanted], minlength=records)
        cells = np.empty(records, dtype=object)
        for at, part in enumerate(np.split(events, np.cumsum(counts)[:-1])):
            cells[at] = part if len(part) else None
        return cells


def read_measurements(terms: SeriesFile, records: pd.Series[Any], site: str, folder: Path) -> Measurements:
    """What the file says of these records, whose cells name them.

    Raises:
        DataRefused: the file or a column is missing, a row lacks its record, name or time, or two records share a name.
    """
    import pandas as pd

    path = folder / terms.path
    where, frame = f"{site}: {path.name}", read_file(path, site, "table.series.path")
    time = terms.hours or terms.minutes or ""
    if absent := [name for name in (terms.row, time, terms.name, terms.value) if name not in frame.columns]:
        raise DataRefused(
            f"{where} has no column {', '.join(absent)}.",
            mend="Name its columns in site.yaml under table.series, or correct the file's header.",
        )
    # Keys are compared as categories: a record's name is spelt out once, not once a measurement.
    row, name = (pd.Categorical(frame[column]) for column in (terms.row, terms.name))
    _refuse(where, f"no {terms.row}", np.flatnonzero(row.codes < 0) + 1)
    _refuse(where, f"no {terms.name}", np.flatnonzero(name.codes < 0) + 1)
    hours = _numbers(frame[time])
    _refuse(where, f"no number as {time}", np.flatnonzero(~np.isfinite(hours)) + 1)
    value = _numbers(frame[terms.value])
    written = frame[terms.value].notna().to_numpy()

    places: dict[str, int] = {}
    for at, cell in enumerate(records):
        if pd.isna(cell):
            continue
        if (first := places.setdefault(word(cell), at)) != at:
            raise DataRefused(
                f"The table of {site} has one {terms.row} in rows {first + 1} and {at + 1}.",
                mend="Each record's measurements need a name of their own: name another column as table.series.row.",
            )
    place = np.array([places.get(word(key), NOBODY) for key in row.categories], dtype=np.int64)[row.codes]
    order = np.argsort(place, kind="stable")
    unread = written & ~np.isfinite(value)
    names = tuple(word(category) for category in name.categories)
    scale = 1.0 if terms.hours else 1 / 60
    return Measurements(
        where,
        place[order],
        name.codes.astype(np.int64)[order],
        names,
        hours[order] * scale,
        np.where(unread, np.nan, value)[order],
        unread[order],
        order + 1,
    )


def _numbers(column: pd.Series[Any]) -> NDArray[np.float64]:
    import pandas as pd

    return pd.to_numeric(column, errors="coerce").to_numpy(dtype=float, na_value=np.nan)


def _refuse(where: str, lack: str, rows: NDArray[np.int64]) -> None:
    if len(rows):
        raise DataRefused(
            f"{where} has {lack} in {rows_text(sorted(rows.tolist()))}.", mend="Correct these rows, or leave them out."
        )
