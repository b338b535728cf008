"""cloister_client.clipping: the clipped sums are those of Opacus and of each record's gradient taken one by one."""

import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from cloister_client.bookkeeping import rule
from cloister_client.clipping import Clipper
from cloister_shared.errors import PlanRefused
from cloister_shared.networks.dense import StandardisedLinear

RECORDS, CLASSES = 11, 3


class Fn(nn.Module):
    """A function as a layer, with the layers that it uses."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def mean_of(*layers: nn.Module, width: int) -> nn.Module:
    """Layers, the mean over positions, and a head."""
    return nn.Sequential(*layers, Fn(lambda _, x: x.flatten(2).mean(2)), nn.Linear(width, CLASSES))


def hidden(*widths: int) -> Iterator[nn.Module]:
    """Linear layers with ReLU after each."""
    for wide, out in pairwise(widths):
        yield from (nn.Linear(wide, out), nn.ReLU())


def sequence(kind: type[nn.LSTM] | type[nn.GRU], **terms: Any) -> nn.Module:
    """A recurrent layer that is asked of all it says: every step's output and the last states."""

    def run(self: Any, x: Tensor) -> Tensor:
        said, last = self.layer(x if kind_first else x.transpose(0, 1))
        said = said if kind_first else said.transpose(0, 1)
        ends = torch.stack(last).tanh().sum(0) if isinstance(last, tuple) else last
        return self.head(said.square().sum(1)) + ends.sum(0)[:, :CLASSES]

    kind_first = terms.setdefault("batch_first", True)
    width = 6 * (2 if terms.get("bidirectional") else 1)
    return Fn(run, layer=kind(5, 6, **terms), head=nn.Linear(width, CLASSES))


def attention(run: Callable[[Any, Tensor], Tensor], **terms: Any) -> nn.Module:
    return Fn(run, attend=nn.MultiheadAttention(8, 2, **terms), head=nn.Linear(8, CLASSES))


def self_attention(net: Any, x: Tensor) -> Tensor:
    said, weights = net.attend(x, x, x)
    return net.head(said.mean(1)) + weights.square().mean((1, 2))[:, None]


def cross_attention(net: Any, x: Tensor) -> Tensor:
    mask = torch.zeros(len(x), 3, dtype=torch.bool)
    mask[:, 2] = True
    return net.head(net.attend(x, x[:, :3].tanh(), x[:, 1:4], key_padding_mask=mask, need_weights=False)[0].mean(1))


def other_widths(net: Any, x: Tensor) -> Tensor:
    return net.head(net.attend(x, x[..., :5], x[..., :4])[0].mean(1))


def time_first(net: Any, x: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    return net.head(net.attend(x, x, x, attn_mask=causal, is_causal=True, need_weights=False)[0].mean(0))


def self_and_cross(net: Any, x: Tensor) -> Tensor:
    once = net.attend(x, x, x, need_weights=False)[0]
    return net.head(net.attend(once, x.tanh(), x, need_weights=False)[0].mean(1))


def tied(embed: nn.Embedding) -> nn.Module:
    """An embedding whose weight is also its head's."""
    head = nn.Linear(6, 9, bias=False)
    head.weight = embed.weight
    return Fn(lambda net, x: net.head(net.embed(x).sum(1).tanh())[:, :CLASSES], embed=embed, head=head)


def twice(layer: nn.Module, width: int) -> nn.Module:
    return mean_of(Fn(lambda net, x: net.layer(net.layer(x).tanh()), layer=layer), width=width)


def tied_linear() -> nn.Module:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Linear(6, CLASSES))


def numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(RECORDS, *shape)


def words(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 9, (RECORDS, *shape))


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in names)
    return model


Case = tuple[Callable[[], nn.Module], Callable[[], Tensor]]

