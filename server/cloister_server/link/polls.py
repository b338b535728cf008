"""Long polls: a hospital's pull is held until a message for it is there. One watcher asks the database for all of them.

SQLite says in a few microseconds whether any other connection has written since, so it is asked every few
milliseconds, and only while somebody waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cloister_server.link.post import Post

log = logging.getLogger("cloister")

QUICK, CALM = 0.01, 0.1
"""Seconds between two questions: while rounds run, and when nothing was asked of anybody for ``REST`` seconds."""

REST = 60.0

EACH = 3
"""Pulls of one hospital that are held at one process."""


@dataclass
class _Held:
    holding: Collection[str]
    bell: asyncio.Event = field(default_factory=asyncio.Event)


class Polls:
    """Who waits for a message."""

    def __init__(self, post: Post) -> None:
        self._post = post
        self._held: dict[int, list[_Held]] = {}
        self._somebody = asyncio.Event()
        self._version = -1
        self._last = 0.0
        self.closed = False

    @contextmanager
    def waiting(self, node: int, holding: Collection[str]) -> Generator[asyncio.Event | None, None, None]:
        """A bell that rings when there may be a message that the node does not hold; None if it waits too often."""
        held = self._held.setdefault(node, [])
        if len(held) >= EACH:
            yield None
            return
        mine = _Held(holding)
        held.append(mine)
        self._version = -1  # what came before this one waited rings its bell too
        self._somebody.set()
        try:
            yield mine.bell
        finally:
            held.remove(mine)
            if not held:
                del self._held[node]

    async def watch(self) -> None:
        """Ring the bells, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            if not self._held:
                self._somebody.clear()
                await self._somebody.wait()
            try:
                self._ring(loop.time())
            except Exception:
                log.exception("The messages cannot be read; they are asked for again.")
                await asyncio.sleep(1.0)
            await asyncio.sleep(QUICK if loop.time() - self._last < REST else CALM)

    def _ring(self, now: float) -> None:
        version = self._post.version()
        if version == self._version:
            return
        waiting = self._post.waiting()
        self._version = version
        for node in waiting.keys() & self._held.keys():
            for held in self._held[node]:
                if not waiting[node] <= set(held.holding):
                    self._last = now
                    held.bell.set()

    def close(self) -> None:
        """Let everybody go."""
        self.closed = True
        for held in self._held.values():
            for each in held:
                each.bell.set()
