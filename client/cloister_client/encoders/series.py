"""Measurements over time to a grid of equal steps."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister_client.quality import ColumnReport, note
from cloister_shared.inputs import plan_constants
from cloister_shared.schema import SeriesFeature


def encode(feature: SeriesFeature, cells: NDArray[Any], report: ColumnReport) -> NDArray[np.float32]:
    """Cells as arrays [k, 3] of hours, channel and value, to [n, steps * 2 * channels]; see ``SeriesFeature``.

    Values outside a channel's range are left out, as instruments' faults are; measurements before the first or after
    the last step too.
    """
    channels, steps = len(feature.channels), feature.steps
    low, high = np.array([channel.range for channel in feature.channels]).T
    centre, scale = np.array([plan_constants(channel) for channel in feature.channels]).T
    x = np.zeros((len(cells), steps, 2 * channels), np.float32)
    empty = np.zeros(len(cells), bool)
    for row, cell in enumerate(cells):
        events = np.zeros((0, 3)) if cell is None or not isinstance(cell, np.ndarray) else cell
        events = events[np.lexsort(events.T)]  # a sum's last bit shall not depend on the order of a file
        step, channel = np.floor(events[:, 0] / feature.step_hours), events[:, 1].astype(np.int64)
        value = events[:, 2]
        with np.errstate(invalid="ignore"):
            kept = (step >= 0) & (step < steps) & (value >= low[channel]) & (value <= high[channel])
        at = step[kept].astype(np.int64) * channels + channel[kept]
        counts = np.bincount(at, minlength=steps * channels).reshape(steps, channels)
        sums = np.bincount(at, weights=value[kept], minlength=steps * channels).reshape(steps, channels).astype(float)
        known = counts > 0
        mean = np.divide(sums, counts, out=np.zeros_like(sums), where=known)
        x[row, :, :channels] = np.where(known, (mean - centre) / scale, 0.0)
        x[row, :, channels:] = known
        empty[row] = not known.any()
    report.missing = int(empty.sum())
    if feature.required:
        note(report, "no measurement", empty)
    return x.reshape(len(cells), -1)
