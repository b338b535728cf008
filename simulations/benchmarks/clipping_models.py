"""Five plain torch models of a hospital's work, each with a batch: what clipping is measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Case:
    """A model, a batch and the task's mean loss; ``hooked`` is the model, or its like for Opacus."""

    model: nn.Module
    hooked: nn.Module
    x: Tensor
    y: Tensor
    loss: nn.Module


class Block(nn.Module):
    """Two convolutions with GroupNorm, and the way past them."""

    def __init__(self, wide: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(wide, out, 3, stride, 1, bias=False), _norm(out))
        self.second = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1, bias=False), _norm(out))
        same = stride == 1 and wide == out
        self.past = nn.Identity() if same else nn.Sequential(nn.Conv2d(wide, out, 1, stride, bias=False), _norm(out))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.second(functional.relu(self.first(x))) + self.past(x))


class Mean(nn.Module):
    """Over all positions: of an image's channels, or of a sequence's features."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims)


class Attention(nn.Module):
    """Self-attention of four Linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A transformer's layer, norms first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        wide = nn.Linear(width, 4 * width)
        self.dense = nn.Sequential(nn.LayerNorm(width), wide, nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.dense(x)


class Sequence(nn.Module):
    """A recurrent layer and what its last step says."""

    def __init__(self, recurrent: nn.Module, width: int) -> None:
        super().__init__()
        self.recurrent, self.head = recurrent, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels), channels)


def mlp() -> Case:
    model = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(0))
    return _case(model, torch.randn(64, 30), torch.randint(0, 2, (64,)).float(), nn.BCEWithLogitsLoss())


def cnn() -> Case:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 16, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1)),
        nn.Sequential(nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Flatten()),
        nn.Sequential(nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10)),
    )
    return _case(model, torch.randn(256, 1, 28, 28), torch.randint(0, 10, (256,)))


def resnet() -> Case:
    stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), _norm(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    blocks: list[nn.Module] = []
    wide = 64
    for out, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [Block(wide, out, stride), Block(out, out, 1)]
        wide = out
    model = nn.Sequential(stem, *blocks, Mean(2, 3), nn.Linear(512, 10))
    return _case(model, torch.randn(32, 3, 64, 64), torch.randint(0, 10, (32,)))


def transformer() -> Case:
    layers = [Layer(128, 4) for _ in range(2)]
    model = nn.Sequential(nn.Linear(40, 128), *layers, nn.LayerNorm(128), Mean(1), nn.Linear(128, 2))
    return _case(model, torch.randn(64, 48, 40), torch.randint(0, 2, (64,)))


def lstm() -> Case:
    from opacus.layers import DPLSTM

    plain, hooked = (Sequence(kind(40, 64, batch_first=True), 64) for kind in (nn.LSTM, DPLSTM))
    return Case(plain, hooked, torch.randn(64, 48, 40), torch.randint(0, 2, (64,)), nn.CrossEntropyLoss())


def _case(model: nn.Module, x: Tensor, y: Tensor, loss: nn.Module | None = None) -> Case:
    return Case(model, model, x, y, loss or nn.CrossEntropyLoss())


CASES: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "cnn": cnn,
    "resnet": resnet,
    "transformer": transformer,
    "lstm": lstm,
}
