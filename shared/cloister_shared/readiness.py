"""What each hospital tells of its own records before any training: how many patients, which features, which outcomes.

It is told hospital by hospital, so no secure sum hides it: with DP each hospital adds the whole noise itself, whatever
mechanism training has. Beside the number of units stand yes-or-no questions, each asked of every unit. Of a question
is released how many more say yes than half of all: with one unit more or less that moves by a half, where a plain count
would move by one, so that twenty features cost the noise of five.
"""

from __future__ import annotations

from collections.abc import Iterator

from cloister_shared.charges import readiness_event
from cloister_shared.plan import StudyPlan
from cloister_shared.schema import Binary, Classes, Effect, Labels, Schema, SeriesFeature, Survival

UNITS, USABLE = "units", "usable"


def questions(plan: StudyPlan) -> tuple[str, ...]:
    """What is asked of every unit, in order: may the study use it, is each feature there, which outcome does it have.

    Of a unit with several records the answer is the share of them that say yes.
    """
    return (USABLE, *features(plan.table).values(), *outcomes(plan.table).values())


def names(plan: StudyPlan) -> tuple[str, ...]:
    """The numbers of a hospital's reply: its units, then how many of them answer yes."""
    return (UNITS, *questions(plan))


def features(schema: Schema) -> dict[str, str]:
    """What a record can lack, as people name it, with the question: a feature, and of a series each channel."""
    found: list[str] = []
    for feature in schema.features:
        if isinstance(feature, SeriesFeature):
            found += [f"{feature.name}: {channel.name}" for channel in feature.channels]
        else:
            found.append(feature.name)
    return {name: f"has {name}" for name in found}


def outcomes(schema: Schema) -> dict[str, str]:
    """The outcomes that are counted, as people name them, with the question; none of one that is a quantity."""
    target = schema.target
    match target:
        case Binary(positive=positive):
            which = (str(positive),)
        case Classes(classes=several) | Labels(labels=several):
            which = tuple(map(str, several))
        case Survival(event=event):
            return {event: f"is {event}"}
        case Effect(treatment=treatment):
            return {treatment: f"is {treatment}"}
        case _:
            which = ()
    return {f"{target.name} = {each}": f"is {target.name} = {each}" for each in which}


def sensitivity(plan: StudyPlan) -> float:
    """By how much one unit moves everything at most, in ℓ²: the number of units by 1, each question by a half."""
    return (1 + len(questions(plan)) / 4) ** 0.5


def spread(plan: StudyPlan) -> float | None:
    """The noise's standard deviation, in units; None where the counts are exact.

    Of the number of units, and so of any share: of h units, a share is off by about spread / h.
    """
    event = readiness_event(plan)
    return event.noise_multiplier * sensitivity(plan) if event else None


def told(plan: StudyPlan, counts: dict[str, float]) -> dict[str, float | None]:
    """Exact counts as they may leave: None where few units say yes, or few say no, but not where none does.

    Few are less than ``evaluation.min_count``. Classes leave nobody out, so that one that is withheld would follow
    from the others: the next smallest is withheld too.
    """
    units, least = counts[UNITS], plan.evaluation.min_count

    def few(count: float) -> bool:
        return 1e-9 < count < least or 1e-9 < units - count < least

    found = {name: None if name != UNITS and few(count) else count for name, count in counts.items()}
    if isinstance(plan.table.target, Classes):
        classes = sorted(outcomes(plan.table).values(), key=lambda name: counts[name])
        if [found[name] for name in classes].count(None) == 1:
            found |= dict.fromkeys([name for name in classes if found[name]][:1])
    return found


def in_words(plan: StudyPlan) -> Iterator[str]:
    """What an approver reads of it."""
    terms, unit = plan.readiness, plan.privacy.unit or "record"
    if terms is None:
        return
    asked = [f"how many {unit}s", f"how many have each of {len(features(plan.table))} features"]
    asked += ["how many have which outcome"] if outcomes(plan.table) else []
    noise = (
        f"each with this hospital's own noise, alone within {terms.share:.0%} of epsilon and counted in it"
        if plan.private
        else f"EXACT, but for counts below {plan.evaluation.min_count}"
    )
    yield f"before training the coordinator learns of this hospital by itself {', '.join(asked)}; {noise}"
    if terms.hold:
        yield "; then the study waits until a person has read it"
