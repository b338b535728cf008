"""Recordings in WFDB, PhysioNet's format, to the cells of a series. The only door of ``wfdb``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cloister_client.site_file import WaveformFiles
from cloister_shared.errors import DataRefused
from cloister_shared.schema import SeriesFeature

if TYPE_CHECKING:
    import pandas as pd

Signals = tuple[NDArray[np.float64], dict[str, int], float]
"""Samples [n, signals] in physical units, each signal's column, samples a second."""


def stretches(
    terms: WaveformFiles,
    feature: SeriesFeature,
    frame: pd.DataFrame,
    called: Mapping[str, str],
    site: str,
    folder: Path,
) -> NDArray[Any]:
    """Of each row of the table an array [k, 3] of hours, channel and value: as much as the plan's steps are long.

    A sample's time is the middle of what it stands for, so that none lies on the edge of a step.

    Raises:
        DataRefused: a record or a signal is missing or cannot be read, or a row does not say where it begins.
    """
    import pandas as pd

    names = frame[terms.record]
    begins = np.zeros(len(frame))
    if terms.seconds:
        begins = pd.to_numeric(frame[terms.seconds], errors="coerce").to_numpy(dtype=float, na_value=np.nan)
    if bad := np.flatnonzero(names.isna().to_numpy() | ~np.isfinite(begins)).tolist():
        raise DataRefused(
            f"Row {bad[0] + 1} of {site} names no recording, or not where in it the row begins ({len(bad)} such rows).",
            mend="Correct the columns that site.yaml names under table.waveforms, or leave the rows out.",
        )
    read: dict[str, Signals] = {}
    cells = np.empty(len(frame), dtype=object)
    for at, (name, begin) in enumerate(zip(map(str, names), begins, strict=True)):
        if name not in read:
            read[name] = _signals(folder / terms.path, name, site)
        samples, columns, rate = read[name]
        first, many = round(begin * rate), int(feature.steps * feature.step_hours * 3600 * rate + 0.5)
        part = samples[max(first, 0) : max(first + many, 0)]
        hours = (np.arange(len(part)) + max(first, 0) - first + 0.5) / (rate * 3600)
        cells[at] = np.concatenate(
            [
                np.column_stack([hours, np.full(len(part), number), part[:, _column(columns, channel, name, site)]])
                for number, channel in enumerate(called.get(channel.name, channel.name) for channel in feature.channels)
            ]
        )
    return cells


def beats(record: Path, annotator: str = "atr") -> tuple[NDArray[np.float64], list[str]]:
    """The seconds of a record's annotations and their symbols, as the cardiologists' file beside it has them."""
    import wfdb

    found = wfdb.rdann(str(record), annotator)
    return np.asarray(found.sample, dtype=float) / float(found.fs or 1), list(found.symbol or ())


def _signals(folder: Path, name: str, site: str) -> Signals:
    import wfdb

    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataRefused(f"A recording of {site} lies outside of {folder.name}.", mend="Name records in that folder.")
    try:
        record: Any = wfdb.rdrecord(str(path))
        samples: NDArray[np.float64] = np.asarray(record.p_signal, dtype=float)
        return samples, {signal: at for at, signal in enumerate(record.sig_name or ())}, float(record.fs or 0)
    except Exception as error:  # wfdb raises whatever a malformed header makes numpy or Python raise
        raise DataRefused(
            f"A recording of {site} in {folder.name} cannot be read ({type(error).__name__}).",
            mend="Put each record's .hea and .dat files there, as the table names them.",
        ) from None


def _column(columns: Mapping[str, int], signal: str, name: str, site: str) -> int:
    if signal not in columns:
        raise DataRefused(
            f"A recording of {site} has no signal {signal}.",
            mend="Map the channel in site.yaml under table.columns, or leave such recordings out.",
        )
    return columns[signal]
