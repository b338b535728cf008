"""The agent of a hospital: it asks the coordinator for messages, has approved ones worked on, and sends the replies.

    ask for a message             held open at the coordinator until there is one       fleet
    which plan is it of           approved here, by hash, at this moment                approvals
    its objects come              and go on to the study's own process                  fleet, trainer
    work                          no network, a limit of memory and time                child, sandbox
    the reply comes back          still approved? on disk what is about to leave        approvals, egress
    it is sent                    as often as it takes                                  fleet

Nothing of a message is kept here. One that is not answered is given again, to this process or the next, and the
study's own durable answers see to it that its answer is the same. So no crash at any line loses or doubles anything.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import random
import signal
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from cloister_client.approvals import Approvals
from cloister_client.egress import Egress
from cloister_client.fleet import HEARTBEAT, Fleet, Instruction, RunOver, side_by_side
from cloister_client.ledger import settle
from cloister_client.membership import consortium_of, site_of
from cloister_client.objects import Contents, contents, error_reply
from cloister_client.offers import news_in, study_folder
from cloister_client.patience import LONGEST, Patience, Stopped, try_disk
from cloister_client.sandbox import unseen
from cloister_client.trainer import PROGRAM, Trainer
from cloister_shared import memory
from cloister_shared.carried import Octets
from cloister_shared.errors import CloisterError, Fault, Refusal, TicketRefused, TrainingLost
from cloister_shared.parcel import Parcel
from cloister_shared.wire import FAILED, REFUSED

log = logging.getLogger("cloister.agent")

MOST_HELD = 16
"""Messages in work or waiting; while there are as many no more are asked for."""
IDLE = 900.0
"""Seconds after which a training process that nobody asks is ended. The next message begins it again."""

_REST = 60.0
"""Seconds without a message after which the agent keeps no memory for the next."""

_DECISION = "decision.json"
_LOOK = 2.0
"""Seconds between looks at what was decided here."""
_GOODBYE = 5.0
"""Seconds in which the coordinator may hear that the agent ends."""


def run_agent(folder: Path, stop: threading.Event | None = None, program: str = PROGRAM) -> None:
    """Serve the hospital whose ``site.yaml`` lies in ``folder``, until ``stop`` is set or SIGTERM or SIGINT comes.

    Raises:
        EnrolmentRefused: it is not enrolled; or its certificate has expired or was revoked, now or on the way.
        KeyBroken: a file of its enrolment is missing or damaged.
        AuditBroken: the egress log is not what was written.
        Refusal: another agent runs on this folder.
    """
    patience = Patience(stop or threading.Event())
    memory.keep()
    consortium_of(folder / "agent")
    with _alone(folder / "agent" / "agent.lock"), _until_told(patience.stop):
        unseen()
        agent = _Agent(folder, patience, program)
        for work in (agent.listen, agent.beat, agent.mind):
            threading.Thread(target=_to_the_end, args=(work, patience), daemon=True).start()
        patience.stop.wait()
        agent.leave()
    if patience.failed:
        raise patience.failed


class _Agent:
    def __init__(self, folder: Path, patience: Patience, program: str = PROGRAM) -> None:
        self.folder, self.stop, self._patience, self._program = folder, patience.stop, patience, program
        own = folder / "agent"
        site = site_of(own)
        self._own, self._policy, self._population = own, site.policy, site.population
        self._fleet, self._approvals, self._egress = Fleet(own), Approvals(own), Egress(own / "egress.jsonl")
        self._trainers: dict[str, Trainer] = {}
        self._waiting: dict[str, deque[Instruction]] = {}
        """Messages of each study by its plan's digest, the one in work first."""
        self._digests: dict[int, str] = {}
        self._asked: dict[str, int] = {}
        """When each study last had a message, in nanoseconds of this machine's clock."""
        self._lock = threading.Lock()

    # --- three threads, and one for each study at work ------------------------------------------------------
    def listen(self) -> None:
        """Ask for messages, and give each to its study."""
        self._patience.persist("rounds", self._fleet.activate)
        log.info("in touch with the coordinator at %s", self._fleet.address)
        while True:
            asked = time.monotonic()
            found = self._patience.persist("rounds", lambda: self._fleet.pull(self._held))
            if found:
                self._take(found)
            elif time.monotonic() - asked < 1.0:  # a gate that holds nothing open is not asked faster than this
                self._patience.pause(1.0)
            while len(self._held) >= MOST_HELD:
                self._patience.pause(1.0)

    def beat(self) -> None:
        """Signs of life; one at once when the coordinator is back, which counted this hospital as offline."""
        wait = HEARTBEAT
        while not self.stop.is_set():
            self._patience.wait(random.uniform(0.8, 1.0) * wait)
            try:
                if self._fleet.node and not self._fleet.heartbeat():
                    self._fleet.activate()
                wait = HEARTBEAT
            except (CloisterError, RunOver):
                wait = 5.0  # the listener says what is wrong

    def mind(self) -> None:
        """Begin the process of a study when it is approved, to be warm in the first round; when it is over, end it and
        free what it did not spend.
        """
        seen, approved, settled = self._decided(), set(self._approvals.approved()), set[str]()
        over = set(filter(self._over, approved))
        given_back = 0
        while not self.stop.wait(_LOOK):
            with self._lock:
                last = max(self._asked.values(), default=0)
            if last > given_back and not self._waiting and time.time_ns() - last > _REST * 1e9:
                given_back = last
                memory.give_back()
            changed, before = set[str](), approved
            if (now := self._decided()) != seen:
                changed = {path.parent.name for path in now if path.name == _DECISION and now[path] != seen.get(path)}
                seen, approved = now, set(self._approvals.approved())
                over = set(filter(self._over, approved))
            for digest, trainer in list(self._trainers.items()):
                if (idle := trainer.idle) is None:
                    continue
                if digest not in approved or digest[:16] in changed:
                    log.info("study %s: it was decided anew; the training process of before is ended", digest[:12])
                    trainer.end()
                elif digest not in self._waiting and idle > (_LOOK if digest in over else IDLE):
                    trainer.end()
            for digest in approved - before - over:
                log.info("study %s is approved: its training process is begun", digest[:12])
                self._trainer(digest).begin()
            settled = self._settled(over, settled & over)

    def _work(self, digest: str) -> None:
        """One study's messages, one after the other."""
        waiting = self._waiting[digest]
        while True:
            try:
                self._answer(digest, waiting[0])
            except RunOver:
                log.info("study %s: its run was ended, and with it a message", digest[:12])
            except Stopped:
                return
            except Exception:
                if self.stop.is_set():
                    return
                log.exception("study %s: a message was not answered; it is given again", digest[:12])
                self.stop.wait(LONGEST / 2)  # not at once
            with self._lock:
                waiting.popleft()
                if not waiting:
                    del self._waiting[digest]
                    return

    def leave(self) -> None:
        """End the training processes, and tell the coordinator that nobody is here."""
        for trainer in list(self._trainers.values()):
            trainer.end()
        goodbye = threading.Thread(target=self._say_goodbye, daemon=True)
        goodbye.start()
        goodbye.join(_GOODBYE)
        self._fleet.close()
        self._egress.close()
        log.info("the agent has ended")

    def _say_goodbye(self) -> None:
        with contextlib.suppress(CloisterError):
            if self._fleet.node:
                self._fleet.deactivate()

    # --- a message ------------------------------------------------------------------------------------------
    def _take(self, found: Instruction) -> None:
        """Find its study, and put it behind what that has to do."""
        try:
            if found.run not in self._digests:
                self._digests[found.run] = self._patience.persist("rounds", lambda: self._fleet.digest_of(found.run))
        except RunOver:
            return
        digest = self._digests[found.run]
        with self._lock:
            self._asked[digest] = time.time_ns()
            waiting = self._waiting.setdefault(digest, deque())
            waiting.append(found)
            if len(waiting) == 1:
                threading.Thread(target=self._work, args=(digest,), name=f"study-{digest[:12]}", daemon=True).start()

    def _answer(self, digest: str, asked: Instruction) -> None:
        reply, held = self._reply(digest, asked)
        what = f"study {digest[:12]}"
        said = (digest, f"{asked.run:016x}", asked.kind, reply.root, reply.size, held)
        self._patience.persist(what, lambda: self._egress.note(*said))
        self._patience.persist(what, lambda: self._fleet.push(asked.run, reply))
        log.info("%s: %s answered%s", what, asked.kind, f" with error {held.error}" if held.error else "")

    def _reply(self, digest: str, asked: Instruction) -> tuple[Parcel, Contents]:
        """What comes of it: work, or an error that says in a sentence why not."""
        try:
            self._approvals.require(digest)
            reply = self._worked_on(digest, asked)
            held = contents(reply)
            if held.error is not None and self._disk_was_full(digest):
                reply = self._worked_on(digest, asked)
                held = contents(reply)
            if self._approvals.standing(digest) != "approved":  # it may have been revoked meanwhile
                self._approvals.require(digest)
            if (held.run, held.answers) != (asked.run, asked.root):
                raise ValueError("it answers something else")
            return reply, held
        except CloisterError as error:
            log.warning("study %s: %s refused: %s", digest[:12], asked.kind, error)
            code, said = (REFUSED if isinstance(error, Refusal) else FAILED), error.abroad or str(error)
        except ValueError as error:
            log.error("study %s: the reply to %s may not leave: %s", digest[:12], asked.kind, error)
            code, said = FAILED, "The reply was not what a reply is; the hospital's log says more."
        reply = error_reply(asked.message, code, said)
        return reply, contents(reply)

    def _disk_was_full(self, digest: str) -> bool:
        """If the disk takes nothing, wait until it does: what was paid for is then answered after all."""
        try:
            try_disk(self._own)
        except OSError:
            self._patience.persist(f"study {digest[:12]}", lambda: try_disk(self._own))
            return True
        return False

    def _worked_on(self, digest: str, asked: Instruction) -> Parcel:
        for last in (False, True):
            try:
                return self._trainer(digest).ask(asked.message, asked.root, self._objects(digest, asked))
            except TrainingLost as lost:
                if self.stop.is_set():
                    raise Stopped from None
                self._approvals.require(digest)  # a revocation ends the process
                if last or not lost.again:
                    raise
                log.warning("%s The message is tried once more.", lost)
        raise AssertionError

    def _objects(self, digest: str, asked: Instruction) -> Iterator[tuple[str, Octets]]:
        """The message's parts, as they come; no more than the process could hold."""
        left = self._policy.memory_gb * 2**30

        def pulled(name: str) -> tuple[str, Octets]:
            return name, self._patience.persist(f"study {digest[:12]}", lambda: self._fleet.object(asked.run, name))

        rest = (name for name in asked.objects if name not in asked.along)
        for name, content in itertools.chain(asked.along.items(), side_by_side(pulled, rest)):
            left -= len(content)
            if left < 0:
                raise TicketRefused("The message is larger than the memory that the hospital allows for it.", mend="")
            yield name, content

    # --- the state of things --------------------------------------------------------------------------------
    @property
    def _held(self) -> list[str]:
        with self._lock:
            return [message.root for waiting in self._waiting.values() for message in waiting]

    def _trainer(self, digest: str) -> Trainer:
        with self._lock:
            if digest not in self._trainers:
                self._trainers[digest] = Trainer(self.folder, digest, hours=self._policy.hours, program=self._program)
            return self._trainers[digest]

    def _decided(self) -> dict[Path, int]:
        """When what is known of each study last changed."""
        found: dict[Path, int] = {}
        for path in (self._own / "studies").glob("*/*.json"):
            with contextlib.suppress(OSError):
                found[path] = path.stat().st_mtime_ns
        return found

    def _over(self, digest: str) -> bool:
        """Whether the coordinator says that no more will be asked. A message begins the process again all the same."""
        return news_in(study_folder(self._own, digest)).state in ("finished", "stopped")

    def _settled(self, over: set[str], before: set[str]) -> set[str]:
        """Free what studies that are over reserved and did not spend; one that goes on reserves it anew. Those done.

        News that are older than the last message are of an end before that: the study has gone on since.
        """
        due = {digest for digest in over - before if digest not in self._waiting and self._heard_last(digest)}
        try:
            if due:
                settle(self.folder / "ledger.sqlite", self._population, due)
            return before | due
        except (CloisterError, OSError, sqlite3.Error) as error:
            log.warning("what a study reserved is not freed yet: %s", error)
            return before

    def _heard_last(self, digest: str) -> bool:
        news = study_folder(self._own, digest) / "news.json"
        return news.stat().st_mtime_ns > self._asked.get(digest, 0)


def _to_the_end(work: Callable[[], None], patience: Patience) -> None:
    """One of the agent's threads. If it breaks, the agent ends, to be started again, rather than go on without it."""
    try:
        work()
    except Stopped:
        pass
    except Exception:
        log.exception("the agent broke")
        patience.give_up(Fault("The agent broke; its log says where.", mend="Start it again, and report it."))


@contextlib.contextmanager
def _alone(lock: Path) -> Generator[None, None, None]:
    """Keep a second agent out of this folder.

    Raises:
        Refusal: there is one.
    """
    with lock.open("a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Refusal(
                f"An agent runs in {lock.parent} already, as process {file.read(20).strip() or '?'}.",
                mend="Stop that one first: one hospital has one agent.",
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextlib.contextmanager
def _until_told(stop: threading.Event) -> Generator[None, None, None]:
    """SIGTERM and SIGINT set ``stop``, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
