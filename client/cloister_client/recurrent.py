"""One direction of one layer of an LSTM or GRU whose gradient can be asked of its gates.

torch's fused kernels do not say what is asked of a gate at each step, which is what a clip needs. Forward is
theirs; backward makes all gates anew in one product and walks back through time by hand. Everything is time first.
Equations and the order of gates are torch's (nn.LSTM, nn.GRU).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""w_ih [gates, p], w_hh [gates, h], b_ih and b_hh [gates], as the layer names them."""


def _flat(weights: Weights) -> list[Tensor]:
    return [part.detach() for part in weights if part is not None]


class LSTM(torch.autograd.Function):
    """``forward(gates [T, n, 4h], h0, c0 [n, h], x [T, n, p], weights)`` to all h [T, n, h], last h, last c.

    ``gates`` is x times w_ih plus both biases; it is what the gradient is asked of.
    """

    @staticmethod
    def forward(ctx: Any, gates: Tensor, h0: Tensor, c0: Tensor, x: Tensor, weights: Weights) -> Any:
        """By torch."""
        parts = _flat(weights)
        said, last, cell = torch.lstm(x, [h0[None], c0[None]], parts, len(parts) == 4, 1, 0.0, False, False, False)
        ctx.save_for_backward(gates, h0, c0, said, parts[1])
        return said, last[0], cell[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *asked: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What is asked of the gates and of the first states."""
        gates, h0, c0, said, w_hh = ctx.saved_tensors
        asked_said, dh, dc = asked
        steps, n, width = gates.shape
        size = width // 4
        before = torch.cat([h0[None], said[:-1]])
        opened = torch.addmm(gates.flatten(0, 1), before.flatten(0, 1), w_hh.t()).view(steps, n, 4, size)
        opened[:, :, :2].sigmoid_()
        opened[:, :, 2].tanh_()
        opened[:, :, 3].sigmoid_()
        i, f, g, o = opened.unbind(2)
        cells = gates.new_empty(steps + 1, n, size)
        cells[0] = c0
        for gain, kept, old, new in zip(
            (i * g).unbind(), f.unbind(), cells[:-1].unbind(), cells[1:].unbind(), strict=True
        ):
            torch.addcmul(gain, kept, old, out=new)
        bent = cells[1:].tanh()
        # How h changes with c and o, and c with i, f and g, before each gate's nonlinearity.
        slope = torch.empty_like(opened)
        torch.mul(g * i, 1 - i, out=slope[:, :, 0])
        torch.mul(cells[:-1] * f, 1 - f, out=slope[:, :, 1])
        torch.mul(i, 1 - g * g, out=slope[:, :, 2])
        torch.mul(bent * o, 1 - o, out=slope[:, :, 3])
        through = o * (1 - bent * bent)
        found = torch.empty_like(gates)
        cell_gates, out_gates = found.view(steps, n, 4, size)[:, :, :3].unbind(), found[:, :, 3 * size :].unbind()
        whole, asked_at = found.unbind(), asked_said.unbind()
        cell_slope, out_slope = slope[:, :, :3].unbind(), slope[:, :, 3].unbind()
        through_at, kept_at = through.unbind(), f.unbind()
        dh = dh + asked_at[-1]
        for t in range(steps - 1, -1, -1):
            dc = torch.addcmul(dc, dh, through_at[t])
            torch.mul(dc.unsqueeze(1), cell_slope[t], out=cell_gates[t])
            torch.mul(dh, out_slope[t], out=out_gates[t])
            dh = torch.addmm(asked_at[t - 1], whole[t], w_hh) if t else whole[t] @ w_hh
            dc = dc * kept_at[t]
        return found, dh, dc, None, None


class GRU(torch.autograd.Function):
    """``forward(gates [T, n, 3h], inner [T, n, 3h], h0 [n, h], x [T, n, p], weights)`` to all h and the last.

    ``gates`` is x times w_ih plus b_ih, ``inner`` is b_hh expanded: the reset gate makes their gradients differ.
    """

    @staticmethod
    def forward(ctx: Any, gates: Tensor, inner: Tensor, h0: Tensor, x: Tensor, weights: Weights) -> Any:
        """By torch."""
        parts = _flat(weights)
        said, last = torch.gru(x, h0[None], parts, len(parts) == 4, 1, 0.0, False, False, False)
        ctx.save_for_backward(gates, inner, h0, said, parts[1])
        return said, last[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *asked: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What is asked of the gates and of the first states."""
        gates, inner, h0, said, w_hh = ctx.saved_tensors
        asked_said, dh = asked
        steps, n, width = gates.shape
        size = width // 3
        before = torch.cat([h0[None], said[:-1]])
        hidden = (before.flatten(0, 1) @ w_hh.t()).view_as(gates) + inner
        opened = (gates[..., : 2 * size] + hidden[..., : 2 * size]).sigmoid_()
        r, z = opened.split(size, dim=2)
        inner_new = hidden[..., 2 * size :]
        new = torch.addcmul(gates[..., 2 * size :], r, inner_new).tanh_()
        to_new = (1 - z) * (1 - new * new)
        slope = gates.new_empty(steps, n, 3, size)
        torch.mul(to_new * inner_new, r * (1 - r), out=slope[:, :, 0])
        torch.mul(before - new, z * (1 - z), out=slope[:, :, 1])
        torch.mul(to_new, r, out=slope[:, :, 2])
        found, came = torch.empty_like(gates), torch.empty_like(said)
        parted, whole, slope_at = found.view_as(slope).unbind(), found.unbind(), slope.unbind()
        asked_at, came_at, kept_at = asked_said.unbind(), came.unbind(), z.unbind()
        for t in range(steps - 1, -1, -1):
            torch.add(dh, asked_at[t], out=came_at[t])
            torch.mul(came_at[t].unsqueeze(1), slope_at[t], out=parted[t])
            dh = torch.addmm(came_at[t] * kept_at[t], whole[t], w_hh)
        outer = found.clone()
        torch.mul(came, to_new, out=outer[..., 2 * size :])
        return outer, found, dh, None, None
