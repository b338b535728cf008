"""A volume, or one slice of one, from a NIfTI file; the only door to nibabel in the client."""

from __future__ import annotations

import contextlib
import logging
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister_shared.errors import DataRefused

MOST = 2**29
"""Voxels of one file."""


def nifti(path: Path, dimensions: int) -> NDArray[np.float32]:
    """[*its own size], or [channels, *its own size] where the file has several; scaled by its slope and intercept.

    The axes are brought into one order for every hospital, that of a DICOM series of axial slices: from the feet to
    the head, from the front to the back, from the patient's right to the left. A plan of two ``dimensions`` gets the
    one slice that there is.

    Raises:
        DataRefused: it is no NIfTI file, or has other dimensions.
    """
    try:
        with warnings.catch_warnings(), _silence():
            import nibabel as nib

            warnings.simplefilter("ignore")
            image: Any = nib.load(path)  # type: ignore[attr-defined]
            if not 0 < int(np.prod(image.shape)) <= MOST:
                raise DataRefused("a volume of an impossible size", mend="Export it again.")
            if len(image.shape) > 2:
                image = nib.as_closest_canonical(image)  # type: ignore[attr-defined]
            read = np.asarray(image.dataobj, dtype=np.float32)
    except (DataRefused, FileNotFoundError, MemoryError):
        raise
    except ModuleNotFoundError:
        mend = "Install it: pip install 'cloister[imaging]'."
        raise DataRefused("a NIfTI volume, and no reader of it here", mend=mend) from None
    except Exception as error:  # nibabel's own errors, zlib's, numpy's: each may quote the header
        whole = "a compressed file that is cut off" if isinstance(error, (EOFError, zlib.error)) else ""
        raise DataRefused(whole or "a file that is no NIfTI volume", mend="Export it again.") from None
    while read.ndim > 3 and read.shape[-1] == 1:
        read = read[..., 0]
    # Canonical axes rise to the right, the front and the head.
    read = np.moveaxis(read[::-1, ::-1], (0, 1, 2), (2, 1, 0)) if read.ndim >= 3 else read.T
    if read.ndim == 4:
        read = np.moveaxis(read, -1, 0)
    if dimensions == 2 and read.ndim == 3 and read.shape[0] == 1:
        read = read[0]
    return np.ascontiguousarray(read)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    logger = logging.getLogger("nibabel")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
