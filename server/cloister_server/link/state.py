"""One Flower LinkState on disk, opened by every process that needs it, and the life of a run in it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import flwr
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID, Status, SubStatus
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.serverapp import Grid
from flwr.supercore.constant import NOOP_FEDERATION_ID, NodeStatus, TaskType
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager

from cloister_server.link.grid import LinkGrid
from cloister_server.link.letters import Letters
from cloister_server.link.post import Post
from cloister_shared.durable import locked
from cloister_shared.errors import EnrolmentRefused, VersionRefused
from cloister_shared.versions import RELEASE

log = logging.getLogger("cloister")

FLOWER = "1.41.0"
"""The release of Flower whose private names are used here."""

BEAT = 10.0
"""Seconds between two signs of life of a run. Flower ends one that was silent for 60."""


@dataclass(frozen=True)
class Link:
    """The rounds' post office: hospitals by their keys, runs, messages."""

    folder: Path
    state: SqlLinkState
    letters: Letters

    def register(self, public_key: bytes) -> int:
        """Let the hospital with this key take part; the same key gives the same Flower node.

        Raises:
            EnrolmentRefused: the key was forgotten before; it does not come back.
        """
        with self.state.session():
            known = self.state.get_node_id_by_public_key(public_key)
            if known is not None:
                return known
            try:
                return self.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public_key, 0.0)
            except ValueError:
                raise EnrolmentRefused("This key was expelled from the consortium.", mend="Make a new one.") from None

    def forget(self, public_key: bytes) -> None:
        """Never again take anything from the bearer of this key."""
        node = self.state.get_node_id_by_public_key(public_key)
        if node is not None:
            self.state.delete_node(NOOP_FLWR_AID, node)

    def online(self) -> set[int]:
        """The nodes that gave a sign of life of late."""
        return {node.node_id for node in self.state.get_node_info(statuses=[NodeStatus.ONLINE])}

    def reader(self) -> Post:
        """Another reader of the messages, for one thread."""
        return Post(self.folder / "link.sqlite")

    @contextmanager
    def run(self, digest: str, nodes: Collection[int] | None = None) -> Generator[Grid, None, None]:
        """A run of the plan with this digest; ``nodes`` are all that take part, if not everybody.

        A run of the same plan that a killed worker left, or that another worker still holds, is stopped first. At the
        end nothing of the run remains but its line in Flower's records.
        """
        self.sweep(digest)
        state = self.state
        number = state.create_run(
            "cloister/plan", RELEASE, digest, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        task = self._run(number).primary_task_id
        assert task is not None, "Flower makes a run with its task"
        state.claim_task(task)
        state.activate_task(task)
        # Flower's Message constructor asks who is talking; a worker's process has one run.
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = number, task, SUPERLINK_NODE_ID
        ended, done, lost = SubStatus.FAILED, threading.Event(), threading.Event()
        beating = threading.Thread(target=self._beat, args=(task, done, lost), name="heartbeat", daemon=True)
        beating.start()
        grid = LinkGrid(self, self._run(number), nodes, lost)
        try:
            yield grid
            ended = SubStatus.COMPLETED
        finally:
            grid.close()
            done.set()
            beating.join()
            state.finish_task(task, ended, "")
            self._clean(number)

    def sweep(self, digest: str = "") -> None:
        """Stop the runs of a plan, and remove what runs left that are over."""
        alive = [Status.PENDING, Status.STARTING, Status.RUNNING]
        for run in self.state.get_run_info(statuses=alive):
            if run.fab_hash == digest:
                log.info("A run of this plan was left behind, and is stopped.")
                self.state.stop_run(run.run_id)
        left = self.letters.runs()  # before the runs are asked for: a run is made before its first letter
        living = {run.run_id for run in self.state.get_run_info(statuses=alive)}
        for number in left:
            if number not in living:
                self._clean(number)

    def runs(self, number: int) -> bool:
        """Whether a run is not over."""
        return bool(self.state.get_run_info(run_ids=[number], statuses=[Status.RUNNING]))

    def _clean(self, number: int) -> None:
        self.state.cleanup_run(number)
        self.letters.drop_run(number)

    def _run(self, number: int) -> Run:
        return self.state.get_run_info(run_ids=[number])[0]

    def _beat(self, task: int, done: threading.Event, lost: threading.Event) -> None:
        while not done.wait(BEAT):
            try:
                if not self.state.acknowledge_task_heartbeat(task):
                    return lost.set()
            except Exception:  # the database may be busy: there is time for five more
                log.warning("The sign of life of a run could not be written.", exc_info=True)


def open_link(folder: Path) -> Link:
    """The post office in this folder, made if there is none: ``link.sqlite`` and ``letters/``.

    Raises:
        VersionRefused: another release of Flower is installed.
    """
    if flwr.__version__ != FLOWER:
        raise VersionRefused(
            f"Flower {flwr.__version__} is installed; this release of Cloister uses private parts of {FLOWER}.",
            mend=f"Run pip install flwr=={FLOWER}, or upgrade Cloister.",
        )
    logging.getLogger("flwr").setLevel(logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    database = folder / "link.sqlite"
    # Contents are letters of ours: nothing is ever put in Flower's own store of objects.
    state = SqlLinkState(str(database), NoOpFederationManager(), InMemoryObjectStore())
    with locked(database):  # while it is made, or brought to Flower's present form
        state.initialize()
    link = Link(folder, state, Letters(folder / "letters"))
    link.sweep()
    return link
