"""Per-unit clipped gradients from one backward pass: book-keeping (Bu, Wang, Zha and Karypis 2023).

Opacus makes every record's gradient of every weight, which takes memory and time that grow with the model. A clip
needs only their norms, and those follow from what came into each layer and what was asked of what it said. So:
one ordinary forward pass that keeps the former, one backward pass that makes the latter and no weight's gradient,
the norms, and then each weight's gradient once, already clipped and summed.

The sums are those of Opacus's hooks: noise of noise_multiplier * clip_norm goes on top of ``Clipper.take``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from math import isfinite
from typing import Literal

import torch
from torch import Tensor, nn

from cloister_client.bookkeeping import Forward, Tape, played, rule
from cloister_client.norms import Direct, Units, Use, settled
from cloister_client.row import Row, is_row
from cloister_shared.errors import PlanRefused

log = logging.getLogger(__name__)

Loss = Callable[[Tensor, Tensor], Tensor]
"""The task's mean loss over records, of the model's output and the targets."""

Objective = Callable[[Tensor], Tensor]
"""What a gradient is asked of: a number made from the model's output."""

HUGE = 1e30
"""A norm beyond this counts as none: what scales it down would be lost in single precision."""

PROBED = 4
"""Records by which a model is tried before the first batch."""


class Clipper:
    """Clips each unit's gradient to ``clip_norm`` in l2 and sums, batch by batch, until the sums are taken.

    A unit is a record, or a patient with several. A unit whose norm is not finite adds exactly nothing. The model
    stays as it is: plain layers, no hooks (unless Opacus must be asked), its own ``train`` or ``eval`` mode.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        clip_norm: float,
        *,
        per_unit: Literal["mean", "sum"] = "mean",
        at_once: int | None = None,
        buckets: Sequence[int] = (),
        notice: Callable[[str], object] = log.warning,
    ) -> None:
        """``per_unit`` is what is clipped: the mean or the sum of the gradients of a unit's records.

        ``at_once`` bounds how many records pass the model together (a unit is never split: one with more passes
        alone). ``buckets`` are sizes to which batches are filled up by rows that count for nothing, where a fixed
        shape is worth it. Neither changes the result. ``notice`` hears if Opacus has to do the work.

        Raises:
            PlanRefused: clip_norm is not positive, or a layer cannot be clipped.
        """
        if not (isfinite(clip_norm) and clip_norm > 0):
            raise PlanRefused(f"Expected a positive and finite clip_norm, got {clip_norm}.", mend="Mend privacy.")
        self._model, self._loss, self._clip_norm, self._mean = model, loss, clip_norm, per_unit == "mean"
        self._at_once, self._buckets, self._probed = at_once, sorted(buckets), False
        self.parameters: list[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
        """What is trained; a frozen parameter has no part in norms or sums."""
        self._place = {parameter: at for at, parameter in enumerate(self.parameters)}
        self._sums: list[Tensor | None] = [None] * len(self.parameters)
        self._tape = Tape(self._place, closed=is_row(model))
        self._layers: list[tuple[nn.Module, Forward]] = []
        for name, layer in model.named_modules():
            inner = isinstance(layer, nn.MultiheadAttention)  # reads its out_proj's weight past that layer's forward
            if all(parameter not in self._place for parameter in layer.parameters(recurse=inner)):
                continue
            found = rule(layer)
            if found is None:
                notice(
                    f"Layer {name or 'model'} ({type(layer).__name__}) has no fast clip: Opacus's hooks clip the whole"
                    " model instead, with the same result in more time and memory."
                )
                self._uses = _opacus(model, self._place)
                break
            self._layers.append((layer, found(layer, self._tape)))
        else:
            self._uses = Row(model, self._tape, dict(self._layers)).uses if self._tape.closed else self._booked

    def add(self, x: Tensor, y: Tensor, units: Tensor, count: int) -> Tensor:
        """Add the clipped gradients of ``count`` units to the sums; their norms before the clip, [count].

        ``x`` and ``y`` are [records, ...]; ``units`` is int64 [records], each in 0..count-1. A unit without a record
        has norm 0. Norms are those of the mean or sum that is clipped.

        Raises:
            PlanRefused: the model or the loss mixes records, so that no clip bounds what one of them does.
        """
        with torch.no_grad():
            if x.shape[0] and not self._probed:
                some = torch.arange(PROBED, device=x.device) % len(x)
                self._probe(_invented(x[some]), y[some])
                self._probed = True
            if self._at_once is None or x.shape[0] <= self._at_once:
                return self._add(x, y, units, count)
            norms = torch.zeros(count, device=units.device)
            for some, records in _parts(units, count, self._at_once):
                place = units.new_zeros(count)
                place[some] = torch.arange(len(some), device=units.device)
                norms[some] = self._add(x[records], y[records], place[units[records]], len(some))
            return norms

    def take(self) -> list[Tensor]:
        """The sums, one for each of ``parameters``, and begin anew from zero."""
        sums = self._sums
        self._sums = [None] * len(sums)
        return [torch.zeros_like(p) if s is None else s for p, s in zip(self.parameters, sums, strict=True)]

    def _add(self, x: Tensor, y: Tensor, units: Tensor, count: int, *, fill: bool = True) -> Tensor:
        n = x.shape[0]
        if n == 0 or not self.parameters:
            return torch.zeros(count, device=units.device)
        size = next((bucket for bucket in self._buckets if bucket >= n), n) if fill else n
        who, x_all, y_all = Units(units, count), x, y
        if size > n:  # the first record again, as a unit of its own whose factor is 0
            again = torch.cat(
                [torch.arange(n, device=x.device), torch.zeros(size - n, dtype=torch.int64, device=x.device)]
            )
            x_all, y_all = x[again], y[again]
            who = Units(torch.cat([units, units.new_full((size - n,), count)]), count + 1)
        uses = settled(self._uses(x_all, lambda output: self._loss(output, y_all)), who)
        square = uses[0].square(who) if uses else torch.zeros(who.count, device=units.device)
        for use in uses[1:]:
            square = square + use.square(who)
        # The loss is a mean over records: a unit's gradient is so many times what was asked.
        times = size if who.sizes is None or not self._mean else size / who.sizes.clamp(min=1)
        raw = square.sqrt_()
        norms = raw * times
        if not float(norms.max()) < HUGE:
            # As if they were not there: what is not finite spoils sums even times zero.
            finite = norms < HUGE
            uses, there = [], finite[units]
            again = self._add(x[there], y[there], units[there], count, fill=bool(finite[-1]))
            return torch.where(finite[:count], again, norms[:count].to(again.dtype))
        # Of a mean's gradient: times min(1, C / norm).
        factor = raw.clamp_(min=self._clip_norm / times).reciprocal_().mul_(self._clip_norm)
        factor = factor.to(self.parameters[0].dtype)
        if size > n:
            factor[count] = 0
        while uses:
            for at, total in uses.pop().total(who, factor):
                held = self._sums[at]
                self._sums[at] = total if held is None else held.double() + total
        return norms[:count].to(factor.dtype)

    def _booked(self, x: Tensor, objective: Objective) -> list[Use]:
        """What the objective asks of the trained parameters."""
        with torch.enable_grad():
            value = objective(played(self._model, x, self._tape, self._layers))
        return self._tape.uses(value)

    def _probe(self, x: Tensor, y: Tensor) -> None:
        """Refuse a model in which one record's output moves another's gradient, and a loss that is no mean of theirs.

        Such are attention along the wrong dimension, a batch's own statistics, a position's row given for all
        records at once, or a loss with class weights.
        """
        outputs: list[Tensor] = []

        def first(output: Tensor) -> Tensor:
            outputs.append(output.detach())
            return output[0].sum()

        who = Units(torch.arange(len(x), device=x.device), len(x))
        squares = [use.square(who)[1:] for use in settled(self._uses(x, first), who)]
        (output,) = outputs
        if len(output) != len(x) or any(((square > 0) & square.isfinite()).any() for square in squares):
            raise PlanRefused(
                "What the model says of one record depends on other records of the batch, so no clip bounds a record.",
                mend="Keep records apart: no statistics over a batch, and batch_first where x has records first.",
            )
        whole = self._loss(output, y)
        mean = torch.stack([self._loss(output[i : i + 1], y[i : i + 1]) for i in range(len(x))]).mean()
        if whole.isfinite() and not torch.isclose(whole, mean, rtol=1e-3, atol=1e-5):
            raise PlanRefused(
                "The loss of a batch is not the mean of its records' losses, so one record's part depends on others.",
                mend="Use a mean over records, without weights that are normalised over the batch.",
            )


def _invented(x: Tensor) -> Tensor:
    """Numbers in the place of measured ones: whether a model is refused must not tell of a row."""
    if not x.is_floating_point():
        return x
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype).to(x.device)


def _parts(units: Tensor, count: int, at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Units and their records, as many units at a time as have at most so many records."""
    sizes = torch.bincount(units, minlength=count)
    order = torch.argsort(units, stable=True)
    first, start, held = 0, 0, 0
    for at, size in enumerate([*sizes.tolist(), at_once + 1]):
        if held and held + size > at_once:
            yield torch.arange(first, at, device=units.device), order[start : start + held]
            first, start, held = at, start + held, 0
        held += size


