"""A plan in words, for the people who approve it. Pages are at most 100 columns wide."""

from __future__ import annotations

from textwrap import wrap

from cloister_shared import combat, readiness
from cloister_shared.charges import certificate
from cloister_shared.plan import Mechanism, StudyPlan
from cloister_shared.schema_text import predicts

_WIDTH = 100


def summary(plan: StudyPlan) -> str:
    """What a plan asks for and promises, a term each, and where noise is shared who must collude to see less of it.

    Raises:
        BudgetExceeded: no noise keeps the plan's promise.
    """
    page = paragraphs(terms(plan))
    return f"{page}\n\n{standings(plan)}" if plan.shared_noise else page


def terms(plan: StudyPlan) -> dict[str, str]:
    """The same term by term, for a page that wraps it otherwise."""
    training = plan.training
    lines = {
        "Study": f"{plan.study}, version {plan.version}: {plan.title}",
        "Digest": plan.digest,
        "Predicts": f"{predicts(plan.table)}; {getattr(plan.task, 'model', plan.task.name)} model",
        "Cohort": f"at least {plan.cohort.min_sites} hospitals with {plan.cohort.min_patients} training patients each",
        "Rounds": f"{plan.rounds} of {training.local_steps} local steps over {training.batch_size} rows;"
        f" strategy {plan.strategy.name}",
        "Privacy": privacy(plan),
        **guarantee(plan),
        "Constants": normalisation(plan),
        **({"Readiness": "".join(readiness.in_words(plan))} if plan.readiness else {}),
        "Secure sum": "on: the coordinator sees only the sum"
        if plan.aggregation.secure_sum
        else "OFF: the coordinator sees each hospital's update",
    }
    if public := plan.task.pretrained:
        still = f"; layers {', '.join(public.frozen)} are neither trained nor sent" if public.frozen else ""
        lines["Begins from"] = f"public weights, SHA-256 {public.sha256}{still}"
    return lines


def paragraphs(lines: dict[str, str]) -> str:
    """Terms and what they say, wrapped."""
    width = max(map(len, lines)) + 2
    return "\n".join(
        line
        for key, value in lines.items()
        for line in wrap(value, _WIDTH, initial_indent=f"{key:<{width}}", subsequent_indent=" " * width)
    )


def privacy(plan: StudyPlan) -> str:
    """The privacy promise in one sentence: unit, epsilon, delta, neighbouring relation."""
    terms = plan.privacy
    if terms.mechanism is Mechanism.NONE:
        return "NONE: the model may remember a patient"
    return (
        f"{terms.unit}-level, epsilon {terms.epsilon:g} at delta {terms.delta:g} over the whole run,"
        f" neighbours differ by one {_one(plan)} added or removed"
    )


def guarantee(plan: StudyPlan) -> dict[str, str]:
    """What stands behind epsilon and what lies outside it, term by term; nothing where nothing is promised."""
    if not plan.private:
        return {}
    return {
        "Protects": {
            "patient": "a patient with all records",
            "record": "one record: a row. A patient with several is protected less",
            "site": "a hospital's whole table",
        }[plan.privacy.unit or "record"],
        "Mechanism": _mechanism(plan),
        "Trusted": _trusted(plan),
        "Inside": "; ".join(inside(plan)),
        "Outside": "; ".join(outside(plan)),
    }


def _one(plan: StudyPlan) -> str:
    return "hospital" if plan.privacy.unit == "site" else plan.privacy.unit or "record"


def _mechanism(plan: StudyPlan) -> str:
    terms = plan.privacy
    clip = f"clipped to an ℓ² norm of {terms.clip_norm:g}"
    clipped = {
        "patient": f"Each patient enters a step with all records by a draw of its own, and is {clip}",
        "record": f"Each record enters a step by a draw of its own, and is {clip}",
        "site": f"A hospital's whole update is {clip}",
    }[terms.unit or "record"]
    if plan.shared_noise:
        return (
            f"shared noise. {clipped}; each hospital adds a part of the Gaussian noise, and only the secure sum over"
            f" at least {plan.cohort.min_sites} hospitals carries all of it"
        )
    name = "noise on the whole update" if terms.unit == "site" else "DP-SGD"
    return f"{name} at each hospital. {clipped}; the hospital adds all of the Gaussian noise before anything leaves"


def _trusted(plan: StudyPlan) -> str:
    terms = plan.privacy
    if not plan.shared_noise:
        return "nobody outside the hospital: what leaves it carries all of the noise"
    against = (
        f"the coordinator and up to {terms.colluding} of the other hospitals, should they collude"
        if terms.colluding
        else "the coordinator, as long as no hospital tells it the noise that it added"
    )
    alone = terms.epsilon_alone
    rest = f". Against all others together epsilon is at most {alone:g}" if alone is not None else ""
    return f"the other hospitals' noise, and the secure sum. Epsilon holds against {against}{rest}"


