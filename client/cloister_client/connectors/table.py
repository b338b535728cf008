"""Connector ``table``: one CSV or Parquet file of the hospital, described by its ``site.yaml``.

    site: st-marys
    table:
      path: table.csv                  # beside this file
      columns: {age: AGE_YEARS}        # a feature's name in the plan: its column here, where they differ
      units: {weight: lb, creatinine: {unit: umol/L, factor: 0.0113}}   # where the unit is not the plan's

Values keep the hospital's spelling until ``dataset`` checks them; only units are known here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from cloister_shared.errors import DataRefused
from cloister_shared.plan import Name, Positive, Schema, Slug
from cloister_shared.plan_file import load, parse
from cloister_shared.schema import numbers

if TYPE_CHECKING:
    import pandas as pd

MISSING = ("", "NA", "N/A", "NaN", "nan", "NULL", "null", "None", "?")
"""Spellings of a missing value in a CSV."""


class _Terms(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Converted(_Terms):
    """A unit that dimensions alone cannot convert (mmol/L to mg/dL needs a molar mass): value * factor."""

    unit: str
    factor: Positive


class TableFile(_Terms):
    """One file and how its columns differ from the plan's."""

    path: str
    columns: dict[Name, str] = Field(default_factory=dict[str, str])
    units: dict[Name, Annotated[str | Converted, Field(union_mode="left_to_right")]] = Field(
        default_factory=dict[str, "str | Converted"]
    )


class SiteFile(_Terms):
    """``site.yaml``: who this hospital is and where its records are. It never leaves the hospital."""

    site: Slug
    table: TableFile


@dataclass(frozen=True)
class TableConnector:
    """Reads the file that ``site.yaml`` names. Runs only inside the hospital."""

    site: SiteFile
    folder: Path

    @property
    def path(self) -> Path:
        """The table's file."""
        return self.folder / self.site.table.path

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
        wanted = [feature.name for feature in schema.features] + [schema.target.name]
        wanted += [name for name in (schema.patient_id, *also) if name]
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

    def factors(self, schema: Schema) -> dict[str, tuple[float, float]]:
        """For each number feature whose unit differs here: multiply, then add, to reach the plan's unit.

        Raises:
            DataRefused: a unit is not known, or does not measure the same thing.
        """
        import pint

        registry = pint.UnitRegistry(cache_folder=None)
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
            try:
                zero = registry.Quantity(0.0, given).to(wanted).magnitude
                found[name] = (registry.Quantity(1.0, given).to(wanted).magnitude - zero, zero)
            except (pint.errors.PintError, AssertionError, ValueError, TypeError, AttributeError):
                raise DataRefused(
                    f"site.yaml of {self.site.site}: {name} is in {given}, which cannot become {wanted or 'a bare number'}.",
                    mend=f"Correct the unit, or write {name}: {{unit: {given}, factor: NUMBER}} with value * factor in {wanted}.",
                ) from None
        return found

    def _read(self, rows: int | None = None) -> pd.DataFrame:
        import pandas as pd

        where = f"{self.site.site}: {self.path.name}"
        try:
            if self.path.suffix in (".parquet", ".pq"):
                frame = pd.read_parquet(self.path)
                return frame.head(rows) if rows is not None else frame.reset_index(drop=True)
            if self.path.suffix in (".csv", ".gz"):
                return pd.read_csv(
                    self.path, dtype=str, keep_default_na=False, na_values=list(MISSING), nrows=rows, skipinitialspace=True
                )
        except FileNotFoundError:
            raise DataRefused(
                f"{where} is not there.", mend="Correct table.path in site.yaml; it is read beside that file."
            ) from None
        except UnicodeDecodeError:
            raise DataRefused(f"{where} is not UTF-8 text.", mend="Export it as CSV in UTF-8.") from None
        except (ValueError, OSError) as error:
            # pandas' and pyarrow's messages may quote a cell, so only the kind of fault is repeated.
            raise DataRefused(
                f"{where} cannot be read as a table ({type(error).__name__}).",
                mend="Every row needs as many cells as the header; export it again as CSV or Parquet.",
            ) from None
        raise DataRefused(f"{where} is neither CSV nor Parquet.", mend="Name a file that ends in .csv, .csv.gz or .parquet.")


def open_table(site_yaml: Path) -> TableConnector:
    """The connector that a ``site.yaml`` describes.

    Raises:
        DataRefused: there is no such file.
        PlanRefused: it is malformed.
    """
    try:
        text = site_yaml.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataRefused(f"{site_yaml} is not there.", mend="Give the path of the hospital's site.yaml.") from None
    return TableConnector(parse(SiteFile, load(text, site_yaml.name)), site_yaml.parent)