HOOKED: dict[str, Case] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES, bias=False)), numbers(6)),
    "linear-steps": (lambda: mean_of(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), width=3), numbers(3, 6)),
    "linear-wide": (lambda: mean_of(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 4), width=2), numbers(2, 30)),
    "linear-4d": (lambda: mean_of(nn.Linear(6, 5), width=2), numbers(2, 3, 6)),
    "conv1d": (lambda: mean_of(nn.Conv1d(2, 4, 3, dilation=2, padding=2), nn.Tanh(), width=4), numbers(2, 9)),
    "conv1d-grouped": (lambda: mean_of(nn.Conv1d(4, 6, 3, stride=2, groups=2), width=6), numbers(4, 9)),
    "conv2d": (lambda: mean_of(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Tanh(), width=4), numbers(2, 9, 7)),
    "conv2d-gram": (lambda: mean_of(nn.Conv2d(8, 16, 3), nn.Tanh(), width=16), numbers(8, 4, 5)),
    "conv2d-grouped": (
        lambda: mean_of(nn.Conv2d(4, 8, 3, groups=4, dilation=2, bias=False), width=8),
        numbers(4, 8, 8),
    ),
    "conv2d-same": (lambda: mean_of(nn.Conv2d(2, 4, (3, 2), padding="same"), width=4), numbers(2, 5, 5)),
    "conv3d": (lambda: mean_of(nn.Conv3d(2, 4, 3, stride=(1, 2, 1), padding=1), width=4), numbers(2, 4, 6, 5)),
    "conv3d-grouped": (lambda: mean_of(nn.Conv3d(4, 6, 2, groups=2), width=6), numbers(4, 3, 4, 3)),
    "group-norm": (lambda: mean_of(nn.GroupNorm(2, 4), nn.Tanh(), width=4), numbers(4, 5, 3)),
    "instance-norm": (lambda: mean_of(nn.InstanceNorm2d(4, affine=True), nn.Tanh(), width=4), numbers(4, 5, 3)),
    "layer-norm": (lambda: mean_of(nn.LayerNorm(6), nn.Tanh(), width=5), numbers(5, 6)),
    "layer-norm-flat": (lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, CLASSES)), numbers(6)),
    "layer-norm-2d": (lambda: mean_of(nn.LayerNorm((5, 6)), nn.Tanh(), width=3), numbers(3, 5, 6)),
    "rms-norm": (lambda: mean_of(nn.RMSNorm(6), nn.Tanh(), width=5), numbers(5, 6)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(24, CLASSES)), words(4)),
    "embedding-flat": (lambda: nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, CLASSES)), words()),
    "twice": (lambda: twice(nn.Linear(6, 6), 4), numbers(4, 6)),
}
"""Layers that Opacus's hooks can clip as they are."""

OTHERS: dict[str, Case] = {
    "linear-in-place": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)), numbers(6)),
    "linear-deep": (lambda: nn.Sequential(*hidden(6, 8, 7), nn.Linear(7, 3)), numbers(6)),
    "linear-deep-steps": (lambda: nn.Sequential(*hidden(6, 8, 7), nn.Flatten(), nn.Linear(56, 3)), numbers(2, 4, 6)),
    "linear-deep-frozen": (
        lambda: frozen(nn.Sequential(*hidden(6, 8, 8, 8), nn.Linear(8, 3)), "0.bias", "4.weight"),
        numbers(6),
    ),
    "embedding-padded": (
        lambda: nn.Sequential(nn.Embedding(9, 6, padding_idx=0), nn.Flatten(), nn.Linear(24, CLASSES)),
        words(4),
    ),
    "conv2d-circular": (
        lambda: mean_of(nn.Conv2d(2, 4, 3, padding=2, padding_mode="circular"), width=4),
        numbers(2, 5, 5),
    ),
    "lstm": (lambda: sequence(nn.LSTM), numbers(7, 5)),
    "lstm-deep": (lambda: sequence(nn.LSTM, num_layers=2, bidirectional=True), numbers(4, 5)),
    "lstm-time-first": (lambda: sequence(nn.LSTM, batch_first=False, bias=False), numbers(4, 5)),
    "lstm-frozen": (lambda: frozen(sequence(nn.LSTM), "layer.weight_ih_l0", "layer.bias_hh_l0"), numbers(4, 5)),
    "gru": (lambda: sequence(nn.GRU), numbers(7, 5)),
    "gru-deep": (lambda: sequence(nn.GRU, num_layers=2, bidirectional=True), numbers(4, 5)),
    "gru-time-first": (lambda: sequence(nn.GRU, batch_first=False, bias=False), numbers(4, 5)),
    "gru-frozen": (lambda: frozen(sequence(nn.GRU), "layer.weight_hh_l0", "layer.bias_ih_l0"), numbers(4, 5)),
    "lstm-twice": (
        lambda: Fn(
            lambda net, x: net.head(net.layer(net.layer(x)[0])[0].sum(1)),
            layer=nn.LSTM(5, 5, batch_first=True),
            head=nn.Linear(5, 3),
        ),
        numbers(4, 5),
    ),
    "attention": (lambda: attention(self_attention, batch_first=True), numbers(4, 8)),
    "attention-cross": (lambda: attention(cross_attention, batch_first=True), numbers(4, 8)),
    "attention-widths": (lambda: attention(other_widths, batch_first=True, kdim=5, vdim=4), numbers(4, 8)),
    "attention-time-first": (lambda: attention(time_first, bias=False), numbers(4, 8)),
    "attention-self-and-cross": (lambda: attention(self_and_cross, batch_first=True), numbers(4, 8)),
    "attention-frozen": (
        lambda: frozen(attention(cross_attention, batch_first=True), "attend.in_proj_weight", "attend.in_proj_bias"),
        numbers(4, 8),
    ),
    "transformer": (
        lambda: mean_of(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), width=4),
        numbers(4, 8),
    ),
    "decoder": (
        lambda: mean_of(
            Fn(
                lambda net, x: net.layer(x, x.tanh()), layer=nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True)
            ),
            width=4,
        ),
        numbers(4, 8),
    ),
    "tied-embedding": (lambda: tied(nn.Embedding(9, 6)), words(4)),
    "tied-linear": (tied_linear, numbers(6)),
    "twice-conv": (lambda: twice(nn.Conv2d(3, 3, 3, padding=1), 3), numbers(3, 4, 4)),
    "twice-norm": (lambda: twice(nn.GroupNorm(2, 4), 4), numbers(4, 3)),
    "twice-layer-norm": (lambda: twice(nn.LayerNorm(6), 4), numbers(4, 6)),
    "frozen": (
        lambda: frozen(
            nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3)), "0.weight", "2.bias"
        ),
        numbers(6),
    ),
    "frozen-conv": (
        lambda: frozen(mean_of(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), width=4), "0.weight", "1.bias"),
        numbers(2, 9),
    ),
    "unused": (lambda: Fn(lambda net, x: net.used(x), used=nn.Linear(6, 3), idle=nn.Linear(6, 3)), numbers(6)),
}
"""Layers for which Opacus has others or none, and two that it gets wrong: in-place changes, and rows of padding."""

