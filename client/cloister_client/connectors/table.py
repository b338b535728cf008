"""Connector ``table``: one CSV or Parquet file of the hospital.

Values keep the hospital's spelling until ``dataset`` checks them; only units are known here.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cloister_client.site_file import Converted, SiteFile
from cloister_client.units import factor
from cloister_shared.errors import DataRefused
from cloister_shared.schema import Schema, numbers, target_columns

if TYPE_CHECKING:
    import pandas as pd

MISSING = ("", "NA", "N/A", "NaN", "nan", "NULL", "null", "None", "?")
"""Spellings of a missing value in a CSV."""


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
        return tuple(str(column) for column in self._read(rows=0).columns)

    def rows(self, schema: Schema, also: tuple[str, ...] = ()) -> pd.DataFrame:
        """The plan's columns under the plan's names; the index is the row number, from 1 after the header.

        ``also`` names further columns, such as the split. Cells are as the file has them, missing ones None.

        Raises:
            DataRefused: the file or a column is missing, or a name in ``site.yaml`` is not in the plan.
        """
        wanted = [feature.name for feature in schema.features]
        wanted += [name for name in (*target_columns(schema.target), schema.patient_id, *also) if name]
        table = self.site.table
        for name in (*table.columns, *table.units):
            if name not in wanted:
                raise DataRefused(
                    f"site.yaml of {self.site.site} speaks of {name}, which the plan does not.",
                    mend="Use the plan's names on the left side of columns and units.",
                )
        frame = self._read()
        names = {name: table.columns.get(name, name) for name in wanted}
        absent = [column for column in names.values() if column not in frame.columns]
        if absent:
            raise DataRefused(
                f"{self.path.name} of {self.site.site} has no column {', '.join(absent)}.",
                mend="Map it in site.yaml under table.columns, or correct the file's header.",
            )
        frame = frame[list(names.values())].set_axis(list(names), axis=1)
        frame.index = frame.index + 1
        return frame

    def count(self) -> int:
        """How many rows the file has.

        Raises:
            DataRefused: it cannot be read as a table.
        """
        return len(self._read())

    def factors(self, schema: Schema) -> dict[str, tuple[float, float]]:
        """For each number feature whose unit differs here: multiply, then add, to reach the plan's unit.

        Raises:
            DataRefused: a unit is not known, or does not measure the same thing.
        """
        found: dict[str, tuple[float, float]] = {}
        features = {feature.name: feature for feature in numbers(schema)}
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

    def _read(self, rows: int | None = None) -> pd.DataFrame:
        import pandas as pd

        where = f"{self.site.site}: {self.path.name}"
        try:
            if self.path.suffix in (".parquet", ".pq"):
                frame = pd.read_parquet(self.path)
                return frame.head(rows) if rows is not None else frame.reset_index(drop=True)
            if self.path.suffix in (".csv", ".gz"):
                _check_shape(self.path, where)
                return pd.read_csv(
                    self.path,
                    dtype=str,
                    keep_default_na=False,
                    na_values=list(MISSING),
                    nrows=rows,
                    skipinitialspace=True,
                )
        except FileNotFoundError:
            raise DataRefused(
                f"{where} is not there.", mend="Correct table.path in site.yaml; it is read beside that file."
            ) from None
        except UnicodeDecodeError:
            raise DataRefused(f"{where} is not UTF-8 text.", mend="Export it as CSV in UTF-8.") from None
        except (ValueError, OSError, EOFError, zlib.error) as error:
            # pandas' and pyarrow's messages may quote a cell, so only the kind of fault is repeated.
            raise DataRefused(
                f"{where} cannot be read as a table ({type(error).__name__}).",
                mend="Name a file of the kind that its ending says, or export it again.",
            ) from None
        raise DataRefused(
            f"{where} is neither CSV nor Parquet.", mend="Name a file that ends in .csv, .csv.gz or .parquet."
        )


def _check_shape(path: Path, where: str) -> None:
    """Refuse a CSV whose rows and header differ in length: pandas would move or pad cells without a word.

    Raises:
        DataRefused: names the first such row, or the column that stands there twice.
    """
    number = 0
    with (
        gzip.open(path, "rt", encoding="utf-8-sig", newline="")
        if path.suffix == ".gz"
        else path.open(encoding="utf-8-sig", newline="") as file
    ):
        rows = (row for row in csv.reader(file, skipinitialspace=True, strict=True) if row not in ([], [""]))
        try:
            header = next(rows, [])
            if len(header) < 2:
                raise DataRefused(
                    f"{where} has {len(header) or 'no'} column{'' if len(header) == 1 else 's'}.",
                    mend="Export it as CSV with a header, and commas between the cells.",
                )
            # Not the name: where the header was forgotten, this is a patient's row.
            if twice := [at for at, name in enumerate(header, start=1) if name and header.count(name) > 1]:
                raise DataRefused(
                    f"{where} has one name for columns {', '.join(map(str, twice))}.", mend="Correct the file's header."
                )
            for number, row in enumerate(rows, start=1):
                if len(row) != len(header):
                    raise DataRefused(
                        f"{where}: row {number} has {len(row)} cells, and the header has {len(header)}.",
                        mend="Every row needs as many cells as the header; a cell that holds a comma stands in quotes.",
                    )
        except csv.Error as error:
            raise DataRefused(
                f"{where}: row {number + 1} is not CSV: {error}.",
                mend="Close every quote; write a quote in a cell twice.",
            ) from None
