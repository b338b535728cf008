"""Connector ``table``: one CSV or Parquet file of the hospital, and what series it has beside it.

Values keep the hospital's spelling until ``dataset`` checks them; only units are known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from cloister_client.connectors.flat_file import read_file
from cloister_client.connectors.measurements import read_measurements
from cloister_client.connectors.waveforms import stretches
from cloister_client.site_file import Converted, SiteFile
from cloister_client.units import factor
from cloister_shared.errors import DataRefused
from cloister_shared.inputs import numbers, scalars
from cloister_shared.schema import Channel, NumberFeature, Schema, SeriesFeature, Shaped, target_columns

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class TableConnector:
    """Reads the file that ``site.yaml`` names. Runs only inside the hospital."""

    site: SiteFile
    folder: Path

    @property
    def path(self) -> Path:
        """The table's file."""
        return self.folder / self.site.table.path

    @property
    def source(self) -> str:
        """The file's name."""
        return self.path.name

    def describe(self) -> tuple[str, ...]:
        """The file's own column names.

        Raises:
            DataRefused: the file is missing or is neither CSV nor Parquet.
        """
        return tuple(str(column) for column in read_file(self.path, self.site.site, "table.path", rows=0).columns)

    def rows(self, schema: Schema, also: tuple[str, ...] = ()) -> pd.DataFrame:
        """The plan's columns under the plan's names; the index is the row number, from 1 after the header.

        ``also`` names further columns, such as the split. Cells are as the file has them, missing ones None.

        Raises:
            DataRefused: the file or a column is missing, or a name in ``site.yaml`` is not in the plan.
        """
        table, series = self.site.table, [f for f in schema.features if isinstance(f, SeriesFeature)]
        wanted = [feature.name for feature in scalars(schema)]
        wanted += [f.name for f in schema.features if isinstance(f, Shaped) and not isinstance(f, SeriesFeature)]
        wanted += [name for name in (*target_columns(schema.target), schema.patient_id, *also) if name]
        channels = [channel.name for feature in series for channel in feature.channels]
        for name in (*table.columns, *table.units):
            if name not in wanted and name not in channels:
                raise DataRefused(
                    f"site.yaml of {self.site.site} speaks of {name}, which the plan does not.",
                    mend="Use the plan's names on the left side of columns and units.",
                )
        whole = read_file(self.path, self.site.site, "table.path")
        names = {name: table.columns.get(name, name) for name in wanted}
        absent = [column for column in (*names.values(), *self._keys(series)) if column not in whole.columns]
        if absent:
            raise DataRefused(
                f"{self.path.name} of {self.site.site} has no column {', '.join(absent)}.",
                mend="Map it in site.yaml under table.columns, or correct the file's header.",
            )
        frame = whole[list(names.values())].set_axis(list(names), axis=1)
        if series:
            frame = frame.assign(**self._series(series, whole, self.factors(schema)))
        frame.index = frame.index + 1
        return frame

    def _keys(self, series: Sequence[SeriesFeature]) -> Iterator[str]:
        """Columns of the table that say whose the measurements are."""
        table = self.site.table
        if series and table.series:
            yield table.series.row
        if series and table.waveforms:
            yield from filter(None, (table.waveforms.record, table.waveforms.seconds))

    def _series(
        self, series: Sequence[SeriesFeature], whole: pd.DataFrame, factors: dict[str, tuple[float, float]]
    ) -> dict[str, NDArray[Any]]:
        """The cells of each series, from the file or the recordings beside the table."""
        table, site = self.site.table, self.site.site
        if table.series:
            read = read_measurements(table.series, whole[table.series.row], site, self.folder)
            return {feature.name: read.cells(feature, len(whole), table.columns, factors) for feature in series}
        if table.waveforms:
            terms, folder = table.waveforms, self.folder
            return {f.name: stretches(terms, f, whole, table.columns, site, folder) for f in series}
        raise DataRefused(
            f"The plan wants the series {series[0].name}, and site.yaml of {site} names no file of measurements.",
            mend="Add table.series with the columns of a file that has one measurement a row, or table.waveforms.",
        )

    def count(self) -> int:
        """How many rows the file has.

        Raises:
            DataRefused: it cannot be read as a table.
        """
        return len(read_file(self.path, self.site.site, "table.path"))

    def frame(self) -> pd.DataFrame:
        """The whole file, under its own names.

        Raises:
            DataRefused: it cannot be read as a table.
        """
        return read_file(self.path, self.site.site, "table.path")

    def factors(self, schema: Schema) -> dict[str, tuple[float, float]]:
        """For each number or channel whose unit differs here: multiply, then add, to reach the plan's unit.

        Raises:
            DataRefused: a unit is not known, or does not measure the same thing.
        """
        found: dict[str, tuple[float, float]] = {}
        features: dict[str, NumberFeature | Channel] = {feature.name: feature for feature in numbers(schema)}
        for feature in schema.features:
            if isinstance(feature, SeriesFeature):
                features.update((channel.name, channel) for channel in feature.channels)
        for name, given in self.site.table.units.items():
            if name not in features:
                raise DataRefused(
                    f"site.yaml of {self.site.site} gives a unit for {name}, which is not a number.",
                    mend="Take it out of table.units.",
                )
            if isinstance(given, Converted):
                found[name] = (given.factor, 0.0)
                continue
            wanted = features[name].unit or ""
            reached = factor(given, wanted)
            if reached is None:
                raise DataRefused(
                    f"site.yaml of {self.site.site}: {name} is in {given}, which cannot become"
                    f" {wanted or 'a bare number'}.",
                    mend=f"Correct the unit, or write {name}: {{unit: {given}, factor: NUMBER}}, with value * factor in"
                    f" {wanted or 'the scale of the plan'}.",
                )
            found[name] = reached
        return found
