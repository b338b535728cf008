"""Book-keeping: one forward pass that keeps what came into each layer, one backward that says what was asked of it.

No weight's gradient is computed on the way: ``norms`` makes from both each unit's norm, and then the clipped sum.
A layer takes part by a rule, which gives it another ``forward`` for the time of one pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import functional

from cloister_client.norms import Convolution, Convolved, Direct, Looked, Outer, Use
from cloister_client.recurrent import GRU, LSTM
from cloister_shared.errors import PlanRefused

Made = Callable[..., list[Use]]

_LEAF: type = type(get_gradient_edge(torch.zeros((), requires_grad=True)).node)
"""Where autograd leaves a parameter's gradient."""


@dataclass
class Tape:
    """What a forward pass leaves behind: where to ask for gradients, and what follows from them."""

    place: dict[nn.Parameter, int]
    """The trained parameters' positions."""
    closed: bool = False
    """Whether the model is a row of torch's own layers, whose passes are all alike: one look at the way back does."""
    sealed: bool = field(default=False, init=False)
    """Whether it was looked at."""
    records: int = 0
    edges: list[GradientEdge] = field(default_factory=list)
    made: list[tuple[int, Made]] = field(default_factory=list)
    """How many of the edges are whose, in order."""
    sources: dict[Node, Node | None] = field(default_factory=dict)
    """From a layer's last step to what came before the layer: the way back that leads around its parameters."""
    kept: list[tuple[Tensor, int]] = field(default_factory=list)

    def keep(self, said: Tensor | Sequence[Tensor], came: Tensor, made: Made) -> None:
        """Note a layer's use: ``made`` turns the gradients of what it ``said`` into uses of its parameters."""
        tensors = [said] if isinstance(said, Tensor) else list(said)
        for tensor in tensors:
            # By edge, not by tensor: the model may go on to change the tensor in place.
            if tensor.grad_fn is None:
                self.edges.append(get_gradient_edge(tensor))
            else:
                self.edges.append(GradientEdge(tensor.grad_fn, tensor.output_nr))
                self.sources[tensor.grad_fn] = came.grad_fn
        self.made.append((len(tensors), made))
        self.kept.append((came, came._version))

    def at(self, *parameters: Tensor | None) -> tuple[tuple[int, torch.Size], ...]:
        """Positions and shapes of those that are trained."""
        return tuple((self.place[p], p.shape) for p in parameters if isinstance(p, nn.Parameter) and p in self.place)

    def check(self, layer: nn.Module, records: int) -> None:
        """Refuse a layer whose rows are not the records."""
        if records != self.records:
            raise PlanRefused(
                f"{type(layer).__name__} is given {records} rows for {self.records} records, so that a clip cannot"
                " tell whose gradient is whose.",
                mend="Give each layer the records as its first dimension (recurrent and attention layers: as their"
                " batch), expanding what they share.",
            )

    def start(self, records: int) -> None:
        """Begin anew, with a pass of so many records."""
        self.records = records
        for held in (self.edges, self.made, self.sources, self.kept):
            held.clear()

    def outside(self, loss: Tensor) -> bool:
        """Whether a trained parameter was used otherwise than by its layer, where no clip sees it."""
        ahead, seen = [loss.grad_fn], set[Node]()
        while ahead:
            node = ahead.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node in self.sources:
                ahead.append(self.sources[node])
            elif isinstance(node, _LEAF):
                if getattr(node, "variable") in self.place:  # noqa: B009 (a leaf's node has it, Node's type has not)
                    return True
            else:
                ahead.extend(before for before, _ in node.next_functions)
        return False

    def uses(self, objective: Tensor) -> list[Use]:
        """The backward pass."""
        if not self.sealed and self.outside(objective):
            raise PlanRefused(
                "The model uses a layer's parameter outside of that layer, where no clip sees it.",
                mend="Call the layer, or give the function a layer of its own.",
            )
        if any(tensor._version != version for tensor, version in self.kept):
            raise PlanRefused(
                "The model changes what came into a layer after the layer used it.", mend="Use inplace=False there."
            )
        self.sealed = self.closed
        asked = iter(torch.autograd.grad(objective, self.edges, allow_unused=True) if self.edges else ())
        found: list[Use] = []
        for count, made in self.made:
            gradients = [next(asked) for _ in range(count)]
            if all(gradient is not None for gradient in gradients):
                found += made(*gradients)
        self.start(0)
        return found


Forward = Callable[..., Any]
Rule = Callable[[Any, Tape], Forward]


