"""The tabular model's layers: what each norm and the standardised weights promise."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cloister_shared.inputs import columns
from cloister_shared.layout import initial_model, layout_of
from cloister_shared.networks import losses
from cloister_shared.networks.dense import GROUP, StandardisedLinear
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend, read_plan

ROOT = Path(__file__).resolve().parents[2]
PLAN = read_plan((ROOT / "tests/vectors/plan/sound.yaml.txt").read_text(encoding="utf-8").partition("---\n")[2])
WIDTH = len(columns(PLAN.table))


def plan(**task: object) -> StudyPlan:
    return amend(PLAN, task={"model": "mlp", "hidden": [16], **task})


def rows(count: int = 6) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(3))


def test_groups_of_eight_units_have_mean_zero_and_variance_one():
    model = initial_model(plan(norm="group"))
    hidden, norm = model.get_submodule("hidden_0"), model.get_submodule("norm_0")
    groups = norm(hidden(rows())).detach().view(6, -1, GROUP)
    assert groups.mean(dim=2).abs().max() < 1e-5
    assert groups.var(dim=2, correction=0).mean() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("task", [{"norm": "group"}, {"norm": "group", "standardise": True}, {"standardise": True}])
def test_no_row_moves_another_rows_output(task):
    model, x = initial_model(plan(**task)), rows()
    whole = model(x)
    for at in range(len(x)):
        assert model(x[at : at + 1]).detach() == pytest.approx(whole[at : at + 1].detach(), abs=1e-5)


@given(st.integers(0, 2**31), st.floats(0.01, 100), st.floats(-10, 10))
def test_scale_and_shift_of_a_units_weights_do_not_count(seed, scale, shift):
    layer = StandardisedLinear(WIDTH, 3)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(seed))
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.mul_(scale).add_(shift)
    assert other(rows()).detach() == pytest.approx(layer(rows()).detach(), abs=2e-3)


def test_inputs_of_variance_one_give_outputs_of_variance_one():
    x = torch.randn(20_000, 40, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(5)
    out = StandardisedLinear(40, 8)(x)
    assert out.var(dim=0).detach() == pytest.approx(torch.ones(8), abs=0.05)


def test_equal_weights_are_no_division_by_zero():
    layer = StandardisedLinear(WIDTH, 2)
    with torch.no_grad():
        layer.weight.fill_(0.5)
    layer(rows()).sum().backward()
    assert layer.weight.grad is not None
    assert torch.isfinite(layer.weight.grad).all()


def test_what_travels_is_the_weights_under_their_usual_names():
    standardised = plan(norm="group", standardise=True)
    names = [name for name, _ in layout_of(standardised, initial_model(standardised)).shared]
    assert names == [
        "hidden_0.weight",
        "hidden_0.bias",
        "norm_0.weight",
        "norm_0.bias",
        "head.weight",
        "head.bias",
    ]


def test_per_row_gradients_of_opacus_are_autograds():
    """The record-level mechanism clips what Opacus says one row's gradient is."""
    from opacus.grad_sample import GradSampleModule

    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    terms, x, y = plan(norm="group", standardise=True), rows(), torch.tensor([0.0, 1, 0, 1, 1, 0])
    model, hooked = initial_model(terms), GradSampleModule(initial_model(terms), loss_reduction="mean")
    losses.binary(hooked(x), y).backward()
    for at in range(len(x)):
        model.zero_grad()
        losses.binary(model(x[at : at + 1]), y[at : at + 1]).backward()
        for own, theirs in zip(model.parameters(), hooked.parameters(), strict=True):
            assert theirs.grad_sample[at] == pytest.approx(own.grad, abs=1e-5)
