"""One round, top to bottom: invite, send, collect, step, record.

Replies are added up as they come, into one vector; the model itself stands on disk meanwhile. So a round needs
the memory of one sum and one reply, however many hospitals answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from cloister_server.store import Checkpoint, RoundRecord, Store
from cloister_server.strategies import ROBUST_RULES, STRATEGIES, State, Vector
from cloister_shared.errors import QuorumLost, ReplyRejected
from cloister_shared.plan import Scaffold, StudyPlan
from cloister_shared.tasks.layout import Layout
from cloister_shared.wire import Reply, TicketHeader, pack, pack_vectors, unpack_reply

Who = TypeVar("Who", int, str)
_BLOCK = 1 << 18  # parameters handled at a time: one MiB


@dataclass(frozen=True)
class Study:
    """One study at the coordinator: its terms, who takes part, and where its state is kept."""

    plan: StudyPlan
    layout: Layout
    enrolled: Mapping[str, int]
    store: Store

    @cached_property
    def digest(self) -> str:
        """The plan's, taken once."""
        return self.plan.digest

    def checkpoint(self) -> Checkpoint:
        """The state after the last whole round."""
        found = self.store.load(self.digest)
        assert found, "a study is opened with a checkpoint of round 0"
        return found


def run_round(study: Study, number: int, grid: Grid) -> RoundRecord:
    """One round, top to bottom. Nothing outside this function changes the study.

    Raises:
        QuorumLost: fewer valid replies than ``cohort.min_sites``; the study is as before.
    """
    began = time.perf_counter()
    sent = send(study, number, grid, "train")
    total = Total(study.plan, study.layout.size)

    def accept(site: str, message: Message) -> None:
        reply = unpack_reply(message.content)
        total.add(site, reply, check_update(study, reply, site, number))

    total.rejected |= collect(grid, sent, study.plan.round_timeout, accept)
    total.require_quorum(number)
    after = step(study, number, total)
    record = total.record(number, time.perf_counter() - began)
    study.store.save(after, record)
    return record


def send(study: Study, number: int, grid: Grid, kind: str) -> dict[str, str]:
    """A ticket with the current model to every enrolled hospital; message id to hospital."""
    now = study.checkpoint()
    vectors: dict[str, Vector] = {} if kind == "query.statistics" else {"model": now.model}
    if isinstance(study.plan.strategy, Scaffold) and kind == "train":
        vectors["control"] = now.state.get("control", np.zeros_like(now.model))
    packed = pack_vectors(vectors)
    messages: list[Message] = []
    for site, node in study.enrolled.items():
        header = TicketHeader(run=now.run, plan=now.plan, round=number, site=site, normalisation=now.normalisation)
        messages.append(Message(pack(header, packed), node, kind, group_id=str(number)))
    return dict(zip(grid.push_messages(messages), study.enrolled, strict=True))


def ask(grid: Grid, nodes: Sequence[int], kind: str) -> dict[str, int]:
    """An empty message to each node; message id to node."""
    messages = [Message(RecordDict({}), node, kind) for node in nodes]
    return dict(zip(grid.push_messages(messages), nodes, strict=True))


def collect(
    grid: Grid, sent: Mapping[str, Who], timeout: float, accept: Callable[[Who, Message], None]
) -> dict[Who, str]:
    """Give each reply to ``accept`` as it comes and let it go, until all have answered or the deadline passes.

    Only waiting counts towards the deadline: in process, a hospital works while its reply is pulled.
    Returns who gave no valid reply, and why: an error, a reply that ``accept`` rejects, or silence.
    """
    waiting, rejected, waited = dict(sent), dict[Who, str](), 0.0
    while waiting and waited < timeout:
        arrived, began = False, time.monotonic()
        for message in grid.pull_messages(list(waiting)):
            arrived = True
            who = waiting.pop(message.metadata.reply_to_message_id)
            if message.has_error():
                rejected[who] = message.error.reason or f"error {message.error.code}"
            else:
                try:
                    accept(who, message)
                except ReplyRejected as odd:
                    rejected[who] = str(odd)
            del message  # before the next one is pulled, so that one reply is held at a time
        if not arrived:
            time.sleep(0.01)
            waited += time.monotonic() - began
    return rejected | dict.fromkeys(waiting.values(), f"no answer within {timeout:g} s")


