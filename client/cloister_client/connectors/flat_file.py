"""A hospital's CSV or Parquet file as it is written: every cell in the hospital's own spelling."""

from __future__ import annotations

import csv
import gzip
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from cloister_shared.errors import DataRefused

if TYPE_CHECKING:
    import pandas as pd

MISSING = ("", "NA", "N/A", "NaN", "nan", "NULL", "null", "None", "?")
"""Spellings of a missing value in a CSV."""


def read_file(path: Path, site: str, key: str, rows: int | None = None) -> pd.DataFrame:
    """All cells, or those of the first ``rows``; missing ones are NaN or None. ``key`` of site.yaml gives the path.

    Raises:
        DataRefused: the file is missing, or is not what its ending says.
    """
    import pandas as pd

    where = f"{site}: {path.name}"
    try:
        if path.suffix in (".parquet", ".pq"):
            frame = pd.read_parquet(path)
            return frame.head(rows) if rows is not None else frame.reset_index(drop=True)
        if path.suffix in (".csv", ".gz"):
            _check_shape(path, where)
            return pd.read_csv(
                path,
                dtype=str,
                keep_default_na=False,
                na_values=list(MISSING),
                nrows=rows,
                skipinitialspace=True,
            )
    except FileNotFoundError:
        raise DataRefused(
            f"{where} is not there.", mend=f"Correct {key} in site.yaml; it is read beside that file."
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
