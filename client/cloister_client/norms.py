"""How a layer's gradient splits into units, from what book-keeping kept of it: what came in and what was asked back.

A unit is whoever one clip protects: a record, or a patient with all its records. Each class below is one use of a
layer in a forward pass and answers three questions: the squared ℓ² norm of each unit's gradient; the sum of all
gradients, each times its unit's factor; and, where parameters are shared, each unit's gradient itself.

A weight's gradient is a sum of outer products over positions t, Σ g_t ⊗ a_t. Its squared norm is either that of the
matrix, or Σ_ts (a_t·a_s)(g_t·g_s) of two small Gram matrices (Goodfellow 2015; Li et al. 2022), whichever is cheaper
(Bu et al. 2022: Gram where 2T² <= p·d).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

AT_ONCE = 2**20
"""Unfolded numbers of a convolution at a time: what fits a core's cache is also what does not show in memory."""

ROUNDING = 2.0**-21
"""Of the square of all lengths added up: what rounding may take from a squared norm made of Gram matrices."""

Found = list[tuple[int, Tensor]]
"""Tensors with the parameters that they are gradients of, by position."""


@lru_cache(maxsize=8)
def _counting(count: int, device: torch.device) -> Tensor:
    """0, 1, … count - 1; a small step would spend its time on making it anew."""
    return torch.arange(count, device=device)


class Units:
    """Which unit each record belongs to, and the units with equally many records side by side."""

    def __init__(self, of: Tensor, count: int) -> None:
        """``of`` is int64 [records], in 0..count-1; a unit may have no record."""
        self.of, self.count = of, count
        self.alone = count == of.numel() and torch.equal(of, _counting(count, of.device))
        self.sizes: Tensor | None = None
        self.blocks: list[tuple[Tensor, Tensor]] = []
        """Units [u] and their records [u, R], one block for each R that occurs."""
        self.pairs = count
        """How many pairs of records share a unit: what Gram matrices cost."""
        if not self.alone:
            self.sizes = torch.bincount(of, minlength=count)
            order, starts = torch.argsort(of, stable=True), self.sizes.cumsum(0) - self.sizes
            self.pairs = int((self.sizes**2).sum())
            for size in self.sizes.unique().tolist():
                if size:
                    units = (self.sizes == size).nonzero()[:, 0]
                    steps = torch.arange(size, device=of.device)
                    self.blocks.append((units, order[starts[units, None] + steps]))

    def each(self, measure: Callable[..., Tensor], *kept: Tensor) -> Tensor:
        """What ``measure`` says of units' records, [u, R, …] in and [u, …] out, for all units: [count, …]."""
        if self.alone:
            return measure(*(tensor.unsqueeze(1) for tensor in kept))
        whole: Tensor | None = None
        for units, records in self.blocks:
            said = measure(*(tensor[records] for tensor in kept))
            whole = said.new_zeros((self.count, *said.shape[1:])) if whole is None else whole
            whole[units] = said
        return kept[0].new_zeros(self.count) if whole is None else whole

    def sum(self, records: Tensor) -> Tensor:
        """[records, …] summed to [count, …]."""
        if self.alone:
            return records
        return records.new_zeros((self.count, *records.shape[1:])).index_add_(0, self.of, records)

    def records(self, units: Tensor) -> Tensor:
        """[count] as each record has it."""
        return units if self.alone else units[self.of]


class Use(Protocol):
    """One use of a layer's parameters."""

    @property
    def parameters(self) -> tuple[int, ...]:
        """Positions of the parameters whose gradient this is."""
        ...

    def square(self, units: Units) -> Tensor:
        """Squared norm of each unit's gradient, [count]."""
        ...

    def total(self, units: Units, factor: Tensor) -> Found:
        """Σ over units of factor [count] times gradient. Called once, after ``square``."""
        ...

    def per_unit(self, units: Units) -> Found:
        """Each unit's gradient, [count, *shape of the parameter]."""
        ...