def check_update(study: Study, reply: Reply, site: str, number: int) -> float:
    """Hold a reply against the plan; the ℓ² norm of its update.

    Raises:
        ReplyRejected: says in what the reply is odd.
    """
    header, plan = reply.header, study.plan
    wanted = {"update", "control"} if isinstance(plan.strategy, Scaffold) else {"update"}
    if (header.site, header.round) != (site, number):
        raise ReplyRejected(f"the reply is {header.site}'s for round {header.round}")
    if header.layout != study.layout.digest or set(reply.vectors) != wanted:
        raise ReplyRejected(f"the reply holds {', '.join(sorted(reply.vectors)) or 'nothing'} of another model")
    if not plan.cohort.min_patients <= header.rows <= plan.cohort.max_rows:
        raise ReplyRejected(f"a weight of {header.rows} rows is outside the plan's bounds")
    norms: dict[str, float] = {}
    for name, vector in reply.vectors.items():
        if vector.size != study.layout.size:
            raise ReplyRejected(f"{name} holds {vector.size} parameters, not {study.layout.size}")
        norms[name] = _norm(vector)
        if not np.isfinite(norms[name]):
            raise ReplyRejected(f"{name} holds a value that is not finite")
    if norms["update"] > plan.aggregation.max_update_norm:
        raise ReplyRejected(f"the update's norm {norms['update']:.4g} is above {plan.aggregation.max_update_norm:g}")
    return norms["update"]


def step(study: Study, number: int, total: Total) -> Checkpoint:
    """The strategy's step from the model on disk by the mean update."""
    plan, before = study.plan, study.checkpoint()
    state: State = dict(before.state)
    control = state.pop("control", None)
    strategy = STRATEGIES.get(plan.strategy.name, STRATEGIES["fedavg"])
    terms = plan.strategy if plan.strategy.name in STRATEGIES else _PLAIN_MEAN
    model, state = strategy(before.model, total.update(), state, terms)
    if isinstance(plan.strategy, Scaffold):
        share = np.float32(len(total.answered) / len(study.enrolled))
        state["control"] = (0 if control is None else control) + share * total.control()
    return replace(before, round=number, model=np.ascontiguousarray(model, dtype=np.float32), state=state)


@dataclass(frozen=True)
class _PlainMean:
    server_learning_rate: float = 1.0


_PLAIN_MEAN = _PlainMean()


@dataclass
class Total:
    """The sum so far, and who is in it. Robust rules keep every update instead: they compare them."""

    plan: StudyPlan
    size: int
    rejected: dict[str, str] = field(default_factory=dict[str, str])
    answered: list[str] = field(default_factory=list[str])
    metrics: dict[str, dict[str, float | None]] = field(default_factory=dict[str, dict[str, float | None]])
    rows: int = 0
    _weight: float = 0.0
    _norm: float = 0.0
    _sums: dict[str, Vector] = field(default_factory=dict[str, Vector])
    _kept: list[Vector] = field(default_factory=list[Vector])

    def add(self, site: str, reply: Reply, norm: float) -> None:
        """Add a checked reply."""
        header = reply.header
        weight = 1.0 if self.plan.aggregation.weights == "equal" else float(header.rows)
        if self.plan.strategy.name in ROBUST_RULES:
            self._kept.append(reply.vectors["update"])
        else:
            self._add("update", reply.vectors["update"], weight)
        if "control" in reply.vectors:
            self._add("control", reply.vectors["control"], 1.0)
        self.answered.append(site)
        self.metrics[site] = header.metrics
        self.rows += header.rows
        self._weight += weight
        self._norm = max(self._norm, norm)

    def _add(self, name: str, vector: Vector, weight: float) -> None:
        total = self._sums.setdefault(name, np.zeros(self.size, dtype=np.float32))
        for at in range(0, self.size, _BLOCK):
            total[at : at + _BLOCK] += np.float32(weight) * vector[at : at + _BLOCK]

    def require_quorum(self, number: int) -> None:
        """Refuse to go on with too few.

        Raises:
            QuorumLost: names who is missing and why.
        """
        need = self.plan.cohort.min_sites
        if len(self.answered) < need:
            why = "; ".join(f"{site}: {reason}" for site, reason in self.rejected.items())
            raise QuorumLost(
                f"Round {number}: {len(self.answered)} of the {need} hospitals needed gave a valid reply ({why})."
            )

    def update(self) -> Vector:
        """The weighted mean update, or what the robust rule makes of all of them. Gives the sum away."""
        if self._kept:
            return ROBUST_RULES[self.plan.strategy.name](self._kept, self.plan.strategy)
        total = self._sums.pop("update")
        total /= np.float32(self._weight)
        return total

    def control(self) -> Vector:
        """The mean change of the control variates of those who answered."""
        return self._sums.pop("control") / np.float32(len(self.answered))

    def record(self, number: int, seconds: float) -> RoundRecord:
        """The round in one line."""
        return RoundRecord(
            round=number,
            answered=tuple(self.answered),
            rejected=self.rejected,
            rows=self.rows,
            update_norm=round(self._norm, 6),
            metrics=self.metrics,
            seconds=round(seconds, 6),
        )


def _norm(vector: NDArray[np.float32]) -> float:
    """ℓ² norm, block by block; not finite if any value is not."""
    with np.errstate(over="ignore", invalid="ignore"):
        blocks = (vector[at : at + _BLOCK] for at in range(0, vector.size, _BLOCK))
        return float(np.sqrt(sum(float(np.dot(block, block)) for block in blocks)))
