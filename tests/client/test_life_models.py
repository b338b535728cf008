"""The zoo's models of tables, time, effect, invention and fusion: clipped as the reference, for whoever comes."""

import numpy as np
import pytest
import torch

from cloister_client.clipping import Clipper
from cloister_client.dataset import Rows
from cloister_client.privacy import Units, dp_sgd
from cloister_client.train import train
from cloister_shared.budget import Event
from cloister_shared.inputs import width
from cloister_shared.layout import gathered, layout_of, untrained
from cloister_shared.noise import keystream
from cloister_shared.objective import objective_of
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import Source, amend, parse, read_plan
from cloister_shared.plan_rules import broken

PLAN = """\
study: one-of-each
title: One of each
task: {name: tabular}
table:
  patient_id: who
  target: {name: outcome, positive: 1, negative: 0}
  features:
    - {name: a, kind: number, range: [-2, 2]}
    - {name: b, kind: number, range: [-2, 2], missing: indicator, fill: 0}
    - {name: c, kind: category, categories: [red, green, blue]}
    - {name: d, kind: boolean}
cohort: {min_sites: 2, min_patients: 1}
rounds: 2
strategy: {name: fedavg}
aggregation: {secure_sum: false}
normalisation: {method: plan}
training: {learning_rate: 0.5, batch_size: 24, local_steps: 2}
privacy: {mechanism: site, unit: patient, epsilon: 3.0, delta: 1.0e-5, clip_norm: 0.5}
evaluation: {min_count: 2}
"""

BINARY = {"name": "outcome", "positive": 1, "negative": 0}
SURVIVAL = {"kind": "survival", "name": "t", "event": "e", "cuts": [1.0, 2.0, 3.0]}
EFFECT = {"kind": "effect", "name": "y", "treatment": "w", "range": [-2.0, 2.0]}
MANY = [
    {"name": "a", "kind": "number", "range": [-2, 2]},
    {"name": "picture", "kind": "image", "size": [8, 8], "required": False},
    {"name": "note", "kind": "text", "tokens": 5, "buckets": 16, "required": False},
    {
        "name": "course",
        "kind": "series",
        "steps": 3,
        "channels": [{"name": "hr", "range": [0, 1]}],
        "required": False,
    },
]

CASES = {
    "hazards": ({"name": "tabular", "model": "mlp", "hidden": [4]}, {"target": SURVIVAL}),
    "transformer": ({"name": "tabular-transformer", "width": 4, "depth": 2}, {"target": BINARY}),
    "transformer-hazards": ({"name": "tabular-transformer", "width": 4}, {"target": SURVIVAL}),
    "t-learner": ({"name": "effect", "model": "t-learner", "hidden": [4]}, {"target": EFFECT}),
    "dr-learner": ({"name": "effect", "model": "dr-learner"}, {"target": EFFECT}),
    "chain": ({"name": "synthetic", "model": "chain", "bins": 4}, {"target": {"kind": "itself"}}),
    "vae": ({"name": "synthetic", "model": "vae", "bins": 4, "hidden": 6}, {"target": {"kind": "itself"}}),
    "fusion": ({"name": "multimodal", "width": 3, "hidden": [4]}, {"target": BINARY, "features": MANY}),
}


def plan_of(case: str) -> StudyPlan:
    task, table = CASES[case]
    terms = read_plan(PLAN).model_dump(mode="json")
    terms["task"], terms["table"] = task, terms["table"] | table
    return parse(StudyPlan, Source("one of each", terms), broken)


