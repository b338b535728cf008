"""The inputs that a schema's features become: one row of numbers, in one order for every hospital and the coordinator.

First the ``columns``, one for each number, yes/no and category, then the ``blocks``, one for each series, image, text
or molecule.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

from cloister_shared.schema import (
    ATOM,
    BooleanFeature,
    CategoryFeature,
    Channel,
    Feature,
    ImageFeature,
    MoleculeFeature,
    NumberFeature,
    Quantity,
    Schema,
    SeriesFeature,
    Shaped,
    TextFeature,
    VectorFeature,
)
from cloister_shared.terms import Category


@dataclass(frozen=True)
class Column:
    """One input of the model.

    ``category`` is set for one value of a category feature; ``absent`` marks the 0/1 column that says that the
    value was missing. ``centre`` and ``scale`` are the plan's constants: input = (value - centre) / scale.
    """

    feature: str
    kind: str
    category: Category | None = None
    absent: bool = False
    centre: float = 0.0
    scale: float = 1.0

    @property
    def name(self) -> str:
        """As a reader sees it."""
        if self.absent:
            return f"{self.feature} is missing"
        return self.feature if self.category is None else f"{self.feature} = {self.category}"


@dataclass(frozen=True)
class Block:
    """The inputs that one feature of many values becomes: ``size`` numbers from number ``start`` on."""

    feature: Shaped
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """How many numbers."""
        return prod(self.shape)


def columns(schema: Schema) -> tuple[Column, ...]:
    """The first inputs, in order: each feature's value or categories, then whether it was missing."""
    return _columns(schema.features)


@lru_cache(maxsize=64)  # a vector has thousands, and every message asks for them
def _columns(features: tuple[Feature, ...]) -> tuple[Column, ...]:
    made: list[Column] = []
    for feature in _scalars(features):
        match feature:
            case NumberFeature():
                centre, scale = plan_constants(feature)
                made.append(Column(feature.name, "number", centre=centre, scale=scale))
            case BooleanFeature():
                made.append(Column(feature.name, "boolean"))
            case CategoryFeature():
                made += [Column(feature.name, "category", category) for category in feature.categories]
        if feature.missing == "indicator":
            made.append(Column(feature.name, feature.kind, absent=True))
    return tuple(made)


def blocks(schema: Schema) -> tuple[Block, ...]:
    """The inputs after the columns, in the order of the features."""
    made: list[Block] = []
    start = len(columns(schema))
    for feature in schema.features:
        if isinstance(feature, Shaped):
            made.append(block := Block(feature, _shape(feature), start))
            start += block.size
    return tuple(made)


def width(schema: Schema) -> int:
    """How many numbers a record's inputs are."""
    return len(columns(schema)) + sum(block.size for block in blocks(schema))


def scalars(schema: Schema) -> tuple[NumberFeature | CategoryFeature | BooleanFeature, ...]:
    """The features that are one value each, in order; a vector is so many numbers."""
    return _scalars(schema.features)


@lru_cache(maxsize=64)
def _scalars(features: tuple[Feature, ...]) -> tuple[NumberFeature | CategoryFeature | BooleanFeature, ...]:
    made: list[NumberFeature | CategoryFeature | BooleanFeature] = []
    for feature in features:
        if isinstance(feature, VectorFeature):
            terms = feature.model_dump(exclude={"kind", "name", "length", "code", "window"})
            made += [NumberFeature(kind="number", name=f"{feature.name}_{at}", **terms) for at in range(feature.length)]
        elif not isinstance(feature, Shaped):
            made.append(feature)
    return tuple(made)


def numbers(schema: Schema) -> tuple[NumberFeature, ...]:
    """The features that are centred and scaled, in order."""
    return tuple(feature for feature in scalars(schema) if isinstance(feature, NumberFeature))


def vectors(schema: Schema) -> tuple[slice, ...]:
    """Where among the ``numbers`` each vector's stand."""
    found: list[slice] = []
    at = 0
    for feature in schema.features:
        many = feature.length if isinstance(feature, VectorFeature) else int(isinstance(feature, NumberFeature))
        if isinstance(feature, VectorFeature):
            found.append(slice(at, at + many))
        at += many
    return tuple(found)


def plan_constants(quantity: NumberFeature | Channel | Quantity) -> tuple[float, float]:
    """Centre and scale without touching data: the plan's mean and sd, or middle and quarter of the range.

    With the range, inputs lie in [-2, 2], as a standard score mostly does.
    """
    if quantity.mean is not None and quantity.sd is not None:
        return quantity.mean, quantity.sd
    low, high = quantity.range
    return (low + high) / 2, (high - low) / 4


def _shape(feature: Shaped) -> tuple[int, ...]:
    match feature:
        case SeriesFeature():
            return feature.steps, 2 * len(feature.channels)
        case ImageFeature():
            return feature.channels, *feature.size
        case TextFeature():
            return (feature.tokens,)
        case MoleculeFeature(encoding="graph"):
            return feature.atoms, ATOM + feature.atoms
        case MoleculeFeature():
            return (feature.bits,)
