"""One class of several, and any number of labels of several."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cloister_shared.outcomes import binary
from cloister_shared.outcomes.judging import Array, Matrix, Metric, Vector, mean_of, ratio

Logits = NDArray[np.float32]


# --- one of several: y [n], the number of the class; p [n, classes], probabilities ---------------------------------
def chances(output: Logits, y: NDArray[np.float32]) -> tuple[Array, Array]:
    """Classes [n] and their probabilities [n, classes]; where one is no number all are alike."""
    logits = output.astype(np.float64)
    logits = logits - logits.max(axis=1, keepdims=True)
    powers = np.exp(logits)
    p = powers / powers.sum(axis=1, keepdims=True)
    p[np.isnan(p).any(axis=1)] = 1 / p.shape[1]
    return y.astype(np.float64), p


def enough_classes(y: Array, least: int) -> bool:
    """Whether so many rows are of the largest class, and so many of the others."""
    _, counts = np.unique(y, return_counts=True)
    return len(y) > 0 and min(int(counts.max()), len(y) - int(counts.max())) >= least


def _right(y: Array, p: Array) -> Vector:
    return (p.argmax(axis=1) == y).astype(np.float64)


def _in_three(y: Array, p: Array) -> Vector:
    own = np.take_along_axis(p, y.astype(np.int64)[:, None], axis=1)
    return ((p > own).sum(axis=1) < 3).astype(np.float64)


def _surprise(y: Array, p: Array) -> Vector:
    own = np.take_along_axis(p, y.astype(np.int64)[:, None], axis=1)[:, 0]
    return -np.log(np.maximum(own, binary.CLIP))


def macro_f1(y: Array, p: Array, weights: Matrix) -> Vector:
    """F1 of each class by itself, averaged over the classes that are there."""
    said, found = p.argmax(axis=1), list[Vector]()
    for number in range(p.shape[1]):
        true, called = (y == number).astype(np.float64), (said == number).astype(np.float64)
        there = weights @ true
        found.append(np.where(there > 0, ratio(2 * (weights @ (true * called)), there + weights @ called), np.nan))
    return _mean_of_known(np.stack(found))


def macro_auroc(y: Array, p: Array, weights: Matrix) -> Vector:
    """AUROC of each class against the others, averaged over the classes for which there is one."""
    return _mean_of_known(
        np.stack(
            [binary.auroc((y == number).astype(np.float64), p[:, number], weights) for number in range(p.shape[1])]
        )
    )


CLASSES: dict[str, Metric] = {
    "accuracy": mean_of(_right),
    "macro_f1": macro_f1,
    "macro_auroc": macro_auroc,
    "top_3": mean_of(_in_three),
    "log_loss": mean_of(_surprise),
}


# --- any number of several: y [n, labels], 0 or 1; p [n, labels] ---------------------------------------------------
def risks(output: Logits, y: NDArray[np.float32]) -> tuple[Array, Array]:
    """Labels and their probabilities, [n, labels] each."""
    p = binary.sigmoid(output.astype(np.float64))
    return y.astype(np.float64), np.where(np.isnan(p), 0.5, p)


def enough_labels(y: Array, least: int) -> bool:
    """Whether so many rows carry a label, and so many a label less than all."""
    return int((y.sum(axis=1) > 0).sum()) >= least and int((y.sum(axis=1) < y.shape[1]).sum()) >= least


def micro_f1(y: Array, p: Array, weights: Matrix) -> Vector:
    """F1 over all labels of all patients together, called at one half."""
    called = p >= 0.5
    hits = weights @ (y * called).sum(axis=1)
    return ratio(2 * hits, weights @ (y.sum(axis=1) + called.sum(axis=1)))


def label_f1(y: Array, p: Array, weights: Matrix) -> Vector:
    """F1 of each label by itself, averaged over the labels that are there."""
    called = (p >= 0.5).astype(np.float64)
    there = weights @ y
    f1 = np.divide(2 * (weights @ (y * called)), there + weights @ called, out=np.zeros_like(there), where=there > 0)
    return _mean_of_known(np.where(there > 0, f1, np.nan).T)


def label_auroc(y: Array, p: Array, weights: Matrix) -> Vector:
    """AUROC of each label by itself, averaged over the labels for which there is one."""
    return _mean_of_known(np.stack([binary.auroc(y[:, at], p[:, at], weights) for at in range(y.shape[1])]))


def _at_five(y: Array, p: Array) -> Vector:
    most = min(5, y.shape[1])
    first = np.argpartition(-p, most - 1, axis=1)[:, :most]
    return np.take_along_axis(y, first, axis=1).sum(axis=1) / most


LABELS: dict[str, Metric] = {
    "macro_auroc": label_auroc,
    "micro_f1": micro_f1,
    "macro_f1": label_f1,
    "precision_at_5": mean_of(_at_five),
}


def _mean_of_known(found: Matrix) -> Vector:
    """Mean over the first axis of what is a number; NaN where nothing is."""
    known = ~np.isnan(found)
    return ratio(np.where(known, found, 0.0).sum(axis=0), known.sum(axis=0).astype(np.float64))