def inside(plan: StudyPlan) -> list[str]:
    """What epsilon counts."""
    steps = plan.training.local_steps
    every = "one release each" if plan.privacy.unit == "site" else f"{steps} noisy step{'s' if steps > 1 else ''} each"
    found = [f"training, {plan.rounds} rounds of {every}"]
    if plan.readiness:
        found.append(
            f"counts of each hospital's own before training, within {plan.readiness.share:.0%} of epsilon alone"
        )
    if plan.asks_statistics:
        share = plan.statistics.epsilon_share or 0.1
        found.append(f"sums and counts before round 1, within {share:.0%} of epsilon on their own")
    if share := plan.evaluation.epsilon_share:
        found.append(f"counts of held-out patients' risks at the end, within {share:.0%} of epsilon on their own")
    return found


def outside(plan: StudyPlan) -> list[str]:
    """What epsilon does not count."""
    found = list[str]()
    if plan.evaluation.epsilon_share is None:
        found.append("EXACT metrics of held-out patients, in every round and at the end")
    if plan.aggregation.weights == "rows":
        whose = "all hospitals together" if plan.aggregation.secure_sum else "each hospital"
        found.append(f"the number of training rows of {whose}")
    return [*found, "whether and when a hospital takes part", "other studies on the same patients"]


def turned_off(plan: StudyPlan) -> list[str]:
    """A sentence for each protection that the plan does without."""
    found = list[str]()
    if not plan.private:
        found.append("Differential privacy OFF: the model may remember a patient, and no ε bounds what it tells.")
    if not plan.aggregation.secure_sum:
        noisy = "noisy" if plan.private else "un-noised"
        found.append(f"Secure sum OFF: the coordinator sees each hospital's {noisy} update.")
    if plan.readiness and not plan.private:
        least = plan.evaluation.min_count
        found.append(f"Readiness counts EXACT, hospital by hospital; only counts below {least} are withheld.")
    if plan.private and plan.evaluation.epsilon_share is None:
        found.append("Held-out metrics EXACT: outside ε. Write evaluation.epsilon_share to count them in it.")
    return found


def standings(plan: StudyPlan) -> str:
    """The certificate of shared noise: who colludes, and what is then promised.

    Raises:
        BudgetExceeded: no noise keeps the plan's promise.
    """
    sites = plan.cohort.min_sites
    who = f"A {_one(plan)} against"
    page = [f"{who:<56}  {'Colluding':>9}  {'Unknown noise':>13}  {'Epsilon':>9}"]
    page += [
        f"{row.who:<56}  {f'{row.colluding} of {sites - 1}':>9}  {row.noise:>13.0%}  {row.epsilon:>9.3f}"
        for row in certificate(plan)
    ]
    delta = f"delta {plan.privacy.delta:g}"
    note = f"Unknown noise: of what epsilon {plan.privacy.epsilon:g} needs, the part that the colluding do not know."
    return "\n".join([*page, *wrap(f"{note} At {delta}, with {sites} hospitals in every sum.", _WIDTH)])


def harmonisation(plan: StudyPlan) -> str:
    """What ComBat takes out and leaves in, what it releases for that, and what it costs."""
    features, kept = combat.harmonised(plan), plan.keep
    share = plan.statistics.epsilon_share or 0.1
    what = "1 number feature" if len(features) == 1 else f"{len(features)} number features"
    left = f"; what follows from {', '.join(kept)} is left in" if kept else ""
    alone = ", each as it is measured: one feature has no others to be shrunk to" if len(features) == 1 else ""
    if plan.private:
        cost = (
            f"For this each hospital makes one noisy release of {len(combat.names(plan))} sums of its own rows, alone"
            f" within {share:.0%} of epsilon and counted in it, with all of the noise at each hospital"
        )
    else:
        cost = f"For this each hospital adds up {len(combat.names(plan))} exact sums of its own rows"
    seen = "their sum over hospitals" if plan.aggregation.secure_sum else "each hospital's"
    return (
        f"ComBat: what each hospital adds to {what} and multiplies is taken out{left}{alone}. {cost}; the coordinator"
        f" sees {seen}, about each hospital's own means. A hospital's own effects stay there"
    )


def normalisation(plan: StudyPlan) -> str:
    """Where centre and scale of the number features come from, and what that costs."""
    match plan.normalisation.method:
        case "plan":
            return "from the plan: no data is touched"
        case "site":
            return "each hospital's own mean and standard deviation"
        case "federated" if plan.private:
            share = plan.statistics.epsilon_share or 0.1
            return f"noisy sums over all hospitals, alone within {share:.0%} of epsilon and counted in it"
        case "combat":
            return harmonisation(plan)
        case "federated":
            return "exact sums over all hospitals, seen by the coordinator"
