"""A small transformer over a table's features, each of them a token (Gorishniy et al. 2021, FT-Transformer)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """What every token takes from the others, and then a layer for each by itself; both before their norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before = nn.LayerNorm(width)
        self.attend = nn.MultiheadAttention(width, heads, batch_first=True)
        self.between = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Shape [n, tokens, width] to the same."""
        x = self.before(tokens)
        tokens = tokens + self.attend(x, x, x, need_weights=False)[0]
        return tokens + self.narrow(functional.gelu(self.widen(self.between(tokens))))


class FeatureTransformer(nn.Module):
    """Inputs to tokens, ``depth`` layers of attention, the tokens' mean, and a head.

    A feature's token is a direction of its own, and of each of its inputs one more, times that input: of a category
    the direction of the one that it is. Directions are looked up, not multiplied, so that a clip sees whose they are.
    """

    def __init__(self, feature_of: Sequence[int], width: int, heads: int, depth: int, outputs: int) -> None:
        super().__init__()
        self.feature_of = tuple(feature_of)
        self.features = max(feature_of) + 1
        self.slope = nn.Embedding(len(feature_of), width)
        self.place = nn.Embedding(self.features, width)
        for table in (self.slope, self.place):
            nn.init.uniform_(table.weight, -(width**-0.5), width**-0.5)
        self.attention = nn.ModuleList(Attention(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Shape [n, inputs] to [n, outputs]."""
        inputs, features = (torch.arange(n, device=x.device).expand(len(x), n) for n in (x.shape[1], self.features))
        parts = self.slope(inputs) * x[:, :, None]
        at = torch.tensor(self.feature_of, device=x.device)
        tokens = self.place(features).index_add(1, at, parts)
        for layer in self.attention:
            tokens = layer(tokens)
        return self.head(functional.relu(self.norm(tokens.mean(dim=1))))
