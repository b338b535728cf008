"""What the pixels of a DICOM data set mean, and where its slices lie. Beside ``dicom`` the only door to pydicom."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister_shared.errors import DataRefused

Pixels = NDArray[np.float32]
Point = NDArray[np.float64]


def frames(data: Any, channels: int) -> Pixels:
    """[channels, frames, rows, columns], in the order of place where frames have one."""
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
    from pydicom.pixels.utils import pixel_array

    shape = (int(data.get("NumberOfFrames") or 1), int(data.Rows), int(data.Columns))
    kind = str(data.get("PhotometricInterpretation", ""))
    stored = pixel_array(data)  # YBR becomes RGB here
    if kind == "PALETTE COLOR":
        stored = apply_color_lut(stored, data)
    read = np.asarray(stored)
    groups = data.get("PerFrameFunctionalGroupsSequence", [])
    if read.size == 3 * int(np.prod(shape)):
        deep = int(data.BitsStored) if kind != "PALETTE COLOR" else 8 * read.dtype.itemsize
        colour = read.reshape(*shape, 3).astype(np.float64) * (255 / (2.0**deep - 1))
        three = np.moveaxis(colour, -1, 0)
        made = three if channels == 3 else np.tensordot([0.299, 0.587, 0.114], three, axes=1)[None]
    elif kind in ("MONOCHROME1", "MONOCHROME2"):
        grey = read.reshape(shape)
        ends = _stored_ends(data)
        if groups:
            made = np.empty(shape, np.float64)
            for at, group in enumerate(groups):
                slope, intercept = _frame_rescale(group, shared(data))
                made[at] = grey[at] * slope + intercept
                if kind == "MONOCHROME1":
                    made[at] = sum(ends) * slope + 2 * intercept - made[at]
        else:
            made = np.asarray(apply_modality_lut(grey, data), np.float64)
            if kind == "MONOCHROME1" and "ModalityLUTSequence" not in data:
                slope, intercept = float(data.get("RescaleSlope", 1)), float(data.get("RescaleIntercept", 0))
                made = sum(ends) * slope + 2 * intercept - made
            elif kind == "MONOCHROME1":
                made = made.max() + made.min() - made
        made = np.repeat(made[None], channels, axis=0)
    else:
        raise DataRefused("a picture of a kind that is neither grey nor colour", mend="Export it as RGB.")
    at = places(data)
    if len(at) == shape[0] > 1:
        made = made[:, np.argsort(at, kind="stable")]
    if not np.isfinite(made).all():
        raise DataRefused("a pixel that is no number", mend="Export it again.")
    return made.astype(np.float32)


def _stored_ends(data: Any) -> tuple[int, int]:
    """The least and the greatest that a stored value can be."""
    bits = int(data.BitsStored)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if data.get("PixelRepresentation") else (0, 2**bits - 1)


def _frame_rescale(group: Any, common: Any) -> tuple[float, float]:
    for where in (group, common):
        for terms in where.get("PixelValueTransformationSequence", []):
            return float(terms.get("RescaleSlope", 1)), float(terms.get("RescaleIntercept", 0))
    return 1.0, 0.0


# --- where a slice lies --------------------------------------------------------------------------------------
def shared(data: Any) -> Any:
    """What all frames of a file have in common."""
    groups = data.get("SharedFunctionalGroupsSequence", [])
    return groups[0] if groups else data


def place(frame: Any, common: Any) -> float | None:
    """Along the normal of the plane, in millimetres, so that it rises with the slices' order; None if not said."""
    at: Any = None
    lines: Any = None
    for where in (frame, common):
        position, orientation = where.get("PlanePositionSequence"), where.get("PlaneOrientationSequence")
        at = at or where.get("ImagePositionPatient") or (position[0].get("ImagePositionPatient") if position else None)
        lines = lines or where.get("ImageOrientationPatient")
        lines = lines or (orientation[0].get("ImageOrientationPatient") if orientation else None)
    if not at or not lines:
        return None
    axes: Point = np.asarray(lines, np.float64)
    normal = np.cross(axes[:3], axes[3:])
    return float(normal @ np.asarray(at, np.float64))


def places(data: Any) -> list[float]:
    """Of a file's frames, in their order; none if one of them does not say."""
    found = [place(group, shared(data)) for group in data.get("PerFrameFunctionalGroupsSequence", [])]
    return [one for one in found if one is not None] if None not in found else []
