"""What a comparison found: the numbers of its tables, and what may be said of them.

Every number is a mean over the seeds of what `federation` measured; nothing is judged again here. Where two
intervals overlap the words say that no difference is proven.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cloister_shared.outcomes.judging import Estimate
from cloister_shared.outcomes.outcome import Outcome, outcome_of
from cloister_shared.outcomes.words import scale, title
from cloister_shared.schema import Binary, Survival
from cloister_simulations.federation import Arm, Comparison, Metrics, Result

DASH = "\u2013"
VOID = "void"  # what an epsilon is worth whose noise can be drawn again
NOTHING = Estimate(None, None, None, 0)


@dataclass(frozen=True)
class ArmRow:
    """How well one arm predicts for the held-out patients of all hospitals together."""

    arm: Arm
    metrics: Metrics
    over_seeds: str
    """The least and the greatest value of the headline metric."""
    epsilon: str
    """The most that any hospital spent in any run of the arm, by its own ledger; or ``none``, or ``VOID``."""

    def __getitem__(self, metric: str) -> Estimate:
        return self.metrics.get(metric, NOTHING)


@dataclass(frozen=True)
class HospitalRow:
    """One hospital: its rows, the headline metric on its own patients by arm, and what its ledgers say."""

    name: str
    train: int
    test: int
    positive: float
    """Share of its rows that have the outcome."""
    headline: dict[Arm, Estimate]
    """Without the arms that could not say."""
    tuned: Estimate
    """After local fine-tuning, where the plan has it."""
    ditto: Estimate
    """Of the hospital's own model that was trained beside the federation, where the plan has one."""
    spent: dict[Arm, float]
    """The most over seeds."""


def judged_by(comparison: Comparison) -> Outcome:
    """How the study's outcome is judged."""
    return outcome_of(comparison.scenario.plan.table)


def by_arm(comparison: Comparison) -> dict[Arm, list[Result]]:
    """The results of each arm, a result a seed."""
    arms: dict[Arm, list[Result]] = {}
    for result in comparison.results:
        arms.setdefault(result.arm, []).append(result)
    return arms


def seeds_of(comparison: Comparison) -> list[int]:
    """The seeds that were run, in order."""
    return list(dict.fromkeys(result.seed for result in comparison.results))


def interval_level(comparison: Comparison) -> str:
    """The coverage of every interval, such as 95%."""
    return f"{comparison.scenario.plan.evaluation.interval * 100:g}%"


def arm_rows(comparison: Comparison) -> list[ArmRow]:
    """One row for each arm, in the order that they ran."""
    rows: list[ArmRow] = []
    headline = judged_by(comparison).headline
    for arm, results in by_arm(comparison).items():
        metrics = {name: mean(r.overall.get(name) for r in results) for name in results[0].overall}
        known = [e.value for r in results if (e := r.overall.get(headline)) and e.value is not None]
        spread = f"{min(known):.3f}{DASH}{max(known):.3f}" if len(known) > 1 else "one seed"
        rows.append(ArmRow(arm, metrics, spread, _epsilon(results)))
    return rows


def hospital_rows(comparison: Comparison) -> list[HospitalRow]:
    """One row for each hospital, the largest first."""
    arms, rows, headline = by_arm(comparison), list[HospitalRow](), judged_by(comparison).headline
    for site, counts in comparison.rows.items():
        found = {arm: mean(r.sites.get(site, {}).get(headline) for r in of) for arm, of in arms.items()}
        spent = {arm: [r.epsilon.get(site, 0.0) for r in of] for arm, of in arms.items() if arm.epsilon}
        rows.append(
            HospitalRow(
                name=site,
                train=counts["train"],
                test=counts["test"],
                positive=counts["positives"] / max(counts["train"] + counts["test"], 1),
                headline={arm: estimate for arm, estimate in found.items() if estimate.value is not None},
                tuned=mean(r.tuned[site].get(headline) for r in comparison.results if site in r.tuned),
                ditto=mean(r.ditto[site].get(headline) for r in comparison.results if site in r.ditto),
                spent={arm: max(values) for arm, values in spent.items()},
            )
        )
    return sorted(rows, key=lambda row: (-row.train, row.name))


def mean(found: Iterable[Estimate | None]) -> Estimate:
    """Mean over the seeds that could say: of the values, and of the limits of their intervals."""
    known = [estimate for estimate in found if estimate and estimate.value is not None]
    if not known:
        return NOTHING
    value, low, high = (_mean([getattr(e, part) for e in known]) for part in ("value", "low", "high"))
    return Estimate(value, low, high, known[0].n)


def text(estimate: Estimate, *, interval: bool = True) -> str:
    """As tables show it: 0.912 (0.874 to 0.943), with a dash for "to"; a dash alone for nothing."""
    if estimate.value is None:
        return DASH
    if not interval or estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} ({estimate.low:.3f}{DASH}{estimate.high:.3f})"


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _epsilon(results: Sequence[Result]) -> str:
    if not results[0].arm.epsilon:
        return "none"
    if any(result.reproducible_noise for result in results):
        return VOID
    return f"{max((spent for result in results for spent in result.epsilon.values()), default=0.0):.2f}"


