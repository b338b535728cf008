"""Terms of ComBat that cannot be. Pure: a plan in, the broken rules out."""

from __future__ import annotations

from collections.abc import Iterator

from cloister_shared import combat
from cloister_shared.plan import StudyPlan
from cloister_shared.schema import BooleanFeature, CategoryFeature, NumberFeature, target_columns
from cloister_shared.terms import Broken

_MOST = 12
"""Inputs that may be kept: their products are released too, and the noise grows with these."""


def broken_harmonisation(plan: StudyPlan) -> Iterator[Broken]:
    """Every rule that ``normalisation`` breaks with ``combat``; none of another method."""
    if not plan.harmonises:
        return
    faults = [*_kept(plan), *_gaps(plan)]
    yield from faults
    if faults:
        return
    if not combat.harmonised(plan):
        yield Broken(
            ("normalisation", "keep"),
            "holds every number feature, so that there is nothing to harmonise",
            "Keep fewer, or write method: federated.",
        )
    if len(combat.covariates(plan)) > _MOST:
        yield Broken(
            ("normalisation", "keep"),
            f"stands for {len(combat.covariates(plan))} inputs, and the products of more than {_MOST} are mostly noise",
            "Keep features with fewer categories, or fewer features.",
        )


def _kept(plan: StudyPlan) -> Iterator[Broken]:
    keep, features = plan.keep, {feature.name: feature for feature in plan.table.features}
    named = [n for n, f in features.items() if isinstance(f, NumberFeature | BooleanFeature | CategoryFeature)]
    for at, name in enumerate(keep):
        path, feature = ("normalisation", "keep", at), features.get(name)
        if name in target_columns(plan.table.target):
            yield Broken(path, "is the outcome, which nobody knows of the patients that are scored", "Take it out.")
        elif name in keep[:at]:
            yield Broken(path, "is there twice", "Take one out.")
        elif name not in named:
            yield Broken(
                path,
                "is no feature of the table" if feature is None else f"is a {feature.kind}, no single value",
                f"Write one of {', '.join(named[:8])}.",
            )
        elif feature is not None and getattr(feature, "missing", "refuse") in ("fill", "indicator"):
            yield Broken(
                path,
                "may be missing, and then what follows from it is unknown",
                "Write missing: refuse or missing: drop for that feature, or take it out of keep.",
            )


def _gaps(plan: StudyPlan) -> Iterator[Broken]:
    """A gap that was filled is no measurement: no hospital added anything to it."""
    keep = plan.keep
    for at, feature in enumerate(plan.table.features):
        if not isinstance(feature, NumberFeature) or feature.name in keep:
            continue
        if feature.missing == "fill":
            yield Broken(
                ("table", "features", at, "missing"),
                "puts in values that combat would take for measured ones",
                "Write missing: indicator, refuse or drop.",
            )
        elif feature.missing == "indicator" and keep:
            yield Broken(
                ("table", "features", at, "missing"),
                "leaves gaps, of which combat with normalisation.keep would need every covariate's sums apart",
                "Write missing: refuse or drop, or take keep out.",
            )
