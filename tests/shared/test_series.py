"""The tasks series and monitoring: what their networks make of gaps, and what their thresholds come to."""

import math

import numpy as np
import pytest
import torch

from cloister_shared.errors import PlanRefused
from cloister_shared.inputs import width
from cloister_shared.layout import initial_model
from cloister_shared.networks.sequences import carried_forward, squashed, summaries
from cloister_shared.networks.usual import PACE, loss_with_alarm
from cloister_shared.objective import objective_of
from cloister_shared.outcomes import itself
from cloister_shared.outcomes.judging import judge
from cloister_shared.outcomes.outcome import outcome_of
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend, read_plan

STEPS, CHANNELS = 5, 2
PLAN = """\
study: series
title: Two channels in five steps
task: {name: series, units: 8}
table:
  target: {name: died, positive: 1, negative: 0}
  features:
    - {name: age, kind: number, range: [0, 120]}
    - name: vitals
      kind: series
      steps: 5
      channels:
        - {name: a, range: [-10, 10]}
        - {name: b, range: [-10, 10]}
cohort: {min_sites: 2, min_patients: 4}
rounds: 1
strategy: {name: fedavg}
training: {learning_rate: 0.1, batch_size: 8, local_steps: 1}
privacy: {mechanism: none}
"""
MODELS = ["gru", "lstm", "transformer"]
TARGETS = {
    "binary": {"name": "died", "positive": 1, "negative": 0},
    "classes": {"kind": "classes", "name": "died", "classes": ["home", "ward", "dead"]},
    "quantity": {"kind": "quantity", "name": "days", "range": [0, 30]},
    "survival": {"kind": "survival", "name": "days", "event": "died", "cuts": [1.0, 2.0, 7.0, 30.0]},
}


def plan(**changes: object) -> StudyPlan:
    return amend(read_plan(PLAN), **changes)


def monitoring(model: str = "forecast", **task: object) -> StudyPlan:
    text = PLAN.replace("{name: series, units: 8}", "{name: monitoring, units: 4}")
    text = text.replace("{name: died, positive: 1, negative: 0}", "{kind: itself, alarm: died}")
    text = text.replace("    - {name: age, kind: number, range: [0, 120]}\n", "")
    return amend(read_plan(text), task={"model": model, **task})


def inputs(n: int, scalars: int, seed: int = 0) -> torch.Tensor:
    """Records with gaps; what was not taken is 0."""
    generator = torch.Generator().manual_seed(seed)
    taken = (torch.rand(n, STEPS, CHANNELS, generator=generator) < 0.6).float()
    values = torch.randn(n, STEPS, CHANNELS, generator=generator) * taken
    grid = torch.cat([values, taken], dim=2).flatten(1)
    return torch.cat([torch.randn(n, scalars, generator=generator), grid], dim=1)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_answers_every_kind_of_outcome(model, target):
    study = plan(task={"model": model, "depth": 2, "summaries": True, "hidden": 6}, table={"target": TARGETS[target]})
    said = initial_model(study)(inputs(7, 1))
    assert said.shape == (7, {"binary": 1, "classes": 3, "quantity": 1, "survival": 4}[target])


@pytest.mark.parametrize("model", MODELS)
def test_no_record_moves_another_records_output(model):
    network, x = initial_model(plan(task={"model": model, "summaries": True})).eval(), inputs(6, 1)
    with torch.no_grad():
        whole = network(x)
        alone = torch.cat([network(x[at : at + 1]) for at in range(6)])
    assert torch.allclose(whole, alone, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_the_same_value_taken_and_not_taken_are_two_things(model):
    network, x = initial_model(plan(task={"model": model})).eval(), torch.zeros(2, 1 + STEPS * 2 * CHANNELS)
    x[1, 1 + CHANNELS] = 1.0  # channel a was 0 at the first step
    with torch.no_grad():
        said = network(x)
    assert said[0] != said[1]


def test_the_last_value_is_carried_forward_and_its_age_is_told():
    values = torch.tensor([0.0, 3.0, 0.0, -2.0, 0.0])[None, :, None]
    taken = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])[None, :, None]
    carried, since = carried_forward(values, taken)
    assert carried.flatten().tolist() == [0, 3, 3, -2, -2]
    ages = [math.log1p(steps) / math.log1p(5) for steps in (0, 1, 0, 1)]
    assert since.flatten().tolist() == pytest.approx([1.0, *ages])


def test_summaries_are_of_what_was_taken_and_0_of_what_never_was():
    values = torch.tensor([[0.0, 4.0, 0.0, -2.0, 0.0], [0.0] * 5]).T[None]
    taken = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0], [0.0] * 5]).T[None]
    found = summaries(values, taken, *carried_forward(values, taken))[0]
    assert found[:5, 0].tolist() == [4, -2, 1, -2, 4]
    assert found[5, 0] == pytest.approx(math.log(3) / math.log(6))
    assert found[:6, 1].tolist() == [0] * 6
    assert found[6, 1] == 1


def test_what_is_far_out_is_near_to_what_is_farther_out():
    far = squashed(torch.tensor([-100.0, 0.0, 10.0, 1000.0]))
    assert far.tolist() == pytest.approx([-math.log(101), 0, math.log(11), math.log(1001)])


BROKEN = [
    ({"features": []}, "takes one series, and there are none"),
    ({"features": ["text"]}, "takes no text"),
    ({"features": ["series", "series"]}, "takes one series, and there are 2"),
]