def _steps(rows: Tensor) -> Tensor:
    """[records, width] as one step of [records, T, width]."""
    return rows.unsqueeze(1) if rows.dim() == 2 else rows


def _squared(rows: Tensor) -> Tensor:
    """Squared norm over all but the first dimension, without a copy of the squares."""
    return torch.linalg.vector_norm(rows.flatten(1), dim=1).square_()


def _levelled(asked: Tensor) -> tuple[Tensor, Tensor]:
    """Each unit's ``asked`` over its largest value, and that value, [n].

    The square of 1e-23 is zero in single precision. Beside inputs of 1e18, which a hostile model can make, it would
    hide a gradient of any length from the clip.
    """
    within = tuple(range(1, asked.dim()))
    top = asked.abs().amax(within, keepdim=True).clamp_(min=torch.finfo(asked.dtype).tiny)
    return asked / top, top.flatten()


def _gram_square(left: Tensor, right: Tensor, ones: int) -> Tensor:
    """‖Σ_t left_t ⊗ right_t‖² of each [n, T, ·], where left has ``ones`` more columns of ones; never too little.

    Where positions cancel, rounding could leave a norm far too small, even zero, and the clip would bound nothing.
    What single precision can hide is therefore added: ROUNDING times (Σ_t ‖left_t‖ ‖right_t‖)².
    """
    right, top = _levelled(right)
    mine, other = torch.bmm(left, left.mT), torch.bmm(right, right.mT)
    if ones:
        mine += ones
    most = (mine.diagonal(dim1=1, dim2=2) * other.diagonal(dim1=1, dim2=2)).sqrt_().sum(1).square_()
    square = torch.linalg.vecdot(mine.flatten(1), other.flatten(1)).clamp_(min=0).add_(most, alpha=ROUNDING)
    return square.mul_(top).mul_(top)


@dataclass(eq=False)
class Direct:
    """Gradients that are small enough to be kept as they are: [records, …], or [count, …] if ``summed``."""

    parameter: int
    shape: torch.Size
    gradient: Tensor
    summed: bool = False

    @property
    def parameters(self) -> tuple[int, ...]:
        """Whose gradient it is."""
        return (self.parameter,)

    def square(self, units: Units) -> Tensor:
        """Of each unit, [count]."""
        if not self.summed:
            self.gradient, self.summed = units.sum(self.gradient), True
        return _squared(self.gradient)

    def total(self, units: Units, factor: Tensor) -> Found:
        """Clipped and summed."""
        return [(self.parameter, (factor @ self.gradient.flatten(1)).view(self.shape))]

    def per_unit(self, units: Units) -> Found:
        """Each unit's."""
        whole = self.gradient if self.summed else units.sum(self.gradient)
        return [(self.parameter, whole.view(-1, *self.shape))]