CASES = HOOKED | OTHERS
RAGGED = torch.tensor([4, 0, 2, 0, 2, 2, 0, 5, 2, 4, 0])
"""Records of six patients: 4, 0, 4, 0, 2 and 1 of them."""


def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    model, x = CASES[name][0](), CASES[name][1]()
    return model, x, torch.randint(0, CLASSES, (RECORDS,))


def one_by_one(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Each record's gradient of each trained parameter, by torch.func: nothing of what is tested has a part in it."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    still = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}

    def loss(parameters: dict[str, Tensor], one: Tensor, target: Tensor) -> Tensor:
        output = functional_call(model, (parameters, still), (one[None],), tie_weights=True)
        return functional.cross_entropy(output, target[None])

    each = grad(loss)
    if any(isinstance(layer, nn.LSTM | nn.GRU | nn.MultiheadAttention) for layer in model.modules()):
        found = [each(trained, *pair) for pair in zip(x, y, strict=True)]  # fused kernels have no vmap
        return {name: torch.stack([one[name] for one in found]) for name in trained}
    return vmap(each, in_dims=(None, 0, 0))(trained, x, y)


def clipped(
    gradients: dict[str, Tensor], units: Tensor, count: int, clip_norm: float, per_unit: str
) -> tuple[list[Tensor], Tensor]:
    """What the paper says: gather each unit's gradient, clip it whole, add."""
    sums, norms = {name: torch.zeros_like(each[0]) for name, each in gradients.items()}, torch.zeros(count)
    for unit in range(count):
        own = units == unit
        if not own.any():
            continue
        share = {
            name: each[own].mean(0) if per_unit == "mean" else each[own].sum(0) for name, each in gradients.items()
        }
        norms[unit] = torch.cat([part.flatten() for part in share.values()]).norm()
        for name, part in share.items():
            sums[name] += part * min(1.0, clip_norm / float(norms[unit]))
    return list(sums.values()), norms


def assert_alike(got: list[Tensor], want: list[Tensor], within: float = 1e-4) -> None:
    assert [one.shape for one in got] == [one.shape for one in want]
    whole, right = (torch.cat([one.flatten() for one in all_]) for all_ in (got, want))
    assert right.norm() > 0
    assert (whole - right).norm() <= within * right.norm()


def middle(gradients: dict[str, Tensor], units: Tensor, count: int, per_unit: str) -> float:
    """A clip_norm that some units exceed and others do not."""
    norms = clipped(gradients, units, count, 1.0, per_unit)[1]
    return float(norms[norms > 0].median())


@pytest.mark.parametrize("per_unit", ["record", "mean", "sum"])
@pytest.mark.parametrize("name", CASES)
def test_the_clipped_sum_is_that_of_gradients_taken_one_by_one(name: str, per_unit: Any) -> None:
    model, x, y = made(name)
    units, count = (torch.arange(RECORDS), RECORDS) if per_unit == "record" else (RAGGED, 6)
    gradients = one_by_one(model, x, y)
    clip_norm = middle(gradients, units, count, per_unit)
    want, norms = clipped(gradients, units, count, clip_norm, per_unit)
    clipper = Clipper(
        model, functional.cross_entropy, clip_norm, per_unit="sum" if per_unit == "sum" else "mean", notice=pytest.fail
    )
    assert torch.allclose(clipper.add(x, y, units, count), norms, rtol=1e-4, atol=1e-7)
    assert_alike(clipper.take(), want)
    assert all(parameter.grad is None and not hasattr(parameter, "grad_sample") for parameter in model.parameters())


@pytest.mark.parametrize("name", HOOKED)
def test_the_clipped_sum_is_that_of_opacus(name: str) -> None:
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model, x, y = made(name)
    clipper = Clipper(model, functional.cross_entropy, 0.4)
    clipper.add(x, y, torch.arange(RECORDS), RECORDS)
    hooked = GradSampleModule(model, loss_reduction="mean")
    optimizer = DPOptimizer(
        torch.optim.SGD(hooked.parameters(), lr=0.0),
        noise_multiplier=0.0,
        max_grad_norm=0.4,
        expected_batch_size=1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        functional.cross_entropy(hooked(x), y).backward()
    optimizer.clip_and_accumulate()
    assert_alike(clipper.take(), [parameter.summed_grad.view_as(parameter) for parameter in hooked.parameters()])


@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding-padded", "lstm", "attention", "tied-embedding"])
@pytest.mark.parametrize(
    "terms", [{"at_once": 1}, {"at_once": 5}, {"buckets": (8, 16, 32)}, {"at_once": 5, "buckets": (8,)}]
)
def test_splitting_and_filling_up_change_nothing(name: str, terms: dict[str, Any]) -> None:
    model, x, y = made(name)
    plain, other = (Clipper(model, functional.cross_entropy, 0.3, **more) for more in ({}, terms))
    norms = [clipper.add(x, y, RAGGED, 6) for clipper in (plain, other)]
    assert torch.allclose(*norms, rtol=1e-5)
    assert_alike(other.take(), plain.take(), within=1e-5)


@pytest.mark.parametrize(
    "name", ["linear", "conv2d", "embedding", "group-norm", "layer-norm", "lstm", "gru", "attention"]
)
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("units", [torch.arange(RECORDS), RAGGED])
def test_a_unit_that_is_not_finite_adds_nothing_and_disturbs_nobody(name: str, odd: float, units: Tensor) -> None:
    model, x, y = made(name)
    if name == "embedding":
        with torch.no_grad():
            model.get_parameter("0.weight")[8] = odd
        x[0], x[1:] = 8, x[1:].clamp(max=7)
    else:
        x[0] = odd
    count, spoilt = int(units.max()) + 1, units == units[0]
    clipper = Clipper(model, functional.cross_entropy, 0.3)
    norms = clipper.add(x, y, units, count)
    got = clipper.take()
    assert all(one.isfinite().all() for one in got)
    if norms[units[0]].isfinite():  # saturated, not broken
        assert odd == 1e38
        return
    rest = Clipper(model, functional.cross_entropy, 0.3)
    others = rest.add(x[~spoilt], y[~spoilt], units[~spoilt], count)
    assert_alike(got, rest.take(), within=1e-6)
    assert torch.allclose(norms[others > 0], others[others > 0])


def test_an_empty_batch_adds_zeros() -> None:
    model, x, y = made("linear")
    clipper = Clipper(model, functional.cross_entropy, 1.0)
    assert clipper.add(x[:0], y[:0], torch.zeros(0, dtype=torch.int64), 0).shape == (0,)
    assert torch.equal(clipper.add(x[:0], y[:0], torch.zeros(0, dtype=torch.int64), 3), torch.zeros(3))
    sums = clipper.take()
    assert [one.shape for one in sums] == [p.shape for p in clipper.parameters]
    assert not any(one.any() for one in sums)


def test_sums_add_up_until_they_are_taken_and_no_two_share_memory() -> None:
    model, x, y = made("lstm")
    once, thrice = (Clipper(model, functional.cross_entropy, 0.3) for _ in range(2))
    once.add(x, y, RAGGED, 6)
    for _ in range(3):
        thrice.add(x, y, RAGGED, 6)
    first, three = once.take(), thrice.take()
    assert_alike(three, [3 * one for one in first])
    assert not any(one.any() for one in thrice.take())
    before = [one.clone() for one in first]
    for at, one in enumerate(first):  # noise is added in place: it must reach one parameter only
        one += 1.0
        assert all(torch.equal(other, kept) for other, kept in zip(first[at + 1 :], before[at + 1 :], strict=True))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=RECORDS), st.floats(1e-3, 10), st.sampled_from(["mean", "sum"]))
