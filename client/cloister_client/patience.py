"""Trying again: with back-off and full jitter, and one sentence when something begins to fail and when it is over."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cloister_shared import durable
from cloister_shared.errors import CloisterError, EnrolmentRefused, KeyBroken, LinkLost, VersionRefused

log = logging.getLogger("cloister.agent")

LONGEST = 60.0
"""Seconds at most between two tries; the first wait is one second at most."""

T = TypeVar("T")


class Stopped(Exception):
    """The agent is to end; whoever works drops what it does."""


class Patience:
    """What the threads of one agent share: when to stop, why, and what does not work at the moment."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop
        self.failed: CloisterError | None = None
        """Why no patience helps, and the agent ends by itself."""
        self._troubles: dict[str, tuple[str, float]] = {}
        self._lock, self._recovered = threading.Lock(), threading.Condition()

    def persist(self, what: str, work: Callable[[], T]) -> T:
        """Do it, however often it takes. ``what`` is the thing that fails, as the log is to call it.

        Raises:
            Stopped: the agent is to end; it sees to that itself where its certificate or key is of no use any more.
        """
        longest = 1.0
        while not self.stop.is_set():
            try:
                done = work()
            except (EnrolmentRefused, KeyBroken) as error:
                self.give_up(error)
            except (LinkLost, VersionRefused) as error:
                self._trouble(what, str(error))
            except OSError as error:
                self._trouble(what, f"{error.filename or 'A file'} cannot be written: {error.strerror or error}.")
            else:
                self._well(what)
                return done
            self.wait(random.uniform(0, longest))
            longest = min(LONGEST, 2 * longest)
        raise Stopped

    def wait(self, seconds: float) -> None:
        """Wait so long, or until something works again: it may be the same that this waits for."""
        with self._recovered:
            self._recovered.wait(seconds)

    def pause(self, seconds: float) -> None:
        """Wait.

        Raises:
            Stopped: the agent is to end.
        """
        if self.stop.wait(seconds):
            raise Stopped

    def give_up(self, error: CloisterError) -> None:
        """End the agent, for this reason."""
        self.failed = self.failed or error
        self.stop.set()
        with self._recovered:
            self._recovered.notify_all()

    def _trouble(self, what: str, sentence: str) -> None:
        with self._lock:
            before, since = self._troubles.get(what, ("", time.monotonic()))
            self._troubles[what] = sentence, since
        if sentence != before:
            log.warning("%s: %s It is tried again.", what, sentence)

    def _well(self, what: str) -> None:
        with self._lock:
            before = self._troubles.pop(what, None)
        if before:
            log.info("%s: in order again, after %.0f s", what, time.monotonic() - before[1])
            with self._recovered:
                self._recovered.notify_all()


def try_disk(folder: Path) -> None:
    """Find out whether the disk takes a file.

    Raises:
        OSError: it does not.
    """
    durable.save_text(folder / "disk", "x" * 4096)
    (folder / "disk").unlink()
