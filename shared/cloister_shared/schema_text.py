"""A schema in words, for the people who approve a plan."""

from __future__ import annotations

from collections import Counter

from cloister_shared.schema import (
    Binary,
    BooleanFeature,
    CategoryFeature,
    Classes,
    Effect,
    Feature,
    ImageFeature,
    Itself,
    Labels,
    Mask,
    MoleculeFeature,
    NumberFeature,
    Quantity,
    Schema,
    SeriesFeature,
    Shaped,
    Survival,
    Target,
    TextFeature,
    VectorFeature,
    Window,
)

_SHOWN = 8
"""Names of a list that are written out."""


def predicts(schema: Schema) -> str:
    """The outcome, and from how many features of which kinds."""
    features = schema.features
    kinds = Counter("yes/no" if feature.kind == "boolean" else feature.kind for feature in features)
    order = ("number", "category", "yes/no")
    ranked = sorted(kinds, key=lambda kind: order.index(kind) if kind in order else len(order))
    shown = ", ".join(f"{kinds[kind]} {kind}" for kind in ranked)
    many = f"{len(features)} feature{'' if len(features) == 1 else 's'}"
    match schema.target:
        case Itself():
            return f"nothing: learns what is usual of {many} ({shown})"
        case Effect(name=name, treatment=treatment):
            return f"what {treatment} changes of {name} from {many} ({shown})"
        case target:
            return f"{target.name} from {many} ({shown})"


def values(feature: Feature) -> str:
    """Unit and range, or the values that it may have; and of when, where the plan says so."""
    window = None if isinstance(feature, Shaped) else feature.window
    return _values(feature) + _when(window)


def _values(feature: Feature) -> str:
    match feature:
        case NumberFeature(unit=unit, range=(low, high)):
            return f"{unit or 'no unit'}, {low:g} to {high:g}"
        case VectorFeature(length=length, unit=unit, range=(low, high)):
            return f"{length} numbers, {unit or 'no unit'}, {low:g} to {high:g}"
        case CategoryFeature(categories=categories):
            return _listed(list(map(str, categories)))
        case BooleanFeature():
            return "yes or no"
        case SeriesFeature(channels=channels, steps=steps, step_hours=hours):
            return f"{_listed([channel.name for channel in channels])} over {steps} steps of {hours:g} h"
        case ImageFeature(size=size, modality=modality):
            return f"{' x '.join(map(str, size))} pixels{', ' + ' or '.join(modality) if modality else ''}"
        case TextFeature(tokens=tokens):
            return f"up to {tokens} tokens, hashed"
        case MoleculeFeature(encoding=encoding):
            return f"SMILES, as {encoding}"


def outcome(target: Target) -> str:
    """What the outcome may be; and of when, where the plan says so."""
    return _outcome(target) + _when(getattr(target, "window", None))


def _outcome(target: Target) -> str:
    match target:
        case Binary(positive=positive, negative=negative):
            return f"{positive} against {negative}"
        case Classes(classes=names):
            return f"one of {_listed(list(map(str, names)))}"
        case Labels(labels=names):
            return f"any of {_listed(list(names))}"
        case Quantity(unit=unit, range=(low, high)):
            return f"{unit or 'no unit'}, {low:g} to {high:g}"
        case Survival(event=event, cuts=cuts):
            return f"time to {event}, in {len(cuts)} periods up to {cuts[-1]:g}"
        case Mask(of=picture):
            return f"a mask of {picture}"
        case Itself(alarm=alarm):
            return f"what is usual{f'; alarms are held against {alarm}' if alarm else ''}"
        case Effect(treatment=treatment):
            return f"with {treatment} or without"


def _when(window: Window | None) -> str:
    if window is None:
        return ""
    return f"; {f'{window.take} of ' if window.take else ''}{window.since:g} to {window.until:g} h"


def anchored(schema: Schema) -> str:
    """Of which encounters clinical records make a record each."""
    terms = schema.anchor
    said = f"{terms.which} {'' if terms.encounter == 'any' else f'{terms.encounter} '}encounter"
    if terms.ages:
        said += f" at the age of {terms.ages[0]:g} to {terms.ages[1]:g}"
    if terms.having:
        since, until = terms.window.since, terms.window.until
        said += f" with {_listed(list(terms.having))} from {since:g} to {until:g} hours after its start"
    return said


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