@settings(max_examples=15, deadline=None)
def test_no_unit_adds_more_than_clip_norm(owners: list[int], clip_norm: float, per_unit: Any) -> None:
    model, x, y = made("linear-steps")
    clipper = Clipper(model, functional.cross_entropy, clip_norm, per_unit=per_unit)
    n, units = len(owners), torch.tensor(owners)
    norms = clipper.add(x[:n], y[:n], units, 5)
    whole = clipper.take()
    for unit in range(5):
        own = units == unit
        alone = clipper.add(x[:n][own], y[:n][own], torch.zeros(int(own.sum()), dtype=torch.int64), 1)
        parts = clipper.take()
        length = float(torch.cat([part.flatten() for part in parts]).norm())
        assert length <= clip_norm * (1 + 1e-5)
        assert length == pytest.approx(min(clip_norm, float(norms[unit])), rel=1e-3, abs=1e-6)
        assert float(alone) == pytest.approx(float(norms[unit]), rel=1e-3, abs=1e-6)
        whole = [one - part for one, part in zip(whole, parts, strict=True)]
    assert all(one.abs().max() < 1e-4 * clip_norm for one in whole)


@pytest.mark.parametrize("gap", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 0.0])
def test_positions_that_cancel_do_not_slip_through_the_clip(gap: float) -> None:
    """Ghost norms in single precision said 0 of a gradient that was then added whole, at 37 times clip_norm."""
    torch.manual_seed(0)
    model = Fn(lambda net, x: (net.layer(x)[:, 0] - net.layer(x)[:, 1]).sum(1) * 1e4, layer=nn.Linear(40, 30))
    clipper = Clipper(model, lambda output, _: output.mean(), 1.0)
    x = torch.randn(16, 1, 40).repeat(1, 2, 1)
    x[:, 1] += gap * torch.randn(16, 40)
    for one in x.split(1):
        clipper.add(one, one, torch.zeros(1, dtype=torch.int64), 1)
        assert torch.cat([part.double().flatten() for part in clipper.take()]).norm() < 1.001


