"""ComBat by sums: what a hospital adds up to take site effects out of number features, and what leaves it.

Johnson, Li and Rabinovic 2007; from sums over hospitals, Chen et al. 2022. A value, scaled to [-1, 1] on the ``window``
that the plan gives it, is ``intercept + slopes · x + scale * (gamma + delta * e)``: x are the covariates that the plan
keeps, gamma and delta what one hospital adds and multiplies. A hospital releases its ``Moments`` once. With
differential privacy they are noisy before anybody uses them, the hospital itself included, so that what follows is
post-processing: it sends them ``centred`` about its own means, which add up to all that the common constants need,
and it finds its own gamma and delta in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement

import numpy as np
from numpy.typing import NDArray

from cloister_shared.inputs import Column, columns, numbers
from cloister_shared.plan import StudyPlan
from cloister_shared.schema import CategoryFeature, NumberFeature

Array = NDArray[np.float64]
Constants = tuple[tuple[float, ...], ...]
"""Of each number feature, in its unit: centre and scale; with covariates, then an intercept and their slopes."""


@dataclass(frozen=True)
class Moments:
    """Sums over rows. ``centred`` ones of several hospitals may be added; as they are, they are of one hospital."""

    whole: float
    """Rows, or patients where these are the unit."""
    count: Array
    """The same of each feature, without gaps."""
    y: Array
    yy: Array
    x: Array
    xx: Array
    """[covariates, covariates]"""
    xy: Array
    """[covariates, features]"""


def harmonised(plan: StudyPlan) -> tuple[NumberFeature, ...]:
    """The number features whose site effects are taken out: all but those that the plan keeps."""
    return tuple(feature for feature in numbers(plan.table) if feature.name not in plan.keep)


def covariates(plan: StudyPlan) -> tuple[Column, ...]:
    """The inputs that stand for what the plan keeps; of categories all but the first, which the others differ from."""
    first = {f.name: f.categories[0] for f in plan.table.features if isinstance(f, CategoryFeature)}
    return tuple(
        column
        for column in columns(plan.table)
        if column.feature in plan.keep
        and not column.absent
        and (column.category is None or column.category != first[column.feature])
    )


def window(feature: NumberFeature) -> tuple[float, float]:
    """What sums clip a value to, so that noise can cover it: the range, or five ``sd`` about the ``mean`` within it.

    Noise is in units of the window's half: a creatinine that could be 15 and seldom passes 3 needs such a window.
    """
    low, high = feature.range
    if feature.mean is None or feature.sd is None:
        return low, high
    return max(low, feature.mean - 5 * feature.sd), min(high, feature.mean + 5 * feature.sd)


def names(plan: StudyPlan) -> tuple[str, ...]:
    """Of each sum, in order."""
    features, kept = [feature.name for feature in harmonised(plan)], [column.name for column in covariates(plan)]
    return (
        "count",
        *(f"count {features[at]}" for at in gaps(plan)),
        *(f"sum {name}" for name in features),
        *(f"square {name}" for name in features),
        *(f"sum {name}" for name in kept),
        *(f"product {one} * {other}" for one, other in combinations_with_replacement(kept, 2)),
        *(f"product {one} * {name}" for one in kept for name in features),
    )


def gaps(plan: StudyPlan) -> list[int]:
    """Which of the harmonised features may be missing."""
    return [at for at, feature in enumerate(harmonised(plan)) if feature.missing == "indicator"]


def sensitivity(plan: StudyPlan) -> float:
    """How far one unit moves all these sums together, in ℓ².

    Values lie in [-1, 1], and of a kept feature's inputs one at most is not 0. So a unit moves each count, sum, square
    and product by 1 at most, and of the products no more than if each kept feature had one input.
    """
    features, kept = len(harmonised(plan)), len(plan.keep)
    return (1 + len(gaps(plan)) + 2 * features + kept + kept * (kept + 1) / 2 + kept * features) ** 0.5


def read(plan: StudyPlan, said: Mapping[str, float | None]) -> Moments:
    """The sums, from their ``names``."""
    many, kept, gapped = len(harmonised(plan)), len(covariates(plan)), gaps(plan)
    values = np.array([said.get(name) or 0.0 for name in names(plan)])
    ends = np.cumsum([1, len(gapped), many, many, kept, kept * (kept + 1) // 2])
    whole, counted, y, yy, x, products, xy = np.split(values, ends)
    count, xx = np.full(many, whole[0]), np.zeros((kept, kept))
    count[gapped] = counted
    xx[np.triu_indices(kept)] = products
    return Moments(float(whole[0]), count, y, yy, x, xx + np.triu(xx, 1).T, xy.reshape(kept, many))


def written(plan: StudyPlan, moments: Moments) -> dict[str, float]:
    """The same, by name."""
    products = moments.xx[np.triu_indices(len(moments.x))]
    parts = ([moments.whole], moments.count[gaps(plan)], moments.y, moments.yy, moments.x, products, moments.xy.ravel())
    return dict(zip(names(plan), np.concatenate(parts).tolist(), strict=True))


def centred(moments: Moments, noise: float) -> Moments:
    """One hospital's squares and products about its own means.

    ``noise`` is its standard deviation on each sum: the square of a noisy sum is too large by the noise's variance.
    """
    count, whole = np.maximum(moments.count, 1.0), max(moments.whole, 1.0)
    x = np.outer(moments.x, moments.x) - noise**2 * np.eye(len(moments.x))
    return replace(
        moments,
        yy=moments.yy - (moments.y**2 - noise**2) / count,
        xx=moments.xx - x / whole,
        xy=moments.xy - np.outer(moments.x, moments.y) / whole,
    )
