"""Terms that are sound alone and impossible together. Pure: a plan in, the broken rules out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cloister_shared.combat_rules import broken_harmonisation
from cloister_shared.inputs import numbers
from cloister_shared.plan import FedAdam, FedProx, Krum, Mechanism, Median, Scaffold, StudyPlan, TrimmedMean
from cloister_shared.schema import Binary, ImageFeature, target_columns
from cloister_shared.schema_rules import broken_schema
from cloister_shared.tasks.cox import Cox
from cloister_shared.tasks.synthetic import Synthetic
from cloister_shared.terms import Broken

_NOISE_UNKNOWN = (Mechanism.NONE, Mechanism.SITE)
"""No noise, or one that each hospital fits to its own number of rows."""


def broken(plan: StudyPlan) -> Iterator[Broken]:
    """Every rule that the plan breaks."""
    yield from (_below("table", fault) for fault in broken_schema(plan.table))
    yield from (_below("task", fault) for fault in plan.task.broken(plan.table))
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
    taken = {*target_columns(table.target), table.patient_id, *(feature.name for feature in table.features)}
    if plan.evaluation.split_column in taken - {None}:
        yield Broken(
            ("evaluation", "split_column"),
            "is a feature, the target or the patient's id as well",
            "Name a column of its own, or write holdout.",
        )
    augment = plan.training.augment
    if augment and (augment.shift or augment.flip) and not any(isinstance(f, ImageFeature) for f in table.features):
        yield Broken(("training", "augment"), "moves pictures, and the table has none", "Take out shift and flip.")
    if table.target.kind not in plan.task.answers:
        yield Broken(
            ("table", "target", "kind"),
            f"is no outcome of the task {plan.task.name}",
            f"Write one of {', '.join(plan.task.answers)}, or another task.",
        )


def _below(section: str, fault: Broken) -> Broken:
    return replace(fault, path=(section, *fault.path))


def _normalisation(plan: StudyPlan) -> Iterator[Broken]:
    terms = plan.normalisation
    shares = {"statistics": plan.statistics.epsilon_share, "evaluation": plan.evaluation.epsilon_share}
    shares["readiness"] = plan.readiness.epsilon_share if plan.readiness else None
    for key, share in shares.items():
        if share is not None and not plan.private:
            yield Broken((key, "epsilon_share"), "means nothing with mechanism none", "Take it out.")
    if plan.private and plan.statistics.epsilon_share is not None and not plan.asks_statistics:
        yield Broken(
            ("statistics", "epsilon_share"),
            "is for statistics, and there are none",
            "Write histograms: 10 beside it or normalisation.method: federated, or take it out.",
        )
    if plan.evaluation.epsilon_share is not None and not isinstance(plan.table.target, Binary):
        yield Broken(
            ("evaluation", "epsilon_share"),
            "counts patients by the risk of an outcome that comes or does not",
            "Take it out: metrics are then exact and outside epsilon, and the report says so.",
        )
    if sum(share or 0.0 for share in shares.values()) >= 0.9:
        first = next(key for key, share in shares.items() if share)
        yield Broken((first, "epsilon_share"), "leaves next to nothing of epsilon for training", "Lower the shares.")
    if isinstance(plan.task, Synthetic) and terms.method != "plan":
        yield Broken(
            ("normalisation", "method"),
            "changes the bins in which a generator knows numbers",
            "Write method: plan.",
        )
    if plan.normalises and not numbers(plan.table):
        yield Broken(("normalisation", "method"), "has no number feature to take statistics of", "Write method: plan.")
    else:
        yield from broken_harmonisation(plan)


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
        if plan.training.sample_rate is not None:
            yield Broken(
                ("training", "sample_rate"),
                "is a term of differential privacy, and mechanism is none",
                "Take it out; batch_size says how many rows a step has.",
            )
        if plan.training.augment:
            yield Broken(
                ("training", "augment"),
                "makes copies that one clip covers, and with mechanism none there is no clip",
                "Take it out.",
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
    if terms.unit == "patient" and plan.table.patient_id is None:
        yield Broken(
            ("privacy", "unit"),
            "is the patient, and the table does not say whose a row is",
            "Add table.patient_id; or unit: record, if no patient has two rows.",
        )
    if terms.unit != "patient" and terms.per_patient != "mean":
        yield Broken(("privacy", "per_patient"), f"means nothing with unit {terms.unit}", "Take it out.")
    if plan.training.augment and terms.per_patient == "sum":
        yield Broken(
            ("training", "augment"),
            "makes copies of records, which per_patient: sum would count as further records",
            "Write per_patient: mean, or take augment out.",
        )
    if terms.unit == "site":
        yield from _site_level(plan)
    if plan.shared_noise:
        yield from _shared(plan)
    elif terms.colluding or terms.epsilon_alone is not None:
        key = "colluding" if terms.colluding else "epsilon_alone"
        yield Broken(("privacy", key), "is a term of mechanism shared", "Take it out, or write mechanism: shared.")
    if isinstance(plan.task, Cox):
        yield Broken(
            ("task", "name"),
            "has a loss in which all patients at risk share one denominator, so no per-patient clip holds under DP",
            "Write name: tabular, which learns each period's hazard by itself, or mechanism: none.",
        )
    elif plan.task.mixes_records:
        yield Broken(
            ("task", "norm"),
            "mixes rows within a batch and keeps un-noised means, so no per-row clip holds under DP",
            "Write norm: layer, norm: group or norm: none.",
        )
    if plan.normalisation.method == "site":
        yield Broken(
            ("normalisation", "method"),
            "lets every row move every other row's inputs, so no per-row clip holds under DP",
            "Write method: plan, federated or combat.",
        )
    for key, mend in {"fine_tune_steps": "Write 0", "ditto": "Take it out"}.items():
        if getattr(plan.personalisation, key):
            yield Broken(
                ("personalisation", key),
                "would report metrics of a model trained without noise, which epsilon does not cover",
                f"{mend}, or mechanism: none.",
            )


def _site_level(plan: StudyPlan) -> Iterator[Broken]:
    if plan.training.augment:
        yield Broken(
            ("training", "augment"),
            "makes copies that one patient's clip covers, and with unit site a whole update is clipped instead",
            "Take it out.",
        )
    if plan.training.sample_rate is not None:
        yield Broken(
            ("training", "sample_rate"), "means nothing with unit site, where all rows are one unit", "Take it out."
        )
    if isinstance(plan.strategy, Scaffold):
        yield Broken(
            ("strategy", "name"), "sends a second vector, which unit site does not clip", "Write strategy fedavg."
        )
    counts = {
        ("normalisation", "method"): plan.normalises,
        ("statistics", "histograms"): plan.statistics.histograms is not None,
        ("evaluation", "epsilon_share"): plan.evaluation.epsilon_share is not None,
        ("readiness",): plan.readiness is not None,
    }
    for path, asked in counts.items():
        if asked:
            yield Broken(
                path,
                "sums over rows, and one whole hospital changes such a sum without bound",
                "Write method: plan." if path[0] == "normalisation" else "Take it out.",
            )


def _shared(plan: StudyPlan) -> Iterator[Broken]:
    """Only one linear, noisy, clipped sum a round has the proof (Kairouz et al. 2021)."""
    terms, training = plan.privacy, plan.training
    if not plan.aggregation.secure_sum:
        yield Broken(
            ("aggregation", "secure_sum"),
            "is off, and then the coordinator sees an update with one hospital's part of the noise alone",
            "Leave it on, or write mechanism: site.",
        )
    if plan.aggregation.weights != "equal":
        yield Broken(
            ("aggregation", "weights"),
            "would weigh hospitals, and so one patient's part of the sum, differently",
            "Write weights: equal.",
        )
    if training.sample_rate is None and terms.unit != "site":
        yield Broken(
            ("training",),
            "lacks sample_rate, which shared noise needs to be the same everywhere",
            "Add sample_rate: 0.2, and for batch_size what that draws at a usual hospital.",
        )
    if training.local_steps != 1 and terms.unit != "site":
        yield Broken(
            ("training", "local_steps"),
            "makes an update that is no longer one noisy sum, so the hospitals' parts of the noise do not add up",
            "Write local_steps: 1 and more rounds, or mechanism: site.",
        )
    if (training.optimizer != "sgd" or training.momentum) and terms.unit != "site":
        key = "momentum" if training.optimizer == "sgd" else "optimizer"
        yield Broken(
            ("training", key),
            "changes the update by more than a factor, so the hospitals' parts of the noise do not add up",
            "Write optimizer: sgd without momentum, and strategy fedavgm or fedadam.",
        )
    if isinstance(plan.strategy, Scaffold | FedProx) and terms.unit != "site":
        yield Broken(
            ("strategy", "name"),
            "corrects local steps, and shared noise allows one step",
            "Write strategy fedavg, fedavgm or fedadam.",
        )
    if plan.personalisation.local_layers:
        yield Broken(
            ("personalisation", "local_layers"),
            "move by a step that has no noise at the hospital, and show it in what it sends next",
            "Take them out, or write mechanism: site.",
        )
    if terms.colluding > plan.cohort.min_sites - 2:
        yield Broken(
            ("privacy", "colluding"),
            f"leaves fewer than two honest hospitals of {plan.cohort.min_sites}",
            "Lower it, or raise cohort.min_sites.",
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
    layers = task.layers
    local, frozen = plan.personalisation.local_layers, plan.frozen
    named = {("personalisation", "local_layers"): local, ("task", "pretrained", "frozen"): frozen}
    for path, prefixes in named.items():
        for at, prefix in enumerate(prefixes):
            if not any(layer.startswith(prefix) for layer in layers):
                yield Broken(
                    (*path, at),
                    "is no layer of this model",
                    f"Write one of {', '.join(sorted(layers))}, or the start of one.",
                )
    if layers and all(layer.startswith(frozen) for layer in layers):
        yield Broken(("task", "pretrained", "frozen"), "holds every layer still", "Leave one to be trained.")
    elif layers and all(layer.startswith(local + frozen) for layer in layers):
        yield Broken(
            ("personalisation", "local_layers"), "keeps every layer at the hospital", "Leave one to be shared."
        )
    if task.pretrained and task.mixes_records and not isinstance(task, Cox):
        yield Broken(
            ("task", "pretrained"),
            "would begin with means of rows that BatchNorm goes on changing, in frozen layers too",
            "Write norm: layer, norm: group or norm: none.",
        )