def test_the_model_is_left_as_it_was() -> None:
    model, x, y = made("attention")
    before = {name: dict(vars(layer)) for name, layer in model.named_modules()}
    Clipper(model, functional.cross_entropy, 1.0).add(x, y, RAGGED, 6)
    assert all(vars(layer).keys() == before[name].keys() for name, layer in model.named_modules())
    assert not any(layer._forward_hooks or layer._backward_hooks for layer in model.modules())


def positions() -> nn.Module:
    """Adds a row for each position, the same for all records."""
    at = torch.arange(4)
    return mean_of(
        Fn(lambda net, x: net.inside(x) + net.rows(at), inside=nn.Linear(6, 6), rows=nn.Embedding(4, 6)), width=4
    )


MIXING: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "batch statistics": (
        lambda: nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False, track_running_stats=False), nn.Linear(8, 3)
        ),
        numbers(6),
    ),
    "positions": (positions, numbers(4, 6)),
    "positions of as many": (positions, lambda: torch.randn(4, 4, 6)),
    "records as time": (lambda: attention(time_first_wrongly), numbers(RECORDS, 8)),
    "a parameter elsewhere": (
        lambda: Fn(lambda net, x: functional.linear(net.layer(x), net.layer.weight)[:, :3], layer=nn.Linear(6, 6)),
        numbers(6),
    ),
    "changed after use": (lambda: nn.Sequential(Fn(changes, layer=nn.Linear(6, 6)), nn.Linear(6, 3)), numbers(6)),
    "packed": (
        lambda: Fn(
            lambda net, x: net.layer(nn.utils.rnn.pack_padded_sequence(x, [4] * len(x), batch_first=True))[1][0],
            layer=nn.GRU(5, 3, batch_first=True),
        ),
        numbers(4, 5),
    ),
    "folded": (
        lambda: Fn(lambda net, x: net.layer(x.flatten(0, 1)).view(len(x), 4, 3).mean(1), layer=nn.Linear(6, 3)),
        numbers(4, 6),
    ),
}


