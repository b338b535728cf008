"""Which inputs a score rests on: of each row by attribution, of the model by shuffling held-out rows.

Attribution: integrated gradients (Sundararajan et al. 2017) from the mean training row, summed over what one feature
became. Where an input is a word's number it has no gradient, and each feature is taken away instead. Both by captum.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cloister_client.dataset import NewRows
from cloister_client.released import Released
from cloister_shared import durable
from cloister_shared.inputs import blocks, columns
from cloister_shared.schema import Classes, Effect, Itself, Schema, TextFeature, VectorFeature

STEPS, SHUFFLES, AT_ONCE = 32, 5, 256


def groups(schema: Schema) -> dict[str, list[int]]:
    """The inputs that each feature became."""
    vectors = {
        f"{f.name}_{at}": f.name for f in schema.features if isinstance(f, VectorFeature) for at in range(f.length)
    }
    found: dict[str, list[int]] = {}
    for at, column in enumerate(columns(schema)):
        found.setdefault(vectors.get(column.feature, column.feature), []).append(at)
    for block in blocks(schema):
        found[block.feature.name] = list(range(block.start, block.start + block.size))
    return found


def of_rows(released: Released, rows: NewRows) -> NDArray[np.float64]:
    """How much each feature moved each row's score away from that of the mean training row, [n, features]."""
    from captum.attr import FeatureAblation, IntegratedGradients

    schema, x = released.plan.table, released.scaled(rows)
    parts, model = groups(schema), released.network.model.eval()
    text = any(isinstance(feature, TextFeature) for feature in schema.features)
    base = torch.zeros_like(x[:1]) if text or released.train is None else released.train.x.mean(dim=0, keepdim=True)
    mask = torch.zeros((1, x.shape[1]), dtype=torch.long)
    for number, at in enumerate(parts.values()):
        mask[0, at] = number
    found: list[Tensor] = []
    for some in x.split(AT_ONCE):
        of = _score(released, some)
        if text:
            moved = FeatureAblation(of).attribute(some, baselines=base, feature_mask=mask)
            found.append(torch.stack([moved[:, at[0]] for at in parts.values()], dim=1))
        else:
            whole = IntegratedGradients(of).attribute(some, baselines=base, n_steps=STEPS, internal_batch_size=AT_ONCE)
            found.append(torch.stack([whole[:, at].sum(dim=1) for at in parts.values()], dim=1))
        model.zero_grad(set_to_none=True)
    return torch.cat(found).detach().numpy().astype(np.float64)


def of_model(released: Released) -> dict[str, float]:
    """How much worse the headline metric gets if one feature is shuffled over held-out rows (Breiman 2001).

    Empty where counts are too small for a metric; features in the order of their weight.
    """
    outcome, held = released.network.objective.outcome, released.held_out
    if held is None or not len(held):
        return {}
    x, y = held.arrays
    truth, said = outcome.seen(released.network.output(held.x).numpy(), y)
    if not outcome.enough(truth, released.plan.evaluation.min_count):
        return {}
    whole, sign, draw = outcome.glance(truth, said), 1.0 if outcome.rises else -1.0, np.random.default_rng(0)
    lost: dict[str, float] = {}
    for name, at in groups(released.plan.table).items():
        drops = list[float]()
        for _ in range(SHUFFLES):
            mixed = x.copy()
            mixed[:, at] = x[draw.permutation(len(x))][:, at]
            drops.append(
                sign
                * (whole - outcome.glance(*outcome.seen(released.network.output(torch.from_numpy(mixed)).numpy(), y)))
            )
        lost[name] = float(np.mean(drops))
    return dict(sorted(lost.items(), key=lambda each: -each[1]))


def write(released: Released, rows: NewRows, out: Path) -> None:
    """A line for each row that was read: how much each feature moved its score; its owner alone can read the file."""
    found, text = of_rows(released, rows), io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["row", *(["patient"] if rows.patients else []), *groups(released.plan.table)])
    for at in np.flatnonzero(rows.read):
        who = [rows.patients[at]] if rows.patients else []
        lines.writerow([at + 1, *who, *(f"{value:.6g}" for value in found[at])])
    durable.save_secret(out, text.getvalue())


def _score(released: Released, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The number that is explained, of a network's outputs: of classes the logit of the likeliest."""
    model, target = released.network.model, released.plan.table.target
    with torch.no_grad():
        likeliest = model(x).flatten(1).argmax(dim=1)

    def score(inputs: Tensor) -> Tensor:
        output = model(inputs).flatten(1)
        match target:
            case Classes():
                times = len(output) // len(likeliest)
                return output.gather(1, likeliest.repeat(times)[:, None]).squeeze(1)
            case Effect():
                return output[:, 3] if output.shape[1] > 3 else output[:, 1] - output[:, 0]
            case Itself():
                return (output[:, : inputs.shape[1]] - inputs[:, : output.shape[1]]).square().mean(dim=1)
            case _:
                return output.mean(dim=1)

    return score
