"""What becomes of memory that a process frees: kept for the next round, and handed back when there is none.

glibc's malloc gives every large piece back to the kernel, which clears each page of it when it is asked for anew. A
model passes through a process many times in a round, and then a third of the processor's work is clearing pages.
"""

from __future__ import annotations

import ctypes

# glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8

_MOST = 2**31 - 1
"""The largest value that mallopt(3) takes."""


def keep() -> None:
    """From now on, what this process frees stays its own. Where there is no glibc nothing changes."""
    if libc := _glibc("mallopt"):
        libc.mallopt(_ARENA_MAX, 1)  # before any thread, or each keeps a heap of its own
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, _MOST)


def give_back() -> None:
    """Hand what is free now to the kernel."""
    if libc := _glibc("malloc_trim"):
        libc.malloc_trim(0)


def _glibc(function: str) -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, function) else None
