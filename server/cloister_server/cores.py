"""The cores of the coordinator's machine: while it adds up large replies, nobody else there has much to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

_POOL = ThreadPoolExecutor(4, "core")


def each(work: Callable[[A], B], things: Iterable[A]) -> list[B]:
    """What ``work``, most of which numpy or a system call does, makes of each; of several, side by side."""
    things = list(things)
    return list(_POOL.map(work, things) if len(things) > 1 else map(work, things))
