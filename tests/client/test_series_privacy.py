"""The models of series and monitoring under privacy: one step, and the clip against one record at a time."""

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad

from cloister_client.clipping import Clipper
from cloister_client.dataset import Rows
from cloister_client.privacy import dp_sgd
from cloister_client.train import train
from cloister_shared.charges import training_event
from cloister_shared.inputs import width
from cloister_shared.layout import gathered, initial_model, layout_of
from cloister_shared.noise import reproducible
from cloister_shared.objective import objective_of
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend, read_plan
from cloister_shared.schema import Itself

STEPS, CHANNELS, N = 6, 3, 11
PLAN = """\
study: series
title: Three channels in six steps
task: TASK
table:
  target: TARGET
  features:
AGE    - name: vitals
      kind: series
      steps: 6
      channels: [{name: a, range: [0, 1]}, {name: b, range: [0, 1]}, {name: c, range: [0, 1]}]
cohort: {min_sites: 2, min_patients: 4}
rounds: 1
strategy: {name: fedavg}
training: {learning_rate: 0.1, batch_size: 11, local_steps: 1}
privacy: {mechanism: site, unit: record, epsilon: 3.0, delta: 1.0e-5, clip_norm: 0.5}
"""
BINARY = "{name: died, positive: 1, negative: 0}"
SURVIVAL = "{kind: survival, name: days, event: died, cuts: [1.0, 2.0, 5.0]}"
TASKS = {
    "gru": ("{name: series, model: gru, units: 8}", BINARY),
    "lstm": ("{name: series, model: lstm, units: 8, depth: 2}", BINARY),
    "transformer": ("{name: series, model: transformer, units: 8, depth: 2}", BINARY),
    "summaries": ("{name: series, model: gru, units: 8, summaries: true, hidden: 6}", BINARY),
    "survival": ("{name: series, model: gru, units: 8}", SURVIVAL),
    "forecast": ("{name: monitoring, model: forecast, units: 6}", "{kind: itself}"),
    "autoencoder": ("{name: monitoring, model: autoencoder, units: 4}", "{kind: itself}"),
}


def plan_of(name: str) -> StudyPlan:
    task, target = TASKS[name]
    age = "" if "monitoring" in task else "    - {name: age, kind: number, range: [0, 120]}\n"
    return read_plan(PLAN.replace("TASK", task).replace("TARGET", target).replace("AGE", age))


def rows(plan: StudyPlan, n: int = N) -> Rows:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(n, width(plan.table), generator=generator)
    grid = x[:, -STEPS * 2 * CHANNELS :].view(n, STEPS, 2 * CHANNELS)
    grid[..., CHANNELS:] = (grid[..., CHANNELS:] > 0).float()
    grid[..., :CHANNELS] *= grid[..., CHANNELS:]
    y = (torch.rand(n, generator=generator) < 0.4).float()
    if isinstance(plan.table.target, Itself):
        y = torch.cat([x, torch.full((n, 1), torch.nan)], dim=1)
    elif plan.table.target.kind == "survival":
        y = torch.stack([torch.randint(0, 3, (n,), generator=generator).float(), y, torch.ones(n)], dim=1)
    return Rows(x, y, np.arange(n))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(
    "units", [torch.arange(N), torch.tensor([4, 0, 2, 0, 2, 2, 0, 5, 2, 4, 0])], ids=["record", "patient"]
)
def test_the_clipped_sum_is_that_of_records_taken_one_by_one(name: str, units: torch.Tensor) -> None:
    plan = plan_of(name)
    model, objective, given = initial_model(plan), objective_of(plan), rows(plan)
    count = int(units.max()) + 1
    trained = {key: part.detach() for key, part in model.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return objective.loss(functional_call(model, parameters, (x[None],)), y[None])

    each = [grad(loss)(trained, x, y) for x, y in zip(given.x, given.y, strict=True)]
    flat = torch.stack([torch.cat([one[key].flatten() for key in trained]) for one in each])
    own = [
        flat[units == unit].mean(0) if (units == unit).any() else torch.zeros(flat.shape[1]) for unit in range(count)
    ]
    norms = torch.stack([one.norm() for one in own])
    clip_norm = float(norms[norms > 0].median())
    want = sum(one * min(1.0, clip_norm / max(float(norm), 1e-12)) for one, norm in zip(own, norms, strict=True))
    clipper = Clipper(model, objective.loss, clip_norm, notice=pytest.fail)
    assert torch.allclose(clipper.add(given.x, given.y, units, count), norms, rtol=1e-3, atol=1e-6)
    got = torch.cat([part.flatten() for part in clipper.take()])
    assert isinstance(want, torch.Tensor)
    assert (got - want).norm() <= 1e-3 * want.norm()


@pytest.mark.parametrize("name", TASKS)
def test_one_private_step_moves_every_layer_and_the_state_is_read_back(name: str) -> None:
    plan = plan_of(name)
    model, given = initial_model(plan), rows(plan)
    before = {key: part.clone() for key, part in model.state_dict().items()}
    mechanism = dp_sgd(model, objective_of(plan), given, plan, training_event(plan, N), reproducible("a step"))
    train(mechanism, plan.training, 1)
    after = model.state_dict()
    assert all(part.isfinite().all() for part in after.values())
    assert all(not torch.equal(before[key], after[key]) for key in after)

    again = initial_model(amend(plan, seed=1))
    layout = layout_of(plan, again)
    vector = gathered(again, layout.shared)
    vector[:] = gathered(model, layout.shared)
    assert torch.equal(again.eval()(given.x), model.eval()(given.x))
    assert set(dict(layout.shared)) == set(before)


@pytest.mark.parametrize("name", ["gru", "forecast"])
@pytest.mark.parametrize("n", [1, 2])
def test_one_patient_or_one_outcome_alone_is_no_fault(name: str, n: int) -> None:
    plan = plan_of(name)
    model, given = initial_model(plan), rows(plan, n)
    mechanism = dp_sgd(model, objective_of(plan), given, plan, training_event(plan, n), reproducible("a step"))
    train(mechanism, plan.training, 2)
    said = model.eval()(given.x).detach()
    assert said.isfinite().all()
