"""A picture or a volume from its file, at the plan's size, scaled to [-1, 1].

A cell is a path seen from the hospital's folder, several paths that are the slices of one volume, or an array. A
folder's files are a volume's slices; so is a file whose name ends in .dcm or in nothing DICOM.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister_client.encoders import dicom, volume
from cloister_client.quality import ColumnReport, note
from cloister_client.site_file import PictureTerms
from cloister_shared.errors import DataRefused
from cloister_shared.schema import ImageFeature

Pixels = NDArray[np.float32]


log = logging.getLogger("cloister.site")

NONE_ALLOWED = PictureTerms()

_SWITCHES = {
    "identified": "may tell who the patient is",
    "captures": "may be captures with writing in them",
    "private_tags": "may have private tags",
}


def encode(
    feature: ImageFeature,
    cells: NDArray[Any],
    folder: Path,
    report: ColumnReport,
    allowed: PictureTerms = NONE_ALLOWED,
) -> Pixels:
    """Cells as paths seen from ``folder`` or as arrays [channels, *size], to [n, channels * pixels]."""
    x = np.zeros((len(cells), feature.channels, *feature.size), np.float32)
    gaps = np.array([_gap(cell) for cell in cells], dtype=bool)
    faults: dict[str, list[int]] = {}
    low, high = bounds(feature)
    for row in np.flatnonzero(~gaps):
        try:
            read = pixels(cells[row], feature, folder, allowed)
            x[row] = resized(np.clip((read - low) / (high - low) * 2 - 1, -1, 1), feature.size)
        except DataRefused as refusal:
            faults.setdefault(refusal.said, []).append(int(row) + 1)
    report.missing = int(gaps.sum())
    if feature.required:
        note(report, "no picture", gaps)
    report.problems |= faults
    for switch, said in _SWITCHES.items():
        if getattr(allowed, switch):
            log.warning(
                "site.yaml allows %d of %s's pictures to be used though they %s; nothing but pixels is used.",
                len(cells) - report.missing,
                feature.name,
                said,
            )
    return x.reshape(len(cells), -1)


def bounds(feature: ImageFeature) -> tuple[float, float]:
    """What becomes -1 and 1: the window's ends, or those of the range."""
    if feature.window is None:
        return feature.range
    centre, width = feature.window
    return centre - width / 2, centre + width / 2


def masks(
    feature: ImageFeature,
    cells: NDArray[Any],
    gaps: NDArray[np.bool_],
    folder: Path,
    report: ColumnReport,
    allowed: PictureTerms = NONE_ALLOWED,
    of: NDArray[Any] | None = None,
) -> NDArray[np.float64]:
    """Masks of such pictures, to [n, pixels], 0 or 1; ``of`` are the cells of the pictures that they were drawn on."""
    y = np.zeros((len(cells), *feature.size))
    faults: dict[str, list[int]] = {}
    flat = feature.model_copy(update={"channels": 1, "modality": (), "body_part": (), "window": None})
    for row in np.flatnonzero(~gaps):
        try:
            path = _files(cells[row], folder)
            if path and len(path) == 1 and _is_dicom(path[0]):
                source = _files(of[row], folder) if of is not None and not _gap(of[row]) else ()
                drawn = dicom.mask(path[0], len(feature.size), allowed, [one for one in source if _is_dicom(one)])
            else:
                drawn = pixels(cells[row], flat, folder, allowed)
            y[row] = resized((drawn > 0).astype(np.float32), feature.size)[0] > 0.5
        except DataRefused as refusal:
            faults.setdefault(refusal.said, []).append(int(row) + 1)
    report.problems |= faults
    return y.reshape(len(cells), -1)


def pixels(cell: object, feature: ImageFeature, folder: Path, allowed: PictureTerms = NONE_ALLOWED) -> Pixels:
    """[channels, *its own size], in the unit of the plan's range.

    Raises:
        DataRefused: it cannot be read, or is another kind of picture; the sentence names no file.
    """
    if isinstance(cell, np.ndarray):
        return _channels(cell.astype(np.float32), feature)
    paths = _files(cell, folder)
    if not paths:
        raise DataRefused("a folder without a file", mend="Correct the path.")
    if all(map(_is_dicom, paths)):
        return _channels(dicom.picture(paths, feature, allowed), feature)
    if len(paths) > 1:
        raise DataRefused("a folder of files that are not DICOM", mend="Name one file, or a series' folder.")
    path = paths[0]
    try:
        match path.suffix.lower():
            case ".npy":
                return _channels(np.load(path, allow_pickle=False).astype(np.float32), feature)
            case ".nii" | ".gz" if path.name.lower().endswith((".nii", ".nii.gz")):
                return _channels(volume.nifti(path, len(feature.size)), feature)
            case ".png" | ".jpg" | ".jpeg":
                from PIL import Image

                with Image.open(path) as opened:
                    read = np.asarray(opened.convert("L" if feature.channels == 1 else "RGB"), dtype=np.float32)
                return _channels(read if feature.channels == 1 else np.moveaxis(read, -1, 0), feature)
            case _:
                pass
    except FileNotFoundError:
        raise DataRefused("a file that is not there", mend="Correct the path.") from None
    except MemoryError:
        raise
    except DataRefused:
        raise
    except Exception:  # Pillow's and numpy's readers raise whatever a damaged file leads them to
        raise DataRefused("a file that is no picture of the kind its name says", mend="Export it again.") from None
    raise DataRefused("a file of an unknown kind", mend="Name PNG, JPEG, NPY, DICOM or NIfTI files.")


def _gap(cell: object) -> bool:
    return cell is None or (isinstance(cell, float) and bool(np.isnan(cell)))


def _files(cell: object, folder: Path) -> Sequence[Path]:
    """The files that a cell names; those of a folder by name. None of an array."""
    if isinstance(cell, np.ndarray):
        return ()
    if isinstance(cell, tuple):
        return [folder / str(one) for one in cell]
    path = folder / str(cell)
    return sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path]


def _is_dicom(path: Path) -> bool:
    return path.suffix.lower() in ("", ".dcm", ".dicom", ".ima") or path.suffix[1:].isdigit()  # UIDs end in a number


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
