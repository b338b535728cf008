"""Terms of a schema that are sound alone and impossible together. Pure: a schema in, the broken rules out."""

from __future__ import annotations

from collections.abc import Iterator

from cloister_shared.schema import (
    Binary,
    BooleanFeature,
    CategoryFeature,
    Channel,
    Classes,
    Effect,
    ImageFeature,
    Labels,
    Mask,
    NumberFeature,
    Quantity,
    Schema,
    SeriesFeature,
    Survival,
    VectorFeature,
    target_columns,
)
from cloister_shared.terms import Broken, Path


def broken_schema(schema: Schema) -> Iterator[Broken]:
    """Every rule that the schema breaks; paths begin below ``table``."""
    names = [feature.name for feature in schema.features]
    columns, seen = target_columns(schema.target), list[str]()
    for at, feature in enumerate(schema.features):
        path: Path = ("features", at)
        if feature.name in names[:at]:
            yield Broken((*path, "name"), "names a feature a second time", "Give each feature once.")
        if feature.name in (*columns, schema.patient_id):
            yield Broken(
                (*path, "name"),
                "is the target or the patient's id as well",
                "Take it out of the features: it would tell the model the answer or who the patient is.",
            )
        if feature.name.removesuffix(" is missing") in names and feature.name.endswith(" is missing"):
            yield Broken((*path, "name"), "is what the indicator of another feature is called", "Give it another name.")
        match feature:
            case NumberFeature() | CategoryFeature() | BooleanFeature():
                yield from _scalar(feature, path)
            case VectorFeature():
                yield from _quantity(feature, path)
            case SeriesFeature(channels=channels):
                for number, channel in enumerate(channels):
                    yield from _quantity(channel, (*path, "channels", number))
                    # A hospital says of a name what it is called and measured in: of one thing, not of two.
                    if channel.name in (*names, *seen):
                        yield Broken(
                            (*path, "channels", number, "name"),
                            "is the name of another channel or feature",
                            "Give each a name of its own; site.yaml may map both to one name there.",
                        )
                    seen.append(channel.name)
            case ImageFeature(range=(low, high)) if not low < high:
                yield Broken((*path, "range"), "does not rise", "Write the lower bound first.")
            case _:
                pass
    if schema.patient_id in columns:
        yield Broken(("patient_id",), "is the target as well", "Name the column that tells patients apart.")
    yield from _target(schema)


def _scalar(feature: NumberFeature | CategoryFeature | BooleanFeature, path: Path) -> Iterator[Broken]:
    if feature.missing in ("fill", "indicator") and feature.fill is None:
        yield Broken((*path, "missing"), "needs a value to put in", "Add fill: VALUE beside it.")
    if feature.missing in ("refuse", "drop") and feature.fill is not None:
        yield Broken(
            (*path, "fill"),
            f"is never used with missing: {feature.missing}",
            "Write missing: fill, or take fill out.",
        )
    match feature:
        case NumberFeature(range=(low, high)):
            if low < high and feature.fill is not None and not low <= feature.fill <= high:
                yield Broken((*path, "fill"), "lies outside the range", "Fill with a plausible value.")
            yield from _quantity(feature, path)
        case CategoryFeature():
            if len({str(category) for category in feature.categories}) < len(feature.categories):
                yield Broken((*path, "categories"), "holds a category twice", "Give each category once.")
            if feature.fill is not None and feature.fill not in feature.categories:
                yield Broken((*path, "fill"), "is not one of the categories", "Fill with one of them.")
        case BooleanFeature():
            pass


def _quantity(quantity: NumberFeature | VectorFeature | Channel | Quantity, path: Path) -> Iterator[Broken]:
    low, high = quantity.range
    if not low < high:
        yield Broken((*path, "range"), "does not rise", "Write the lower bound first.")
    if (quantity.mean is None) != (quantity.sd is None):
        missing = "sd" if quantity.sd is None else "mean"
        yield Broken(path, f"gives mean or sd alone ({missing} is missing)", "Give both or neither.")


def _target(schema: Schema) -> Iterator[Broken]:
    path: Path = ("target",)
    match schema.target:
        case Binary(positive=positive, negative=negative) if str(positive) == str(negative):
            yield Broken((*path, "negative"), "equals positive", "Name the two different outcomes of the target.")
        case Classes(classes=names) if len(set(map(str, names))) < len(names):
            yield Broken((*path, "classes"), "holds a class twice", "Give each class once.")
        case Labels(labels=names) if len(set(names)) < len(names):
            yield Broken((*path, "labels"), "holds a label twice", "Give each label once.")
        case Quantity() as quantity:
            yield from _quantity(quantity, path)
        case Survival(cuts=cuts, event=event, name=name):
            if list(cuts) != sorted(set(cuts)):
                yield Broken((*path, "cuts"), "do not rise", "Write the end of each period, the earliest first.")
            if event == name:
                yield Broken((*path, "event"), "is the column of times as well", "Name that of who had the event.")
        case Effect(range=(low, high), name=name, treatment=treatment):
            if not low < high:
                yield Broken((*path, "range"), "does not rise", "Write the lower bound first.")
            if treatment == name:
                yield Broken((*path, "treatment"), "is the outcome as well", "Name the column of who was treated.")
        case Mask(of=picture):
            if picture not in [f.name for f in schema.features if isinstance(f, ImageFeature)]:
                yield Broken((*path, "of"), "is no feature of kind image", "Name the picture that the mask is of.")
        case _:
            pass
