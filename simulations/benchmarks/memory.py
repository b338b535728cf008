"""What the coordinator holds while it adds up large replies, in units of one model.

A fresh process runs the real ``run_round`` for 10 replies of 25 million parameters. Its Grid does what a
network's does: it lets go of the tickets once they are sent, and each reply comes into being when it is
pulled. Hospital number i sends i everywhere, so the mean must be 4.5.

    python simulations/benchmarks/memory.py [PARAMETERS]    prints what this very process measures, as JSON
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from figures import Figure, at_most, in_fresh_process, progress
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from processes import forget_peak, peak

from cloister_server.rounds import Study, run_round
from cloister_server.store import Checkpoint, Store
from cloister_shared.layout import Layout
from cloister_shared.plan_file import amend
from cloister_shared.wire import ReplyHeader, TicketHeader, pack, pack_vectors, unpack_ticket
from cloister_simulations.federation import Arm, plan_for
from cloister_simulations.scenario import read_scenario

PARAMETERS, HOSPITALS, BAR = 25_000_000, 10, 3.0


def figures() -> list[Figure]:
    progress("memory: one round of 10 hospitals with 25 million parameters")
    most = in_fresh_process(__file__, str(PARAMETERS))["peak"]
    return [at_most("memory.aggregation", most, BAR, "{:.2f} models above the imports")]


@dataclass
class Replies(Grid):
    """A Grid whose hospitals answer with made-up vectors, one at a time."""

    layout: Layout
    encoding: str
    waiting: dict[str, tuple[Message, TicketHeader]] = field(default_factory=dict)

    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        return Run.create_empty(1)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        return list(range(HOSPITALS))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Keep the ticket's header and an envelope to reply to, not the model."""
        names: list[str] = []
        for message in messages:
            name = f"message-{len(names)}"
            about = message.metadata
            envelope = Message(RecordDict(), about.dst_node_id, about.message_type, group_id=about.group_id)
            envelope.metadata.__dict__["_message_id"] = name
            self.waiting[name] = (envelope, unpack_ticket(message.content).header)
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The next hospital's reply; its bytes are made here, once."""
        name = next(iter(message_ids))
        envelope, ticket = self.waiting.pop(name)
        body = np.float32(envelope.metadata.dst_node_id).tobytes() * self.layout.size
        update = Array(dtype="float32", shape=(self.layout.size,), stype=self.encoding, data=body)
        header = ReplyHeader(run=ticket.run, round=ticket.round, site=ticket.site, layout=self.layout.digest, rows=100)
        return [Message(pack(header, ArrayRecord({"update": update})), reply_to=envelope)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        names = self.push_messages(messages)
        return [reply for name in names for reply in self.pull_messages([name])]


def measure(folder: Path, parameters: int) -> dict[str, float]:
    """Peak memory of one round above what the process held before it, in models."""
    plan = plan_for(read_scenario("breast-cancer").plan, Arm("federated"), 0)
    terms = {"max_update_norm": 1e6, "bound": 100.0, "secure_sum": False}
    plan = amend(plan, aggregation=terms, cohort={"min_sites": HOSPITALS})
    layout, store = Layout((("weights", parameters),), ()), Store(folder)
    store.save(Checkpoint("memory", plan.digest, 0, np.zeros(parameters, dtype=np.float32)))
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    encoding = next(iter(pack_vectors({"model": np.zeros(1, dtype=np.float32)}).values())).stype
    study = Study(plan, layout, {f"hospital-{at}": at for at in range(HOSPITALS)}, store)
    before = forget_peak(os.getpid())
    run_round(study, 1, Replies(layout, encoding))
    most = peak(os.getpid())
    model = study.checkpoint().model
    assert (model == np.float32(4.5)).all(), "the mean of 0 to 9 is 4.5"
    return {"peak": (most - before) / (4 * parameters), "before": before / (4 * parameters)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(Path(scratch), int(sys.argv[1]) if sys.argv[1:] else PARAMETERS)))
