"""A note to hashed tokens: nothing of a patient's words is in a dictionary, because there is none."""

from __future__ import annotations

import re
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister_client.quality import ColumnReport, note
from cloister_shared.schema import TextFeature

_WORD = re.compile(r"[^\W_]+")


def encode(feature: TextFeature, cells: NDArray[Any], report: ColumnReport) -> NDArray[np.float32]:
    """Cells of text, to [n, tokens]; see ``TextFeature``. What does not fit is left out at the end."""
    x = np.zeros((len(cells), feature.tokens), np.float32)
    empty = np.zeros(len(cells), bool)
    for row, cell in enumerate(cells):
        found = tokens(str(cell), feature) if isinstance(cell, str) else []
        x[row, : len(found)] = found
        empty[row] = not found
    report.missing = int(empty.sum())
    if feature.required:
        note(report, "no text", empty)
    return x


def tokens(text: str, feature: TextFeature) -> list[int]:
    """The numbers of a text's tokens, in order, as many as fit."""
    words = [match.group() for match in _WORD.finditer(text.casefold())]
    grams = [
        " ".join(words[at : at + size]) for at in range(len(words)) for size in range(1, feature.grams + 1)
        if at + size <= len(words)
    ]  # fmt: skip
    found = [_bucket(gram, feature.buckets) for gram in grams]
    if feature.distinct:
        found = list(dict.fromkeys(found))
    return found[: feature.tokens]


@lru_cache(maxsize=100_000)
def _bucket(gram: str, buckets: int) -> int:
    """1 to ``buckets``, the same everywhere."""
    return int.from_bytes(blake2b(gram.encode(), digest_size=8).digest()) % buckets + 1