@dataclass(eq=False)
class Outer:
    """A linear map: a weight's gradient Σ_t g_t ⊗ a_t and a bias's Σ_t g_t.

    ``came`` is [records, T, p] and ``asked`` [records, T, d], or both without T. Several weights may share
    ``asked``, as in an LSTM: each takes the next of the p columns. ``rows`` is which rows of weights and biases these
    are, as in attention.
    """

    came: Tensor
    asked: Tensor
    weights: tuple[tuple[int, torch.Size], ...]
    biases: tuple[tuple[int, torch.Size], ...]
    rows: slice | None = None
    kept: Tensor | None = field(default=None, init=False)
    kept_bias: Tensor | None = field(default=None, init=False)
    """Of each unit, as ``kept``. What is clipped is what was measured: a unit's records may be huge and cancel, and
    added one by one to the sum they would take everybody's low bits with them."""

    @property
    def parameters(self) -> tuple[int, ...]:
        """Whose gradient it is."""
        return tuple(at for at, _ in (*self.weights, *self.biases))

    @property
    def place(self) -> object:
        """What two uses must share to be one."""
        return self.weights, self.biases, None if self.rows is None else (self.rows.start, self.rows.stop)

    def square(self, units: Units) -> Tensor:
        """Of each unit, [count]."""
        ones = len(self.biases)
        if self.came.dim() == 2 and units.alone:
            # In double precision no square is lost, as in ``_levelled``.
            asked = torch.linalg.vector_norm(self.asked, dim=1, dtype=torch.float64).square_()
            came = torch.linalg.vector_norm(self.came, dim=1, dtype=torch.float64).square_()
            return torch.addcmul(asked, asked, came) if ones else asked * came
        came, asked = _steps(self.came), _steps(self.asked)
        if 2 * came.shape[1] ** 2 * units.pairs <= came.shape[2] * asked.shape[2] * units.count:
            return units.each(lambda a, g: _gram_square(a.flatten(1, 2), g.flatten(1, 2), ones), came, asked)
        self.kept = self._whole(units)
        square = _squared(self.kept)
        if ones:
            self.kept_bias = units.sum(asked.sum(1))
            square = square + ones * _squared(self.kept_bias)
        return square

    def _whole(self, units: Units) -> Tensor:
        came, asked = _steps(self.came), _steps(self.asked)
        return units.each(lambda a, g: torch.bmm(g.flatten(1, 2).mT, a.flatten(1, 2)), came, asked)

    def total(self, units: Units, factor: Tensor) -> Found:
        """Clipped and summed."""
        each, came = units.records(factor), self.came
        if came.dim() == 2:
            asked = self.asked * each.unsqueeze(1)
        else:
            asked = self.asked * each[:, None, None]
            if asked.stride(0) < asked.stride(1):  # kept with time first: flattened in that order it needs no copy
                asked, came = asked.transpose(0, 1), came.transpose(0, 1)
            asked, came = asked.flatten(0, 1), came.flatten(0, 1)
        weight = (
            torch.mm(asked.t(), came)
            if self.kept is None
            else (factor @ self.kept.flatten(1)).view(self.kept.shape[1:])
        )
        bias = asked.sum(0) if self.kept_bias is None else factor @ self.kept_bias
        if self.rows is None and len(self.weights) == 1 and len(self.biases) < 2:
            return [(self.weights[0][0], weight), *((at, bias) for at, _ in self.biases)]
        return self._placed(weight[None], bias[None], lead=())

    def per_unit(self, units: Units) -> Found:
        """Each unit's."""
        return self._placed(self._whole(units), units.sum(_steps(self.asked).sum(1)), lead=(units.count,))

    def _placed(self, weight: Tensor, bias: Tensor, lead: tuple[int, ...]) -> Found:
        """Cut [n, d, p] and [n, d] into parameters, zero outside of ``rows``."""
        found: Found = []
        columns = weight.split([shape[1] for _, shape in self.weights], dim=2) if self.weights else ()
        # Two biases of one sum are two tensors: noise that one of them gets in place must not reach the other.
        biases = [bias if at == 0 else bias.clone() for at in range(len(self.biases))]
        parts = [*zip(self.weights, columns, strict=True), *zip(self.biases, biases, strict=True)]
        for (at, shape), part in parts:
            if self.rows is not None and part.shape[1] != shape[0]:
                whole = part.new_zeros((part.shape[0], *shape))
                whole[:, self.rows] = part
                part = whole  # noqa: PLW2901
            found.append((at, part.reshape((*lead, *shape)).contiguous()))
        return found

    @staticmethod
    def joined(uses: list[Outer]) -> Outer:
        """Several uses of the same parameters are one use with more positions."""
        came = torch.cat([_steps(use.came) for use in uses], dim=1)
        asked = torch.cat([_steps(use.asked) for use in uses], dim=1)
        return Outer(came, asked, uses[0].weights, uses[0].biases, uses[0].rows)


Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(eq=False)
class Convolved:
    """A convolution of any dimension: an outer product over output positions of the unfolded input.

    ``came`` is [records, channels, …], padded already if ``padding`` is zero; ``asked`` is [records, d, …].
    """

    layer: Convolution
    came: Tensor
    asked: Tensor
    padding: tuple[int, ...]
    weight: int | None
    bias: int | None
    kept: Tensor | None = field(default=None, init=False)

    @property
    def parameters(self) -> tuple[int, ...]:
        """Whose gradient it is."""
        return tuple(at for at in (self.weight, self.bias) if at is not None)

    def square(self, units: Units) -> Tensor:
        """Of each unit, [count]."""
        steps = self.asked[0, 0].numel()
        bias = 0.0 if self.bias is None else _squared(units.sum(self.asked.flatten(2).sum(2)))
        if self.weight is None:
            return bias + self.asked.new_zeros(units.count)
        if 2 * steps**2 * units.pairs <= self.layer.weight[0].numel() * self.layer.out_channels * units.count:
            square = units.each(self._in_parts(self._gram), self.came, self.asked)
        else:
            self.kept = self._whole(units)
            square = _squared(self.kept)
        return square + bias

    def _whole(self, units: Units) -> Tensor:
        return units.each(self._in_parts(self._gradient), self.came, self.asked)

    def _in_parts(self, measure: Callable[[Tensor, Tensor, int], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """So many units at a time that their unfolded input stays small."""

        def measured(came: Tensor, asked: Tensor) -> Tensor:
            size = came.shape[1]
            each = size * came.shape[2] * prod(self.layer.kernel_size) * asked[0, 0, 0].numel()
            some = max(1, AT_ONCE // max(1, each))
            parts = zip(came.split(some), asked.split(some), strict=True)
            said = [measure(self._unfolded(a.flatten(0, 1), size), self._steps(g, size), len(a)) for a, g in parts]
            return said[0] if len(said) == 1 else torch.cat(said)

        return measured

    def _gram(self, came: Tensor, asked: Tensor, units: int) -> Tensor:
        return _gram_square(came.mT, asked.mT, 0).view(units, -1).sum(1)

    def _gradient(self, came: Tensor, asked: Tensor, units: int) -> Tensor:
        return torch.bmm(asked, came.mT).view(units, -1)

    def _unfolded(self, came: Tensor, size: int) -> Tensor:
        """[units * size, channels, …] to [units * groups, p, size * T]."""
        layer, flat = self.layer, came
        if flat.dim() == 5:
            if any(self.padding):
                flat = functional.pad(flat, [side for width in reversed(self.padding) for side in (width, width)])
            for at in range(3):
                span = layer.dilation[at] * (layer.kernel_size[at] - 1) + 1
                flat = flat.unfold(2 + at, span, layer.stride[at])[..., :: layer.dilation[at]]
            flat = flat.permute(0, 1, 5, 6, 7, 2, 3, 4).flatten(5).flatten(1, 4)
        else:
            line = (1,) * (2 - len(layer.kernel_size))
            flat = flat if not line else flat.unsqueeze(2)
            none = (0,) * len(line)
            flat = functional.unfold(
                flat,
                (*line, *layer.kernel_size),
                (*line, *layer.dilation),
                (*none, *self.padding),
                (*line, *layer.stride),
            )
        return _grouped(flat, size, layer.groups)

    def _steps(self, asked: Tensor, size: int) -> Tensor:
        return _grouped(asked.flatten(0, 1).flatten(2), size, self.layer.groups)

    def total(self, units: Units, factor: Tensor) -> Found:
        """Clipped and summed."""
        found: Found = []
        each = units.records(factor)
        if self.weight is not None and self.kept is not None:
            found.append((self.weight, (factor @ self.kept).view(self.layer.weight.shape)))
        elif self.weight is not None:
            layer = self.layer
            asked = self.asked * each.view(-1, *[1] * (self.asked.dim() - 1))
            gradient: Tensor = torch.ops.aten.convolution_backward(
                asked, self.came, layer.weight, None, layer.stride, self.padding, layer.dilation, False,
                [0] * len(layer.stride), layer.groups, [False, True, False],
            )[1]  # fmt: skip
            found.append((self.weight, gradient))
        if self.bias is not None:
            found.append((self.bias, each @ self.asked.flatten(2).sum(2)))
        return found

    def per_unit(self, units: Units) -> Found:
        """Each unit's."""
        found: Found = []
        if self.weight is not None:
            found.append((self.weight, self._whole(units).view(-1, *self.layer.weight.shape)))
        if self.bias is not None:
            found.append((self.bias, units.sum(self.asked.flatten(2).sum(2))))
        return found


def _grouped(flat: Tensor, size: int, groups: int) -> Tensor:
    """[units * size, groups * p, T] to [units * groups, p, size * T]."""
    if size == 1:
        return flat.reshape(-1, flat.shape[1] // groups, flat.shape[2])
    split = flat.view(-1, size, groups, flat.shape[1] // groups, flat.shape[2])
    return split.permute(0, 2, 3, 1, 4).flatten(0, 1).flatten(2)


@dataclass(eq=False)
class Looked:
    """An embedding: rows ``asked`` [records, T, d] added at ``words`` [records, T]."""

    parameter: int
    shape: torch.Size
    words: Tensor
    asked: Tensor

    @property
    def parameters(self) -> tuple[int, ...]:
        """Whose gradient it is."""
        return (self.parameter,)

    def square(self, units: Units) -> Tensor:
        """Only the rows that a unit looked up: those of one word are summed before they are squared."""
        owner = units.of[:, None] * self.shape[0] + self.words
        pairs, at = owner.unique(return_inverse=True)
        rows = self.asked.new_zeros((len(pairs), self.shape[1])).index_add_(0, at.flatten(), self.asked.flatten(0, 1))
        return self.asked.new_zeros(units.count).index_add_(0, pairs // self.shape[0], _squared(rows))

    def total(self, units: Units, factor: Tensor) -> Found:
        """Clipped and summed."""
        asked = self.asked * units.records(factor)[:, None, None]
        whole = asked.new_zeros(self.shape)
        return [(self.parameter, whole.index_add_(0, self.words.flatten(), asked.flatten(0, 1)))]

    def per_unit(self, units: Units) -> Found:
        """Each unit's."""
        owner = units.of[:, None] * self.shape[0] + self.words
        whole = self.asked.new_zeros((units.count * self.shape[0], self.shape[1]))
        whole.index_add_(0, owner.flatten(), self.asked.flatten(0, 1))
        return [(self.parameter, whole.view(units.count, *self.shape))]


def settled(uses: list[Use], units: Units) -> list[Use]:
    """The same gradients as uses that no longer share a parameter, so that their squared norms add up."""
    touched = [at for use in uses for at in use.parameters]
    if len(set(touched)) == len(touched):
        return uses
    alike: dict[object, list[Use]] = {}
    for use in uses:
        alike.setdefault(use.place if isinstance(use, Outer) else id(use), []).append(use)
    joined = [Outer.joined(same) if len(same) > 1 else same[0] for same in alike.values()]  # type: ignore[arg-type]
    clashing = {at for at, sharing in _sharing(joined) if not _apart(sharing)}
    if not clashing:
        return joined
    whole: dict[int, Tensor] = {}
    settled: list[Use] = []
    for use in joined:
        if clashing.isdisjoint(use.parameters):
            settled.append(use)
            continue
        for at, gradient in use.per_unit(units):
            whole[at] = whole[at] + gradient if at in whole else gradient
    return settled + [Direct(at, part.shape[1:], part, summed=True) for at, part in whole.items()]


def _sharing(uses: list[Use]) -> Iterator[tuple[int, list[Use]]]:
    for at in {at for use in uses for at in use.parameters}:
        yield at, [use for use in uses if at in use.parameters]


def _apart(uses: list[Use]) -> bool:
    """Whether they touch different rows of the parameter."""
    spans = [(use.rows.start, use.rows.stop) for use in uses if isinstance(use, Outer) and use.rows is not None]
    spans.sort()
    return len(uses) == 1 or (len(spans) == len(uses) and all(left[1] <= right[0] for left, right in pairwise(spans)))