def steps(tensor: Tensor) -> Tensor:
    """[records, …, width] as [records, T, width], or as it is without anything between."""
    return tensor if tensor.dim() == 2 else tensor.flatten(1, -2)


def _linear(layer: nn.Linear, tape: Tape) -> Forward:
    weight, bias = layer.weight, layer.bias  # a module finds its parameters slowly
    weights, biases = tape.at(weight), tape.at(bias)

    def forward(x: Tensor) -> Tensor:
        said = functional.linear(x, weight, bias)
        tape.check(layer, x.shape[0] if x.dim() > 1 else 1)
        kept = x if weights else x[..., :0]
        tape.keep(said, x, lambda asked: [Outer(steps(kept), steps(asked), weights, biases)])
        return said

    return forward


def _convolution(layer: Convolution, tape: Tape) -> Forward:
    original = type(layer).forward
    weight, bias = (next(iter(tape.at(p)), (None,))[0] for p in (layer.weight, layer.bias))

    def forward(x: Tensor) -> Tensor:
        said, came = original(layer, x), x.detach()  # type: ignore[arg-type]
        tape.check(layer, len(x) if x.dim() == layer.weight.dim() else 1)
        padding = layer.padding
        if layer.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            came = functional.pad(came, layer._reversed_padding_repeated_twice, mode)
            padding = (0,) * len(layer.stride)
        tape.keep(said, x, lambda asked: [Convolved(layer, came, asked, padding, weight, bias)])
        return said

    return forward


def _embedding(layer: nn.Embedding, tape: Tape) -> Forward:
    if layer.max_norm is not None or layer.scale_grad_by_freq:
        raise PlanRefused("An Embedding with max_norm or scale_grad_by_freq mixes records.", mend="Leave them out.")
    ((at, shape),) = tape.at(layer.weight)

    def forward(words: Tensor) -> Tensor:
        tape.check(layer, len(words))
        said = functional.embedding(words, layer.weight, layer.padding_idx)

        def made(asked: Tensor) -> list[Use]:
            if layer.padding_idx is not None:
                asked = asked.masked_fill((words == layer.padding_idx).unsqueeze(-1), 0)
            return [Looked(at, shape, words.flatten(1) if words.dim() > 1 else words[:, None], asked.flatten(1, -2)
                           if words.dim() > 1 else asked[:, None])]  # fmt: skip

        tape.keep(said, words, made)
        return said

    return forward


def _by_group(layer: nn.GroupNorm | nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d, tape: Tape) -> Forward:
    """All records as channels of one, each with its copy of weight and bias: gradients come record by record."""
    if getattr(layer, "track_running_stats", False):
        raise PlanRefused("A layer with running statistics cannot be clipped.", mend="Use track_running_stats=False.")
    trained = tape.at(layer.weight, layer.bias)
    groups = layer.num_groups if isinstance(layer, nn.GroupNorm) else layer.num_features

    def forward(x: Tensor) -> Tensor:
        n, channels = x.shape[:2]
        tape.check(layer, n)
        copies = [
            None if part is None else part.detach().repeat(n).requires_grad_(part in tape.place)
            for part in (layer.weight, layer.bias)
        ]
        as_one = x.reshape(1, n * channels, *x.shape[2:])
        said = functional.group_norm(as_one, n * groups, copies[0], copies[1], layer.eps)
        asked_of = [copy for copy in copies if copy is not None and copy.requires_grad]
        tape.keep(
            asked_of,
            x,
            lambda *asked: [
                Direct(at, shape, each.view(n, channels)) for (at, shape), each in zip(trained, asked, strict=True)
            ],
        )
        return said.view_as(x)

    return forward


def _by_position(layer: nn.LayerNorm | nn.RMSNorm, tape: Tape) -> Forward:
    original = type(layer).forward
    weight, bias = tape.at(layer.weight), tape.at(getattr(layer, "bias", None))
    dims = len(layer.normalized_shape)

    def forward(x: Tensor) -> Tensor:
        tape.check(layer, len(x) if x.dim() > dims else 1)
        said, came = original(layer, x), x.detach()  # type: ignore[arg-type]

        def made(asked: Tensor) -> list[Use]:
            found: list[Use] = []
            between = list(range(1, asked.dim() - dims))
            if weight:
                if isinstance(layer, nn.LayerNorm):
                    each = functional.layer_norm(came, layer.normalized_shape, eps=layer.eps)
                else:
                    each = functional.rms_norm(came, layer.normalized_shape, eps=layer.eps)
                each.mul_(asked)
                found.append(Direct(*weight[0], each.sum(between) if between else each))
            if bias:
                found.append(Direct(*bias[0], asked.sum(between) if between else asked))
            return found

        tape.keep(said, x, made)
        return said

    return forward