@pytest.mark.parametrize(("terms", "said"), BROKEN)
def test_a_schema_that_is_not_one_series_is_refused(terms, said):
    shaped = {
        "text": "    - {name: note, kind: text}\n",
        "series": "    - {name: SERIES, kind: series, steps: 5, channels: [{name: a, range: [0, 1]}]}\n",
    }
    head, tail = PLAN.partition("    - name: vitals\n")[0], "cohort:" + PLAN.partition("cohort:")[2]
    features = "".join(shaped[kind].replace("SERIES", f"s{at}") for at, kind in enumerate(terms["features"]))
    with pytest.raises(PlanRefused, match=said):
        read_plan(head + features + tail)


def test_heads_share_a_transformers_units_evenly():
    with pytest.raises(PlanRefused, match="cannot be shared by 4 heads"):
        plan(task={"model": "transformer", "units": 10})


def test_monitoring_takes_no_scalars():
    text = PLAN.replace("{name: series, units: 8}", "{name: monitoring}")
    with pytest.raises(PlanRefused, match="takes a series and nothing beside it"):
        read_plan(text.replace("{name: died, positive: 1, negative: 0}", "{kind: itself}"))


# --- monitoring --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["autoencoder", "forecast"])
def test_a_network_of_what_is_usual_says_each_input_and_a_threshold(model):
    study = monitoring(model)
    said = initial_model(study)(inputs(7, 0))
    assert said.shape == (7, width(study.table) + 1)
    assert (said[:, -1] == 0).all()


def test_a_forecast_sees_no_step_before_it_comes():
    network, x = initial_model(monitoring("forecast")).eval(), inputs(1, 0)
    with torch.no_grad():
        before, later = network(x), x.clone()
        later[0, 3 * 2 * CHANNELS :] = 7.0  # from the fourth step on
        after = network(later)
    seen = slice(0, 4 * 2 * CHANNELS)  # what is said of the fourth is said before it is seen
    assert torch.equal(before[0, seen], after[0, seen])
    assert not torch.equal(before, after)


def test_the_threshold_comes_to_lie_where_the_share_of_errors_is_above_it():
    generator = torch.Generator().manual_seed(0)
    target = torch.cat([torch.randn(4000, 6, generator=generator) * 0.1, torch.full((4000, 1), torch.nan)], dim=1)
    level = torch.zeros(1, requires_grad=True)
    step = torch.optim.Adam([level], lr=0.01)
    for _ in range(400):
        step.zero_grad()
        output = torch.cat([torch.zeros(4000, 6), (PACE * level).expand(4000, 1)], dim=1)
        loss_with_alarm(0.1)(output, target).backward()
        step.step()
    errors = target[:, :-1].square().mean(1).log()
    assert float((errors > PACE * level.detach()).float().mean()) == pytest.approx(0.1, abs=0.02)


def test_the_threshold_asks_nothing_of_the_model():
    study, x = monitoring("autoencoder"), inputs(8, 0)
    network = initial_model(study)
    with torch.no_grad():
        network.get_submodule("threshold").get_parameter("weight").fill_(-5.0)  # all are alarms
    y = torch.cat([x, torch.zeros(8, 1)], dim=1)
    asked = []
    for share in (0.05, 0.4):
        network.zero_grad()
        loss_with_alarm(share)(network(x), y).backward()
        asked.append([p.grad for name, p in network.named_parameters() if name != "threshold.weight"])
    assert all(torch.equal(*pair) for pair in zip(*asked, strict=True))


def test_the_loss_of_a_batch_is_the_mean_of_its_records():
    study, x = monitoring("autoencoder"), inputs(8, 0)
    y, objective, said = torch.cat([x, torch.zeros(8, 1)], dim=1), objective_of(study), initial_model(study)(x)
    y[3, :-1] = torch.nan  # nothing was measured
    alone = torch.stack([objective.loss(said[at : at + 1], y[at : at + 1]) for at in range(8)]).mean()
    assert objective.loss(said, y).item() == pytest.approx(alone.item(), rel=1e-5)


def test_alarms_are_judged_at_the_models_own_threshold():
    y = np.zeros((8, 3), np.float32)
    y[:, -1] = [1, 1, 0, 0, 0, 0, np.nan, np.nan]
    output = np.zeros((8, 3), np.float32)
    output[:, 0] = [3, 1, 3, 1, 1, 1, 3, 1]  # errors of 4.5 and .5
    output[:, -1] = np.log(2.0)
    truth, said = outcome_of(monitoring().table).seen(output, y)
    found = {name: estimate.value for name, estimate in judge(itself.METRICS, truth, said, resamples=10).items()}
    assert found["alarm_sensitivity"] == pytest.approx(0.5)
    assert found["alarm_rate"] == pytest.approx(2 / 6)  # of those where none was known to be due
    assert found["error"] == pytest.approx((3 * 4.5 + 5 * 0.5) / 8)
    assert found["auroc"] == pytest.approx((1 * (0.5 + 3) + 1 * (0 + 1.5)) / 8)


def test_a_model_without_a_threshold_has_no_alarm_rate():
    truth, said = itself.seen(np.zeros((4, 2), np.float32), np.ones((4, 3), np.float32))
    found = judge(itself.WITHOUT_ALARMS, truth, said, resamples=10)
    assert found["error"].value == 1
    assert found["alarm_rate"].value is None
