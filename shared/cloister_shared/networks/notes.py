"""Networks for a note's hashed tokens, [n, tokens] whole numbers of which 0 is nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def numbered(x: Tensor, buckets: int) -> Tensor:
    """Tokens as an embedding takes them; what is no token's number becomes the nearest that is."""
    return x.long().clamp(0, buckets)


def weighed(words: Tensor) -> tuple[Tensor, Tensor]:
    """Each record's words in order of their numbers, and what each counts: shapes [n, tokens].

    A word that occurs k times counts 1 + log k, at one of its places, and 0 at the others (sublinear term frequency,
    Manning et al. 2008, section 6.4). A record's counts are scaled to length one, so that a long note says no more
    than a short one, and no record's gradient is longer for it.
    """
    words = words.sort(dim=1).values
    edge = words[:, :1] < 0  # never so: a column of what is said of neither end
    same = words[:, 1:] == words[:, :-1]
    at = torch.arange(words.shape[1], device=words.device).expand_as(words)
    begun = torch.where(torch.cat([edge, same], dim=1), torch.zeros_like(at), at).cummax(dim=1).values
    last = ~torch.cat([same, edge], dim=1) & (words > 0)
    counts = torch.where(last, (at - begun + 1).float().log() + 1, 0.0)
    length = counts.square().sum(dim=1, keepdim=True).sqrt().clamp(min=1.0)
    return words, counts / length


class Bag(nn.Module):
    """A linear model of which words a note has, however often: logistic regression on hashed terms.

    The embedding's row 0 stays 0; the one after the last bucket's is the intercept, a word that every note has.
    """

    def __init__(self, buckets: int, outputs: int) -> None:
        super().__init__()
        self.buckets = buckets
        self.words = nn.Embedding(buckets + 2, outputs, padding_idx=0)
        nn.init.zeros_(self.words.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Shape [n, tokens] to [n, outputs]."""
        words, counts = weighed(numbered(x, self.buckets))
        ones = torch.ones_like(words[:, :1])
        words = torch.cat([words, ones * (self.buckets + 1)], dim=1)
        counts = torch.cat([counts, ones.to(counts.dtype)], dim=1)
        return (self.words(words) * counts.unsqueeze(2)).sum(dim=1)


class Trunk(nn.Module):
    """A small transformer (Vaswani et al. 2017, norms first) over tokens in their order; a note's mean, [n, width]."""

    def __init__(self, tokens: int, buckets: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.buckets = buckets
        self.words = nn.Embedding(buckets + 2, width, padding_idx=0)
        self.places = nn.Embedding(tokens + 1, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Before a note's own words stands one that every note has, so that an empty one can be attended to."""
        words = numbered(x, self.buckets)
        words = torch.cat([torch.full_like(words[:, :1], self.buckets + 1), words], dim=1)
        places = torch.arange(words.shape[1], device=words.device).expand_as(words)
        nothing = words == 0
        said = self.words(words) + self.places(places)
        for block in self.blocks:
            said = block(said, src_key_padding_mask=nothing)
        there = (~nothing).to(said.dtype).unsqueeze(2)
        return (self.norm(said) * there).sum(dim=1) / there.sum(dim=1)


class Reader(nn.Module):
    """What a trunk makes of a note, and a linear head on it."""

    def __init__(self, trunk: Trunk, width: int, outputs: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Shape [n, tokens] to [n, outputs]."""
        return self.head(self.trunk(x))