def _recurrent(layer: nn.LSTM | nn.GRU, tape: Tape) -> Forward:
    if layer.proj_size:
        raise PlanRefused("An LSTM with proj_size cannot be clipped.", mend="Leave proj_size out; add a Linear layer.")
    directions = 2 if layer.bidirectional else 1
    one = _lstm if isinstance(layer, nn.LSTM) else _gru

    def forward(x: Tensor, start: Any = None) -> tuple[Tensor, Any]:
        if not isinstance(x, Tensor) or x.dim() != 3:
            raise PlanRefused(
                "A recurrent layer is given packed or unbatched sequences, which cannot be clipped.",
                mend="Pad them to one length and read off each record's last step.",
            )
        x = x.transpose(0, 1) if layer.batch_first else x
        n = x.shape[1]
        tape.check(layer, n)
        starts = start if isinstance(start, tuple) else (start,)
        shape = (layer.num_layers * directions, n, layer.hidden_size)
        states = [x.new_zeros(shape) if state is None else state for state in starts]
        if isinstance(layer, nn.LSTM) and start is None:
            states = [states[0], states[0]]
        last: list[list[Tensor]] = []
        for depth in range(layer.num_layers):
            said: list[Tensor] = []
            for back in range(directions):
                names = [
                    f"{part}_l{depth}{'_reverse' * back}" for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                ]
                weights = [getattr(layer, name, None) for name in names]
                came = (x.flip(0) if back else x).contiguous()
                outs, *ends = one(came, [state[depth * directions + back] for state in states], weights, tape)
                said.append(outs.flip(0) if back else outs)
                last.append(ends)
            x = torch.cat(said, dim=2) if directions == 2 else said[0]
            if layer.dropout and depth + 1 < layer.num_layers:
                x = functional.dropout(x, layer.dropout, layer.training)
        ends = [torch.stack(parts) for parts in zip(*last, strict=True)]
        said_all = x.transpose(0, 1) if layer.batch_first else x
        return said_all, tuple(ends) if isinstance(layer, nn.LSTM) else ends[0]

    return forward


def _asks(tensor: Tensor) -> Tensor:
    """So that a gradient can be asked of it, whatever is frozen."""
    return tensor if tensor.requires_grad else tensor.requires_grad_()


def _before(start: Tensor, said: Tensor) -> Tensor:
    return torch.cat([start.detach()[None], said.detach()[:-1]])


def _lstm(x: Tensor, start: list[Tensor], weights: list[Any], tape: Tape) -> tuple[Tensor, ...]:
    w_ih, w_hh, b_ih, b_hh = weights
    gates = _asks(functional.linear(x, w_ih, None if b_ih is None else b_ih + b_hh))
    said, last, cell = LSTM.apply(gates, *start, x.detach(), tuple(weights))  # type: ignore[misc]
    before, came = _before(start[0], said), x.detach()

    def made(asked: Tensor) -> list[Use]:
        kept = [part for weight, part in ((w_ih, came), (w_hh, before)) if weight in tape.place]
        columns = torch.cat(kept, dim=2) if kept else came[..., :0]
        return [Outer(columns.transpose(0, 1), asked.transpose(0, 1), tape.at(w_ih, w_hh), tape.at(b_ih, b_hh))]

    tape.keep(gates, x, made)
    return said, last, cell


def _gru(x: Tensor, start: list[Tensor], weights: list[Any], tape: Tape) -> tuple[Tensor, ...]:
    w_ih, w_hh, b_ih, b_hh = weights
    gates = _asks(functional.linear(x, w_ih, b_ih))
    # A tensor of its own even where b_hh is frozen or absent: w_hh's gradient is asked of it.
    inner = _asks(x.new_zeros(1) if b_hh is None else b_hh.detach()).expand_as(gates)
    said, last = GRU.apply(gates, inner, *start, x.detach(), tuple(weights))  # type: ignore[misc]
    before, came = _before(start[0], said), x.detach()

    def made(outer: Tensor, inside: Tensor) -> list[Use]:
        found: list[Use] = []
        for kept, asked, weight, bias in ((came, outer, w_ih, b_ih), (before, inside, w_hh, b_hh)):
            if tape.at(weight, bias):
                kept = kept if weight in tape.place else kept[..., :0]  # noqa: PLW2901
                found.append(Outer(kept.transpose(0, 1), asked.transpose(0, 1), tape.at(weight), tape.at(bias)))
        return found

    tape.keep([gates, inner], x, made)
    return said, last


