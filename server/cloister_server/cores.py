"""The cores of the coordinator's machine: while it adds up large replies, nobody else there has much to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cloister_shared.masking import BLOCK

A = TypeVar("A")
B = TypeVar("B")

_THREADS = 4
_POOL = ThreadPoolExecutor(_THREADS, "core")


def each(work: Callable[[A], B], things: Iterable[A]) -> list[B]:
    """What ``work``, most of which numpy or a system call does, makes of each; of several, side by side."""
    things = list(things)
    return list(_POOL.map(work, things) if len(things) > 1 else map(work, things))


def parts(size: int) -> list[slice]:
    """A vector of so many elements in parts, to be worked on side by side; a small one in a single part."""
    most = max(BLOCK, -(-size // _THREADS))
    return [slice(at, min(at + most, size)) for at in range(0, size, most)]
