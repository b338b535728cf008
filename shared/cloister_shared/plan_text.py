"""A plan in words, for the people who approve it."""

from __future__ import annotations

from cloister_shared.plan import CategoryFeature, Mechanism, NumberFeature, StudyPlan


def summary(plan: StudyPlan) -> str:
    """What a plan asks for and promises, a line each."""
    features = plan.table.features
    kinds = {
        "number": sum(isinstance(feature, NumberFeature) for feature in features),
        "category": sum(isinstance(feature, CategoryFeature) for feature in features),
    }
    kinds["yes/no"] = len(features) - sum(kinds.values())
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    training = plan.training
    lines = {
        "Study": f"{plan.study}, version {plan.version}: {plan.title}",
        "Digest": plan.digest,
        "Predicts": f"{plan.table.target.name} from {len(features)} features ({shown}); {plan.task.model} model",
        "Cohort": f"at least {plan.cohort.min_sites} hospitals with {plan.cohort.min_patients} training patients each",
        "Rounds": f"{plan.rounds} of {training.local_steps} local steps over {training.batch_size} rows;"
        f" strategy {plan.strategy.name}",
        "Privacy": privacy(plan),
        "Constants": normalisation(plan),
        "Secure sum": "on: the coordinator sees only the sum"
        if plan.aggregation.secure_sum
        else "OFF: the coordinator sees each hospital's update",
    }
    if public := plan.task.pretrained:
        still = f"; layers {', '.join(public.frozen)} are neither trained nor sent" if public.frozen else ""
        lines["Begins from"] = f"public weights, SHA-256 {public.sha256}{still}"
    width = max(map(len, lines))
    return "\n".join(f"{key:<{width}}  {value}" for key, value in lines.items())


def privacy(plan: StudyPlan) -> str:
    """The privacy promise in one sentence."""
    terms = plan.privacy
    if terms.mechanism is Mechanism.NONE:
        return "NONE: the model may remember a patient"
    return (
        f"{terms.unit}-level, epsilon {terms.epsilon:g} at delta {terms.delta:g} over the whole run,"
        f" neighbours differ by one {terms.unit} added or removed"
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
        case "federated":
            return "exact sums over all hospitals, seen by the coordinator"