def rows_of(plan, n: int = 14, seed: int = 0, missing: bool = False) -> Rows:
    """Encoded rows of the plan; ``missing``: everyone has the same outcome, or the same treatment."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(n, width(plan.table))).astype(np.float32).clip(-2, 2)
    if plan.task.name == "multimodal":
        x[:, 1:65] *= draw.random((n, 1)) < 0.6  # some without a picture
        x[:, 65:70] = draw.integers(0, 17, (n, 5))
        x[0, 65:] = 0
    else:
        x[:, 2] = draw.random(n) < 0.3
        x[:, 3:6] = np.eye(3)[draw.integers(0, 3, n)]
        x[:, 6] = draw.random(n) < 0.5
    either = np.zeros(n) if missing else (draw.random(n) < 0.5).astype(float)
    match plan.table.target.kind:
        case "survival":
            y = np.stack([draw.integers(0, 3, n) + (either == 0), either, draw.uniform(0, 3, n)], axis=1)
        case "effect":
            y = np.stack([draw.normal(size=n), either], axis=1)
        case "itself":
            y = np.concatenate([x, np.full((n, 1), np.nan)], axis=1)
        case _:
            y = either
    patients = np.arange(n) // 2
    return Rows(torch.from_numpy(x), torch.from_numpy(y.astype(np.float32)), patients)


def reference(model, loss, rows: Rows, clip_norm: float) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Patient by patient, by autograd alone: the mean of the records' gradients, clipped, summed."""
    sums, norms = [torch.zeros_like(p) for p in model.parameters()], list[float]()
    for patient in np.unique(rows.patients):
        own = [torch.zeros_like(p) for p in model.parameters()]
        of = np.flatnonzero(rows.patients == patient)
        for at in of:
            model.zero_grad(set_to_none=True)
            loss(model(rows.x[at : at + 1]), rows.y[at : at + 1]).backward()
            own = [g if p.grad is None else g + p.grad / len(of) for g, p in zip(own, model.parameters(), strict=True)]
        norm = torch.cat([g.flatten() for g in own]).norm()
        norms.append(norm.item())
        factor = (clip_norm / norm).clamp(max=1)
        sums = [s + factor * g for s, g in zip(sums, own, strict=True)]
    return sums, torch.tensor(norms)


@pytest.mark.parametrize("case", CASES)
def test_clipped_gradients_are_the_references(case):
    plan = plan_of(case)
    model, objective, rows = untrained(plan), objective_of(plan), rows_of(plan)
    torch.manual_seed(3)
    with torch.no_grad():
        for part in model.parameters():  # where weights begin at zero, gradients of some layers would be zero too
            part.add_(0.3 * torch.randn_like(part))
    heard = list[str]()
    clipper = Clipper(model.train(), objective.loss, 0.5, notice=heard.append)
    units = Units.of(rows, "patient")
    norms = clipper.add(rows.x, rows.y, torch.from_numpy(rows.patients), len(units))
    sums = clipper.take()
    expected, lengths = reference(model, objective.loss, rows, 0.5)
    assert heard == []  # each layer has a fast clip
    assert norms == pytest.approx(lengths, rel=1e-3, abs=1e-5)
    assert (lengths > 0.5).any()
    for found, wanted in zip(sums, expected, strict=True):
        assert found.detach() == pytest.approx(wanted.detach(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("who", ["everyone alike", "one patient"])
@pytest.mark.parametrize("case", CASES)
def test_a_dp_step_at_an_unusual_hospital(case, who):
    """A site whose patients all have one outcome, and a site of one patient: a step that is finite, and moves."""
    plan = plan_of(case)
    rows = rows_of(plan, missing=True) if who == "everyone alike" else rows_of(plan, n=1)
    model = untrained(plan)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    event = Event(noise_multiplier=1.0, sample_rate=1.0, steps=1)
    train(dp_sgd(model, objective_of(plan), rows, plan, event, keystream()), plan.training, 1)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)


@pytest.mark.parametrize("case", CASES)
def test_what_travels_makes_the_same_model_elsewhere(case):
    plan = plan_of(case)
    here, there, x = untrained(plan), untrained(amend(plan, seed=5)), rows_of(plan).x
    layout = layout_of(plan, here)
    gathered(there, layout.shared)[:] = gathered(here, layout.shared)
    assert torch.equal(here.eval()(x), there.eval()(x))


@pytest.mark.parametrize("case", CASES)
def test_a_plan_names_layers_that_are_there(case):
    plan = plan_of(case)
    names = [name for name, _ in layout_of(plan, untrained(plan)).shared]
    for layer in plan.task.layers:
        assert any(name.startswith(layer) for name in names)
    assert all(name.startswith(plan.task.layers) for name in names)


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_judged(case):
    plan = plan_of(case)
    rows, outcome = rows_of(plan, n=40), objective_of(plan).outcome
    truth, said = outcome.seen(untrained(plan).eval()(rows.x).detach().numpy(), rows.y.numpy())
    assert np.isfinite(outcome.glance(truth, said))
