"""A lesion in a picture or a volume.

Truth is float [n]: how many lesions a picture has. Prediction is float [n, 4]: Dice, the 95 % Hausdorff distance in
pixels, how many of the lesions were met, and how many were drawn where there is none.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cloister_shared.outcomes.judging import Array, Matrix, Metric, Vector, mean_of, ratio

Drawn = NDArray[np.bool_]


def seen(shape: tuple[int, ...]) -> Callable[[NDArray[np.float32], NDArray[np.float32]], tuple[Array, Array]]:
    """For pictures of this shape: logits and masks, [n, pixels] each, to truth and prediction."""

    def compared(output: NDArray[np.float32], y: NDArray[np.float32]) -> tuple[Array, Array]:
        true = y.reshape(len(y), *shape) > 0.5
        drawn = output.reshape(len(y), *shape) > 0
        each = [_compared(a, b) for a, b in zip(true, drawn, strict=True)]
        found = np.array(each, dtype=np.float64).reshape(len(y), 5)
        return found[:, 0], found[:, 1:]

    return compared


def enough(y: Array, least: int) -> bool:
    """Whether there are so many pictures."""
    return len(y) >= least


def lesion_sensitivity(y: Array, p: Array, weights: Matrix) -> Vector:
    """The share of lesions of which a part was drawn."""
    return ratio(weights @ p[:, 2], weights @ y)


def _dice(y: Array, p: Array) -> Vector:
    return p[:, 0]


def _distance(y: Array, p: Array) -> Vector:
    return p[:, 1]


def _false(y: Array, p: Array) -> Vector:
    return p[:, 3]


METRICS: dict[str, Metric] = {
    "dice": mean_of(_dice),
    "hausdorff_95": mean_of(_distance),
    "lesion_sensitivity": lesion_sensitivity,
    "false_lesions": mean_of(_false),
}


def _compared(true: Drawn, drawn: Drawn) -> tuple[float, float, float, float, float]:
    """Lesions, Dice, distance, met, false."""
    from scipy import ndimage

    size = int(true.sum() + drawn.sum())
    dice = 2 * int((true & drawn).sum()) / size if size else 1.0
    lesions, count = ndimage.label(true)
    blobs, said = ndimage.label(drawn)
    met = len(np.unique(lesions[drawn & true]))
    false = said - len(np.unique(blobs[drawn & true]))
    return count, dice, _hausdorff(true, drawn), met, false


def _hausdorff(true: Drawn, drawn: Drawn) -> float:
    """The distance between the outlines that 95 % of their pixels are within, taken from both (Huttenlocher 1993).

    NaN where one of them is empty.
    """
    from scipy import ndimage

    if not true.any() or not drawn.any():
        return float("nan")
    edges = [picture & ~ndimage.binary_erosion(picture) for picture in (true, drawn)]
    away = [ndimage.distance_transform_edt(~edge) for edge in edges]
    both = [np.quantile(away[1][edges[0]], 0.95), np.quantile(away[0][edges[1]], 0.95)]
    return float(max(both))
