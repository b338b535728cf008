"""The columns that a table's features become, in one order for every hospital and the coordinator."""

from __future__ import annotations

from dataclasses import dataclass

from cloister_shared.plan import BooleanFeature, Category, CategoryFeature, NumberFeature, Schema


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


def columns(schema: Schema) -> tuple[Column, ...]:
    """The model's inputs in order: each feature's value or categories, then whether it was missing."""
    made: list[Column] = []
    for feature in schema.features:
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


def numbers(schema: Schema) -> tuple[NumberFeature, ...]:
    """The features that are centred and scaled, in order."""
    return tuple(feature for feature in schema.features if isinstance(feature, NumberFeature))


def plan_constants(feature: NumberFeature) -> tuple[float, float]:
    """Centre and scale without touching data: the plan's mean and sd, or middle and quarter of the range.

    With the range, inputs lie in [-2, 2], as a standard score mostly does.
    """
    if feature.mean is not None and feature.sd is not None:
        return feature.mean, feature.sd
    low, high = feature.range
    return (low + high) / 2, (high - low) / 4