def _opacus(model: nn.Module, place: dict[nn.Parameter, int]) -> Callable[[Tensor, Objective], list[Use]]:
    """Opacus's hooks, layer by layer as it sees fit: each record's gradient of each parameter."""
    from opacus.grad_sample import GradSampleModule

    try:
        hooked = GradSampleModule(model, loss_reduction="sum")
    except (NotImplementedError, ValueError) as refused:
        raise PlanRefused(f"The model cannot be clipped: {refused}", mend="Use other layers.") from refused
    hooked.disable_hooks()
    tried = False

    def uses(x: Tensor, objective: Objective) -> list[Use]:
        nonlocal tried
        before = [parameter.grad for parameter in place]
        for parameter in place:
            parameter.grad = None
        hooked.enable_hooks()
        try:
            with torch.enable_grad():
                objective(hooked(x)).backward()
            found: list[Use] = []
            for parameter, at in place.items():
                each: Tensor | None = getattr(parameter, "grad_sample", None)
                if each is not None and len(each) == len(x):
                    found.append(Direct(at, parameter.shape, each))
                # Of invented records alone: rounding in a model made for it would else tell who is in a batch.
                if not tried and parameter.grad is not None and not _adds_up(each, parameter.grad):
                    raise PlanRefused(
                        "Opacus does not see every use of a layer's parameters, so no clip bounds them.",
                        mend="Use layers of torch.nn, each called as a layer.",
                    )
            tried = True
            return found
        finally:
            hooked.disable_hooks()
            for parameter, grad in zip(place, before, strict=True):
                parameter.grad, parameter.grad_sample = grad, None  # type: ignore[attr-defined]

    return uses


def _adds_up(each: Tensor | None, whole: Tensor) -> bool:
    """Whether the records' gradients make the batch's; what is not finite is nobody's proof."""
    if each is None:
        return not whole.any()
    off = (each.sum(0) - whole).norm()
    return bool(off <= 1e-3 * each.flatten(1).norm(dim=1).sum() + 1e-12) or not bool(off.isfinite())
