"""A picture or a volume from its file, at the plan's size, scaled to [-1, 1]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister_client.quality import ColumnReport, note
from cloister_shared.errors import DataRefused
from cloister_shared.schema import ImageFeature

Pixels = NDArray[np.float32]


def encode(feature: ImageFeature, cells: NDArray[Any], folder: Path, report: ColumnReport) -> Pixels:
    """Cells as paths seen from ``folder`` or as arrays [channels, *size], to [n, channels * pixels]."""
    x = np.zeros((len(cells), feature.channels, *feature.size), np.float32)
    gaps = np.array([cell is None or (isinstance(cell, float) and np.isnan(cell)) for cell in cells], dtype=bool)
    faults: dict[str, list[int]] = {}
    low, high = feature.range
    for row in np.flatnonzero(~gaps):
        try:
            read = pixels(cells[row], feature, folder)
            x[row] = np.clip((resized(read, feature.size) - low) / (high - low) * 2 - 1, -1, 1)
        except DataRefused as refusal:
            faults.setdefault(refusal.said, []).append(int(row) + 1)
    report.missing = int(gaps.sum())
    if feature.required:
        note(report, "no picture", gaps)
    report.problems |= faults
    return x.reshape(len(cells), -1)


def masks(
    feature: ImageFeature, cells: NDArray[Any], gaps: NDArray[np.bool_], folder: Path, report: ColumnReport
) -> NDArray[np.float64]:
    """Masks of such pictures, to [n, pixels], 0 or 1."""
    y = np.zeros((len(cells), *feature.size))
    faults: dict[str, list[int]] = {}
    flat = feature.model_copy(update={"channels": 1, "modality": (), "body_part": (), "window": None})
    for row in np.flatnonzero(~gaps):
        try:
            y[row] = resized((pixels(cells[row], flat, folder) > 0).astype(np.float32), feature.size)[0] > 0.5
        except DataRefused as refusal:
            faults.setdefault(refusal.said, []).append(int(row) + 1)
    report.problems |= faults
    return y.reshape(len(cells), -1)


def pixels(cell: object, feature: ImageFeature, folder: Path) -> Pixels:
    """[channels, *its own size], in the unit of the plan's range.

    Raises:
        DataRefused: it cannot be read, or is another kind of picture; the sentence names no file.
    """
    if isinstance(cell, np.ndarray):
        return _channels(cell.astype(np.float32), feature)
    path = folder / str(cell)
    try:
        match path.suffix.lower():
            case ".npy":
                return _channels(np.load(path, allow_pickle=False).astype(np.float32), feature)
            case ".png" | ".jpg" | ".jpeg":
                from PIL import Image

                with Image.open(path) as opened:
                    read = np.asarray(opened.convert("L" if feature.channels == 1 else "RGB"), dtype=np.float32)
                return _channels(read if feature.channels == 1 else np.moveaxis(read, -1, 0), feature)
    except FileNotFoundError:
        raise DataRefused("a file that is not there", mend="Correct the path.") from None
    except (OSError, ValueError, SyntaxError):
        raise DataRefused("a file that is no picture of the kind its name says", mend="Export it again.") from None
    raise DataRefused("a file of an unknown kind", mend="Name PNG, JPEG, NPY, DICOM or NIfTI files.")


def _channels(read: Pixels, feature: ImageFeature) -> Pixels:
    dimensions = len(feature.size)
    if read.ndim == dimensions and feature.channels == 1:
        read = read[None]
    if read.ndim != dimensions + 1 or read.shape[0] != feature.channels:
        raise DataRefused("a picture of other dimensions than the plan's", mend="Select the right series.")
    if not np.isfinite(read).all():
        raise DataRefused("a pixel that is no number", mend="Export it again.")
    return read


def resized(read: Pixels, size: tuple[int, ...]) -> Pixels:
    """By (tri)linear interpolation, averaging where it shrinks; [channels, *size]."""
    if read.shape[1:] == tuple(size):
        return read
    import torch
    from torch.nn import functional

    mode = "bilinear" if len(size) == 2 else "trilinear"
    whole = torch.from_numpy(np.ascontiguousarray(read))[None]
    if len(size) == 2:
        return functional.interpolate(whole, size=size, mode=mode, antialias=True)[0].numpy()
    return functional.interpolate(whole, size=size, mode=mode)[0].numpy()
