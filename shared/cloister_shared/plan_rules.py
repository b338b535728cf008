"""Terms that are sound alone and impossible together. Pure: a plan in, the broken rules out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cloister_shared.plan import (
    BooleanFeature,
    CategoryFeature,
    FedAdam,
    Krum,
    Mechanism,
    Median,
    NumberFeature,
    Scaffold,
    StudyPlan,
    TrimmedMean,
)

Path = tuple[str | int, ...]

_NOISE_UNKNOWN = (Mechanism.NONE, Mechanism.SITE)
"""No noise, or one that each hospital fits to its own number of rows."""


@dataclass(frozen=True)
class Broken:
    """One fault: the path of the key, what is wrong with it, and what to write instead."""

    path: Path
    wrong: str
    mend: str


def broken(plan: StudyPlan) -> Iterator[Broken]:
    """Every rule that the plan breaks."""
    yield from _table(plan)
    yield from _normalisation(plan)
    yield from _privacy(plan)
    yield from _strategy(plan)
    yield from _sum(plan)
    yield from _personalisation(plan)
    if plan.evaluation.split_column and plan.evaluation.holdout:
        yield Broken(
            ("evaluation", "holdout"),
            "goes against split_column, which already splits the rows",
            "Keep one of the two.",
        )
    table = plan.table
    if plan.evaluation.split_column in {table.target.name, table.patient_id, *(f.name for f in table.features)} - {
        None
    }:
        yield Broken(
            ("evaluation", "split_column"),
            "is a feature, the target or the patient's id as well",
            "Name a column of its own, or write holdout.",
        )


def _table(plan: StudyPlan) -> Iterator[Broken]:
    names = [feature.name for feature in plan.table.features]
    for at, feature in enumerate(plan.table.features):
        path: Path = ("table", "features", at)
        if feature.name in names[:at]:
            yield Broken((*path, "name"), "names a feature a second time", "Give each feature once.")
        if feature.name in (plan.table.target.name, plan.table.patient_id):
            yield Broken(
                (*path, "name"),
                "is the target or the patient's id as well",
                "Take it out of the features: it would tell the model the answer or who the patient is.",
            )
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
                if not low < high:
                    yield Broken((*path, "range"), "does not rise", "Write the lower bound first.")
                elif feature.fill is not None and not low <= feature.fill <= high:
                    yield Broken((*path, "fill"), "lies outside the range", "Fill with a plausible value.")
                if (feature.mean is None) != (feature.sd is None):
                    missing = "sd" if feature.sd is None else "mean"
                    yield Broken(path, f"gives mean or sd alone ({missing} is missing)", "Give both or neither.")
            case CategoryFeature():
                if len({str(category) for category in feature.categories}) < len(feature.categories):
                    yield Broken((*path, "categories"), "holds a category twice", "Give each category once.")
                if feature.fill is not None and feature.fill not in feature.categories:
                    yield Broken((*path, "fill"), "is not one of the categories", "Fill with one of them.")
            case BooleanFeature():
                pass
    if plan.table.target.name == plan.table.patient_id:
        yield Broken(("table", "patient_id"), "is the target as well", "Name the column that tells patients apart.")
    if str(plan.table.target.positive) == str(plan.table.target.negative):
        yield Broken(
            ("table", "target", "negative"), "equals positive", "Name the two different outcomes of the target."
        )


def _normalisation(plan: StudyPlan) -> Iterator[Broken]:
    terms = plan.normalisation
    if terms.epsilon_share is not None and not plan.private:
        yield Broken(("normalisation", "epsilon_share"), "means nothing with mechanism none", "Take it out.")
    elif terms.epsilon_share is not None and terms.method != "federated":
        yield Broken(
            ("normalisation", "epsilon_share"),
            f"means nothing with method {terms.method}",
            "Write method: federated, or take it out.",
        )
    if terms.method == "federated" and not any(isinstance(f, NumberFeature) for f in plan.table.features):
        yield Broken(("normalisation", "method"), "has no number feature to take statistics of", "Write method: plan.")


def _privacy(plan: StudyPlan) -> Iterator[Broken]:
    terms = plan.privacy
    given = {
        "unit": terms.unit,
        "epsilon": terms.epsilon,
        "delta": terms.delta,
        "clip_norm": terms.clip_norm,
    }
    if terms.mechanism is Mechanism.NONE:
        for key, value in given.items():
            if value is not None:
                yield Broken(
                    ("privacy", key), "means nothing with mechanism none", "Take it out, or write mechanism: site."
                )
        return
    for key, value in given.items():
        if value is None:
            yield Broken(("privacy",), f"lacks {key}, without which epsilon has no meaning", f"Add {key}.")
    if terms.delta is not None and terms.delta * plan.cohort.min_patients >= 1:
        yield Broken(
            ("privacy", "delta"),
            f"is not below 1/min_patients ({1 / plan.cohort.min_patients:.2g}), so it would allow a patient's"
            " record to be published outright",
            "Write a delta far below that, such as 1e-5.",
        )
    if plan.task.norm == "batch":
        yield Broken(
            ("task", "norm"),
            "mixes rows within a batch and keeps un-noised means, so no per-row clip holds under DP",
            "Write norm: layer, norm: group or norm: none.",
        )
    if plan.normalisation.method == "site":
        yield Broken(
            ("normalisation", "method"),
            "lets every row move every other row's inputs, so no per-row clip holds under DP",
            "Write method: plan or method: federated.",
        )
    if plan.personalisation.fine_tune_steps:
        yield Broken(
            ("personalisation", "fine_tune_steps"),
            "would report metrics of a model trained without noise, which epsilon does not cover",
            "Write 0, or mechanism: none.",
        )


def _strategy(plan: StudyPlan) -> Iterator[Broken]:
    strategy, cohort = plan.strategy, plan.cohort
    robust = isinstance(strategy, TrimmedMean | Median | Krum)
    if robust and plan.aggregation.secure_sum:
        yield Broken(
            ("strategy", "name"),
            "compares the hospitals' updates one by one, which the secure sum hides",
            "Write strategy fedavg, or aggregation.secure_sum: false.",
        )
    if isinstance(strategy, TrimmedMean) and cohort.min_sites <= 2 * strategy.trim:
        yield Broken(
            ("strategy", "trim"),
            f"leaves nothing of {cohort.min_sites} hospitals",
            f"Raise cohort.min_sites above {2 * strategy.trim}, or trim less.",
        )
    if isinstance(strategy, Krum) and cohort.min_sites < 2 * strategy.hostile + 3:
        yield Broken(
            ("strategy", "hostile"),
            f"needs at least {2 * strategy.hostile + 3} hospitals, and cohort.min_sites is {cohort.min_sites}",
            "Raise cohort.min_sites or lower hostile.",
        )
    if isinstance(strategy, Scaffold) and (plan.training.optimizer != "sgd" or plan.training.momentum):
        yield Broken(
            ("strategy", "name"),
            "corrects plain SGD steps and no others",
            "Write training.optimizer: sgd with momentum: 0.",
        )
    if isinstance(strategy, FedAdam) and strategy.correct_noise and plan.privacy.mechanism in _NOISE_UNKNOWN:
        yield Broken(
            ("strategy", "correct_noise"),
            f"needs the size of the noise in the mean update, which the plan does not tell with mechanism"
            f" {plan.privacy.mechanism}",
            "Take it out, or write mechanism: shared.",
        )
    if plan.training.optimizer == "adam" and plan.training.momentum:
        yield Broken(("training", "momentum"), "is a term of sgd, not of adam", "Take it out.")


def _sum(plan: StudyPlan) -> Iterator[Broken]:
    terms, cohort = plan.aggregation, plan.cohort
    if cohort.max_sites < cohort.min_sites:
        yield Broken(
            ("cohort", "max_sites"), f"is below min_sites ({cohort.min_sites})", "Raise it, or lower min_sites."
        )
    if isinstance(plan.strategy, TrimmedMean | Median | Krum):
        return  # nothing is added up
    if terms.fraction_bits is not None and plan.could_wrap(terms.fraction_bits):
        yield Broken(
            ("aggregation", "fraction_bits"),
            f"lets a sum over {cohort.max_sites} hospitals of updates up to {terms.bound:g} wrap in {terms.bits} bits",
            "Take it out, so that the most that fits is used; or lower bound.",
        )
    elif terms.fraction_bits is not None and terms.bound * 2.0**terms.fraction_bits < 128:
        yield Broken(
            ("aggregation", "fraction_bits"),
            f"leaves fewer than 128 steps from 0 to {terms.bound:g}",
            "Take it out, so that the most that fits is used.",
        )
    steps = terms.bound * 2.0**plan.fraction_bits / cohort.max_sites
    if terms.weights == "rows" and steps * cohort.min_patients / cohort.max_rows < 1024:
        yield Broken(
            ("cohort", "max_rows"),
            f"is so far above min_patients ({cohort.min_patients}) that a small hospital's update would be rounded"
            " away, and the sum be a large one's alone",
            f"Write the most rows that a hospital has, up to {int(steps * cohort.min_patients / 1024):,};"
            " or weights: equal.",
        )


def _personalisation(plan: StudyPlan) -> Iterator[Broken]:
    task = plan.task
    if task.model == "logistic" and task.hidden:
        yield Broken(("task", "hidden"), "belongs to model mlp", "Write model: mlp, or take hidden out.")
    if task.model == "logistic" and task.norm != "none":
        yield Broken(("task", "norm"), "belongs to model mlp", "Write model: mlp, or take norm out.")
    if task.model == "logistic" and task.standardise:
        yield Broken(("task", "standardise"), "belongs to model mlp", "Write model: mlp, or take standardise out.")
    if task.norm == "group" and (odd := [units for units in task.hidden if units % 8]):
        yield Broken(
            ("task", "norm"),
            f"cannot part {odd[0]} units into groups of eight",
            "Write hidden widths such as 16 or 64.",
        )
    if task.model == "mlp" and not task.hidden:
        yield Broken(("task", "model"), "needs the width of its hidden layers", "Add hidden: [64].")
    depth = len(task.hidden)
    layers = [f"hidden_{i}" for i in range(depth)] + ["head"]
    if task.norm != "none":
        layers += [f"norm_{i}" for i in range(depth)]
    local = plan.personalisation.local_layers
    for at, prefix in enumerate(local):
        if not any(layer.startswith(prefix) for layer in layers):
            yield Broken(
                ("personalisation", "local_layers", at),
                "is no layer of this model",
                f"Write one of {', '.join(sorted(layers))}, or the start of one.",
            )
    if layers and all(any(layer.startswith(prefix) for prefix in local) for layer in layers):
        yield Broken(
            ("personalisation", "local_layers"), "keeps every layer at the hospital", "Leave one to be shared."
        )