def time_first_wrongly(net: Any, x: Tensor) -> Tensor:
    return net.head(net.attend(x, x, x, need_weights=False)[0].mean(1))


def changes(net: Any, x: Tensor) -> Tensor:
    said = net.layer(x)
    x.mul_(2)
    return said


@pytest.mark.parametrize("name", MIXING)
def test_a_model_that_mixes_records_is_refused(name: str) -> None:
    torch.manual_seed(1)
    model, x = MIXING[name][0](), MIXING[name][1]()
    clipper = Clipper(model, functional.cross_entropy, 1.0)
    with pytest.raises(PlanRefused):
        clipper.add(x, torch.zeros(len(x), dtype=torch.int64), torch.arange(len(x)), len(x))
    assert not any("forward" in vars(layer) for layer in model.modules())


def test_a_loss_with_class_weights_is_refused() -> None:
    model, x, y = made("linear")
    y[:3] = torch.arange(3)
    clipper = Clipper(model, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0])), 1.0)
    with pytest.raises(PlanRefused, match="not the mean"):
        clipper.add(x, y, RAGGED, 6)


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "max_norm": lambda: nn.Embedding(4, 3, max_norm=1.0),
    "by frequency": lambda: nn.Embedding(4, 3, scale_grad_by_freq=True),
    "projected": lambda: nn.LSTM(4, 3, proj_size=2),
    "bias_kv": lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True),
    "running": lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_without_an_exact_clip_is_refused_at_once(name: str) -> None:
    with pytest.raises(PlanRefused):
        Clipper(REFUSED[name](), functional.cross_entropy, 1.0)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clip_norm_that_bounds_nothing_is_refused(clip_norm: float) -> None:
    with pytest.raises(PlanRefused, match="clip_norm"):
        Clipper(nn.Linear(2, 2), functional.cross_entropy, clip_norm)


class Scaled(nn.Linear):
    """Not a Linear layer: its forward is its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Token(nn.Module):
    """A parameter of its own beside a layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.inner = nn.Parameter(torch.randn(6)), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.token).tanh()


STRANGE: dict[str, Callable[[], nn.Module]] = {
    "own forward": lambda: Scaled(6, 6),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
    "weight of its own": lambda: nn.PReLU(6),
    "token": Token,
}


@pytest.mark.parametrize("name", STRANGE)
def test_only_layers_that_are_what_they_say_have_a_rule(name: str) -> None:
    assert rule(nn.Linear(6, 6)) is not None
    assert rule(STRANGE[name]()) is None


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_what_opacus_does_not_see_is_refused() -> None:
    model = Fn(
        lambda net, x: net.head(net.strange(x) @ net.head.weight.T @ net.head.weight),
        strange=nn.PReLU(6),
        head=nn.Linear(6, 3),
    )
    clipper = Clipper(model, functional.cross_entropy, 0.3, notice=lambda _: None)
    with pytest.raises(PlanRefused, match="does not see"):
        clipper.add(torch.randn(RECORDS, 6), torch.randint(0, CLASSES, (RECORDS,)), RAGGED, 6)


