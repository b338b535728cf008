"""Late fusion: an encoder for each kind of input, what each says side by side, and a head over all of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from cloister_shared.inputs import Block
from cloister_shared.networks.dense import perceptron
from cloister_shared.schema import ImageFeature, SeriesFeature, TextFeature

CHANNELS = 8
"""Of the first convolution; the second has twice as many."""


class Picture(nn.Module):
    """Two convolutions with a group norm each, and what they say in four parts of the picture, averaged in each."""

    def __init__(self, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.shape = shape
        self.first = nn.Conv2d(shape[0], CHANNELS, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, CHANNELS)
        self.second = nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, stride=2, padding=1)
        self.other_norm = nn.GroupNorm(2, 2 * CHANNELS)
        self.head = nn.Linear(2 * CHANNELS * 4, width)

    def forward(self, block: Tensor) -> Tensor:
        """Shape [n, size] to [n, width]."""
        x = functional.relu(self.norm(self.first(block.unflatten(1, self.shape))))
        x = functional.relu(self.other_norm(self.second(x)))
        return self.head(functional.adaptive_avg_pool2d(x, 2).flatten(1))


class Note(nn.Module):
    """The mean of what each token looks up."""

    def __init__(self, buckets: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(buckets + 1, width, padding_idx=0)

    def forward(self, block: Tensor) -> Tensor:
        """Shape [n, tokens] to [n, width]."""
        tokens = block.long().clamp(0, self.words.num_embeddings - 1)
        count = (tokens > 0).sum(dim=1, keepdim=True).clamp(min=1)
        return self.words(tokens).sum(dim=1) / count.sqrt()


class Course(nn.Module):
    """A series by a GRU, read off at its last step."""

    def __init__(self, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.shape = shape
        self.steps = nn.GRU(shape[1], width, batch_first=True)

    def forward(self, block: Tensor) -> Tensor:
        """Shape [n, size] to [n, width]."""
        return self.steps(block.unflatten(1, self.shape))[0][:, -1]


class Fusion(nn.Module):
    """Layers ``scalars`` and ``parts``, the latter one for each block, and ``head``.

    A block of zeros was not recorded: what its encoder would say is then 0, and the head is told so by one more input
    for each block. So a hospital without pictures trains the rest, and their encoder moves by those who have some.
    """

    def __init__(self, columns: int, blocks: Sequence[Block], width: int, hidden: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.columns = columns
        self.places = tuple((block.start, block.start + block.size) for block in blocks)
        self.parts = nn.ModuleList(_encoder(block, width) for block in blocks)
        if columns:
            self.scalars = nn.Linear(columns, width)
        self.head = perceptron(width * (len(blocks) + (columns > 0)) + len(blocks), hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Shape [n, width] to [n, outputs]."""
        said = [functional.relu(self.scalars(x[:, : self.columns]))] if self.columns else []
        for (start, end), encoder in zip(self.places, self.parts, strict=True):
            block = x[:, start:end]
            there = (block != 0).any(dim=1, keepdim=True).to(x.dtype)
            said += [functional.relu(encoder(block)) * there, there]
        return self.head(torch.cat(said, dim=1))


def _encoder(block: Block, width: int) -> nn.Module:
    match block.feature:
        case ImageFeature():
            return Picture(block.shape, width)
        case TextFeature(buckets=buckets):
            return Note(buckets, width)
        case SeriesFeature():
            return Course(block.shape, width)
        case feature:
            raise ValueError(f"no encoder for {feature.kind}")
