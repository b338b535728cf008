"""A final model in words, for whoever thinks of using it (Mitchell et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cloister_shared.outcomes.outcome import outcome_of
from cloister_shared.outcomes.words import meaning, title
from cloister_shared.plan import StudyPlan
from cloister_shared.schema_text import predicts, values


def card(plan: StudyPlan, manifest: Mapping[str, Any]) -> str:
    """The card as Markdown; ``manifest`` as `model_file` signs it."""
    features = "\n".join(f"- {feature.name}: {values(feature)}" for feature in plan.table.features)
    promised = "\n".join(f"- {name}: {said}" for name, said in manifest["privacy"].items())
    headline = outcome_of(plan.table).headline
    known = {name: value for name, value in manifest["metrics"].items() if value is not None}
    judged = "\n".join(f"- {title(name)}: {value:.4g}" for name, value in known.items()) or "- nothing was told"
    versions = ", ".join(f"{name} {number}" for name, number in manifest["versions"].items())
    whose = "each hospital's own constants" if manifest["constants"] is None else "the constants in the manifest"
    if plan.harmonises:
        whose += (
            ", and what each hospital adds to them and multiplies is taken out (ComBat). That is known at each hospital"
            " that took part, and is not in the file: elsewhere numbers are centred and scaled only"
        )
    kept = ", ".join(manifest["kept"])
    whole = (
        f"Not in the file, because they stayed at the hospitals: {kept}." if kept else "The file has every parameter."
    )
    return f"""# {plan.title}

A model of the study {plan.study}, trained in {manifest["round"]} rounds by at least {plan.cohort.min_sites} hospitals
together; no record left a hospital.

## What it is for

It says {predicts(plan.table)}; task {plan.task.name}. It is a research model and no medical device, judged at no
hospital but those that trained it. Decide upon no patient by it alone.

## What it needs

{features}

Numbers are centred and scaled by {whose}. {whole} For other programs: {manifest["portable"]}.

## How good it is

{manifest["metrics_of"]}:

{judged}

{title(headline)[0].upper() + title(headline)[1:]}: {meaning(headline)}
Calibration: {manifest["calibration"]}.

## Privacy

{promised}

## Where it is from

- plan digest (SHA-256): {manifest["digest"]}
- weights (SHA-256): {manifest["files"]["model.safetensors"]}
- made: {manifest["made"]}, with {versions}

The manifest beside this card is signed; `cloister-site predict` holds it against the key that the hospital pinned.
"""