# --- in words ----------------------------------------------------------------------------------------------
def summary(comparison: Comparison) -> Iterator[str]:
    """The findings as sentences: what was measured, and nothing past it."""
    rows, judged = comparison.rows, judged_by(comparison)
    train, test = (sum(counts[key] for counts in rows.values()) for key in ("train", "test"))
    yield (
        f"{len(rows)} hospitals with {train:,} training rows between them; models are judged on {test:,} rows"
        f" that trained none of them.{_how_many(comparison)} The measure is {title(judged.headline)} with its"
        f" {interval_level(comparison)} interval: {scale(judged.headline, judged.rises)}."
    )
    yield from _between_arms(comparison)
    yield from _alone(comparison)
    seeds = len(seeds_of(comparison))
    yield (
        f"Figures are means over {seeds} seeds."
        if seeds > 1
        else "Only one seed was run, so how far chance moves these figures from run to run is not known."
    )


def _how_many(comparison: Comparison) -> str:
    """What share of rows have the outcome, where it is had or not had."""
    target, rows = comparison.scenario.plan.table.target, comparison.rows.values()
    share = sum(each["positives"] for each in rows) / max(sum(each["train"] + each["test"] for each in rows), 1)
    match target:
        case Binary(name=name):
            return f" {share:.0%} of rows have the outcome, {name}."
        case Survival(event=name):
            return f" In {share:.0%} of rows the event, {name}, came while it was awaited."
        case _:
            return ""


def _between_arms(comparison: Comparison) -> Iterator[str]:
    """Each arm that all hospitals train together, held against the one that guards less."""
    rows = [row for row in arm_rows(comparison) if row.arm.kind != "alone"]
    found = {row.arm: row[judged_by(comparison).headline] for row in rows}
    void = [row.arm for row in rows if row.epsilon == VOID]
    of = {arm.kind: estimate for arm, estimate in found.items()}
    compared, apart = 0, list[str]()
    for arm, estimate in found.items():
        if arm in void:
            noise = f"reproducible noise, as much as ε = {arm.epsilon:g} needs"
            yield f"With {noise}, the model reaches {text(estimate)}; but such noise gives no privacy."
            continue
        how = "on all rows pooled in one place" if arm.kind == "pooled" else "together without privacy"
        how = f"together at ε = {arm.epsilon:g}" if arm.epsilon else how
        other = "federated" if arm.epsilon and "federated" in of else "pooled"
        said = f"Trained {how}, the model reaches {text(estimate)}"
        if arm.kind == "pooled" or other not in of:
            yield f"{said}."
            continue
        compared += 1
        yield f"{said}, {_difference(estimate, of[other])} {_WORDS[other]}."
        if not overlap(estimate, of[other]):
            apart.append(f"“{arm.name}” and {_WORDS[other]}")
    if apart:
        rest = "; no other difference between these is proven" if len(apart) < compared else ""
        yield f"The intervals of {', and of '.join(apart)} do not overlap{rest}."
    elif compared:
        yield "The intervals overlap, so no difference between these is proven."


_WORDS = {"pooled": "pooling", "federated": "training without privacy"}


def _alone(comparison: Comparison) -> Iterator[str]:
    """Each hospital alone against training together, hospital by hospital: the only like for like."""
    known = [(row.name, {arm.kind: e for arm, e in row.headline.items()}) for row in hospital_rows(comparison)]
    alone = sorted((_value(of["alone"]), name) for name, of in known if "alone" in of)
    if not alone:
        return
    (least, worst), (most, best) = alone[0], alone[-1]
    span = f"from {least:.3f} ({worst}) to {most:.3f} ({best})"
    yield f"Each hospital alone, on its own patients, reaches {span}."
    pairs = [(of["federated"], of["alone"]) for _, of in known if "alone" in of and "federated" in of]
    if not pairs:
        return
    steps = [round(_value(together), 3) - round(_value(by_itself), 3) for together, by_itself in pairs]
    apart = sum(not overlap(*pair) for pair in pairs)
    higher, lower = sum(step > 0 for step in steps), sum(step < 0 for step in steps)
    which = f"higher at {higher} and lower at {lower}"
    if not judged_by(comparison).rises:
        which = f"lower, which is better, at {lower} and higher at {higher}"
    yield (
        f"Training together without privacy is {which} of {len(pairs)}"
        f" hospitals; the intervals lie apart at {apart or 'none'}."
    )


def overlap(one: Estimate, other: Estimate) -> bool:
    """Whether two intervals overlap. Without an interval nothing is proven, which is the same."""
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return True
    return one.low <= other.high and other.low <= one.high


def _difference(one: Estimate, other: Estimate) -> str:
    """Of the two as the tables show them, so that a reader who subtracts finds the same."""
    if one.value is None or other.value is None:
        return "which cannot be held against"
    difference = round(one.value, 3) - round(other.value, 3)
    if abs(difference) < 0.0005:
        return "to three decimals the same as"
    return f"{abs(difference):.3f} {'above' if difference > 0 else 'below'}"


def _value(estimate: Estimate) -> float:
    return estimate.value if estimate.value is not None else float("nan")