@pytest.mark.parametrize("name", ["own forward", "weight of its own", "token"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_any_other_layer_is_left_to_opacus_with_a_notice(name: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(STRANGE[name](), nn.Linear(6, CLASSES))
    x, y, heard = torch.randn(RECORDS, 6), torch.randint(0, CLASSES, (RECORDS,)), list[str]()
    want, norms = clipped(one_by_one(model, x, y), RAGGED, 6, 0.3, "mean")
    clipper = Clipper(model, functional.cross_entropy, 0.3, notice=heard.append)
    assert len(heard) == 1
    assert "Layer 0" in heard[0]
    assert torch.allclose(clipper.add(x, y, RAGGED, 6), norms, rtol=1e-4)
    assert_alike(clipper.take(), want)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_notice_is_logged_by_default(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Clipper(nn.Sequential(nn.PReLU(6), nn.Linear(6, CLASSES)), functional.cross_entropy, 0.3)
    assert "Opacus" in caplog.text


def test_dropout_follows_the_mode_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES))
    x, y = torch.randn(RECORDS, 6), torch.randint(0, CLASSES, (RECORDS,))
    clipper = Clipper(model, functional.cross_entropy, 1.0)
    said = [(clipper.add(x, y, RAGGED, 6), clipper.take())[0] for _ in range(2)]
    assert not torch.equal(*said)
    model.eval()
    said = [(clipper.add(x, y, RAGGED, 6), clipper.take())[0] for _ in range(2)]
    assert torch.equal(*said)


def test_opacus_is_imported_only_where_it_is_needed() -> None:
    script = (
        "import sys, torch; from cloister_client.clipping import Clipper;"
        "Clipper(torch.nn.Linear(2, 2), torch.nn.functional.mse_loss, 1.0); sys.exit('opacus' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("terms", [{}, {"at_once": 5}, {"buckets": (16,)}])
def test_a_gpu_says_the_same(name: str, terms: dict[str, Any]) -> None:
    model, x, y = made(name)
    clipper = Clipper(model, functional.cross_entropy, 0.3)
    norms = clipper.add(x, y, RAGGED, 6)
    want = clipper.take()
    model.to("cuda")
    there = Clipper(model, functional.cross_entropy, 0.3, **terms)
    assert torch.allclose(there.add(x.cuda(), y.cuda(), RAGGED.cuda(), 6).cpu(), norms, rtol=2e-3)
    assert_alike([one.cpu() for one in there.take()], want, within=2e-3)


# --- a hostile model ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("records_each", [1, 2], ids=["records", "patients"])
def test_a_gradient_is_clipped_though_what_was_asked_has_no_square_in_single_precision(records_each):
    """Hidden units of 1e18 times slopes of 2e-23: the square of the latter is 0, and the norm was taken for 0 too."""
    units, count = torch.arange(4096) // records_each, 4096 // records_each
    model = nn.Sequential(nn.Linear(1, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model[0].weight.fill_(2.2e18)
        model[2].bias.fill_(1.0)
        model[4].weight.fill_(1.0)
        model[4].bias.fill_(-64 - 43.75)

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(output.squeeze(1), y)

    x = torch.zeros(4096, 1)
    x[:records_each] = 1.0  # of one unit alone
    clipper = Clipper(model, loss, 1.0)
    norms = clipper.add(x, torch.zeros(4096), units, count)
    moved = torch.cat([total.flatten() for total in clipper.take()]).double().norm()
    assert norms[0] > 10
    assert moved < 1.0001


def test_whether_a_model_is_refused_does_not_depend_on_rows():
    """Of two inputs a standardised weight has no direction left to move: what Opacus finds is rounding."""
    for seed in range(20):
        torch.manual_seed(seed)
        model = nn.Sequential(StandardisedLinear(2, 4), nn.ReLU(), nn.Linear(4, CLASSES))
        clipper = Clipper(model, nn.CrossEntropyLoss(), 1.0, notice=lambda _: None)
        clipper.add(torch.randn(64, 2), torch.randint(CLASSES, (64,)), torch.arange(64), 64)


def test_a_patient_whose_records_cancel_moves_nothing():
    """Its gradient is zero, and so is not scaled down; added record by record it took all others' low bits away."""
    count, each, hidden = 64, 8, 4
    model = nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model[0].bias.fill_(-1.0)
        model[2].bias.fill_(1e-30)
        model[4].weight.fill_(1e10)

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(output.squeeze(1), y)

    def clipped(units: Tensor) -> Tensor:
        y = torch.where(units == count - 1, torch.arange(len(units)) % 2, 0).float()
        clipper = Clipper(model, loss, 1.0)
        clipper.add(torch.ones(len(units), 1), y, units, int(units.max()) + 1)
        return torch.cat([total.flatten() for total in clipper.take()]).double()

    units = torch.arange(count * each) // each
    assert (clipped(units) - clipped(units[:-each])).norm() < 1e-3