def _attention(layer: nn.MultiheadAttention, tape: Tape) -> Forward:
    if layer.bias_k is not None or layer.bias_v is not None or layer.add_zero_attn:
        raise PlanRefused("Attention with add_bias_kv or add_zero_attn cannot be clipped.", mend="Leave them out.")
    width, heads = layer.embed_dim, layer.num_heads

    def project(x: Tensor, first: int, parts: int) -> Tensor:
        """Of queries, keys and values those from ``first`` on."""
        rows = slice(first * width, (first + parts) * width)
        if layer.in_proj_weight is not None:
            weight, used = layer.in_proj_weight, layer.in_proj_weight[rows]
        else:
            weight = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)[first]
            used = weight
        bias = layer.in_proj_bias
        said, came = functional.linear(x, used, None if bias is None else bias[rows]), x.detach()
        weights, biases = tape.at(weight), tape.at(bias)
        if weights or biases:
            kept = came if weights else came[..., :0]
            tape.keep(said, x, lambda asked: [Outer(kept, asked, weights, biases, rows)])
        return said

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.dim() != 3 or query.is_nested:
            raise PlanRefused("Attention is given unbatched or nested sequences.", mend="Pad them to one length.")
        alike = query is key and key is value
        if not layer.batch_first:
            query, key, value = (each.transpose(0, 1) for each in (query, key, value))
        for each in (query, key, value):
            tape.check(layer, len(each))
        n, length = query.shape[:2]
        if alike and layer.in_proj_weight is not None:
            projected = project(query, 0, 3).chunk(3, dim=-1)
        else:
            projected = tuple(project(each, at, 1) for at, each in enumerate((query, key, value)))
        q, k, v = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in projected)
        mask = _mask(attn_mask, key_padding_mask, q, k)
        dropout = layer.dropout if layer.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = (q / q.shape[-1] ** 0.5) @ k.mT
            weights = functional.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            said = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            said = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
        said = layer.out_proj(said.transpose(1, 2).reshape(n, length, width))
        return said if layer.batch_first else said.transpose(0, 1), weights

    return forward


def _mask(attn: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Both masks as one that is added to the scores [n, heads, L, S]."""
    whole: Tensor | None = None
    for mask, at in ((attn, "attn"), (padding, "padding")):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = q.new_zeros(mask.shape).masked_fill_(mask, float("-inf"))  # noqa: PLW2901
        if at == "padding":
            mask = mask.view(len(q), 1, 1, -1)  # noqa: PLW2901
        elif mask.dim() == 3:
            mask = mask.view(len(q), -1, q.shape[2], k.shape[2])  # noqa: PLW2901
        whole = mask if whole is None else whole + mask
    return whole


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.Embedding: _embedding,
    nn.GroupNorm: _by_group,
    nn.InstanceNorm1d: _by_group,
    nn.InstanceNorm2d: _by_group,
    nn.InstanceNorm3d: _by_group,
    nn.LayerNorm: _by_position,
    nn.RMSNorm: _by_position,
    nn.LSTM: _recurrent,
    nn.GRU: _recurrent,
    nn.MultiheadAttention: _attention,
}


_NAMES = re.compile(r"(weight|bias)(_[ih][hr]_l\d+(_reverse)?)?|in_proj_(weight|bias)|[qkv]_proj_weight|bias_[kv]")


def rule(layer: nn.Module) -> Rule | None:
    """The rule of a layer that is exactly what it says, or None.

    A subclass with a forward of its own is another layer, and so is one whose weight is made from others.
    """
    names = [name for name, _ in layer.named_parameters(recurse=False)]
    if "forward" in vars(layer) or hasattr(layer, "parametrizations") or not all(map(_NAMES.fullmatch, names)):
        return None
    for kind, found in RULES.items():
        if isinstance(layer, kind):
            same = ("forward", "_conv_forward") if found is _convolution else ("forward",)
            return found if all(getattr(type(layer), name) is getattr(kind, name) for name in same) else None
    return None


def played(model: nn.Module, x: Tensor, tape: Tape, layers: Sequence[tuple[nn.Module, Forward]]) -> Tensor:
    """What the model says of x, with the layers' uses on the tape."""
    tape.start(len(x))
    for layer, forward in layers:
        vars(layer)["forward"] = forward
    try:
        return model(x)
    finally:
        for layer, _ in layers:
            vars(layer).pop("forward", None)
