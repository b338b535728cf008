"""One round, top to bottom: invite, send, collect, unmask, step, record.

Replies are added up as they come, into one vector; the model itself stands on disk meanwhile. So a round needs
the memory of one sum and one reply, however many hospitals answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TypeVar

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from cloister_server.cores import each
from cloister_server.secure import MaskedTotal
from cloister_server.store import Checkpoint, RoundRecord, Store
from cloister_server.strategies import STRATEGIES, State, Vector, averaged, fedadam_without_noise, update_variance
from cloister_server.total import Mean, Total
from cloister_shared.charges import part_of, training_event
from cloister_shared.envelope import Roster
from cloister_shared.errors import ReplyRejected
from cloister_shared.layout import Layout
from cloister_shared.plan import FedAdam, Scaffold, StudyPlan
from cloister_shared.tally import kind_of
from cloister_shared.wire import Ticket, TicketHeader, chunks_of, pack, pack_vectors, unpack_reply

Who = TypeVar("Who", int, str)

KINDS = {"statistics": "query.statistics", "train": "train", "evaluate": "evaluate"}


@dataclass(frozen=True)
class Study:
    """One study at the coordinator: its terms, who takes part, and where its state is kept."""

    plan: StudyPlan
    layout: Layout
    enrolled: Mapping[str, int]
    """Hospital to Flower node, of those that are there."""
    store: Store
    roster: Roster = field(default_factory=dict[str, str])
    """The hospitals whose signatures count."""
    cohort: Mapping[str, str] = field(default_factory=dict[str, str])
    """For secure sums: each hospital of the run with its signed key, sorted by name."""

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
    mean = ask_all(study, number, grid)
    after = step(study, number, mean)
    record = RoundRecord.of(number, mean, time.perf_counter() - began)
    study.store.save(after, record)
    return record


def ask_all(study: Study, number: int, grid: Grid) -> Mean:
    """What the cohort answers to round ``number``, as one mean.

    Raises:
        QuorumLost: too few answered; asked again, the hospitals repeat themselves.
    """
    if study.plan.aggregation.secure_sum:
        return secure_mean(study, number, grid)
    total = Total(study.plan, study.layout, number, len(study.enrolled))
    sent = send(study, ticket(study, number), grid, KINDS[kind_of(study.plan, number)])
    rejected = collect(
        grid, sent, study.plan.round_timeout, lambda site, message: total.add(site, unpack_reply(message.content))
    )
    return total.mean(rejected)


def secure_mean(study: Study, number: int, grid: Grid) -> Mean:
    """The same, of which the coordinator sees the sum alone: collect what is masked, then ask for the masks.

    What was collected is on disk before anybody is asked to open it, since hospitals open a round once.
    """
    plan, wait, asked = study.plan, study.plan.round_timeout, ticket(study, number)
    total = MaskedTotal(plan, study.layout, study.roster, asked)
    if not total.restore(study.store.load_collected(total.transcript)):
        sent = send(study, asked, grid, KINDS[kind_of(plan, number)])
        del asked  # the model is on disk
        rejected = collect(grid, sent, wait, lambda site, message: total.add(site, unpack_reply(message.content)))
        total.close(rejected)
        study.store.save_collected(*total.collected())
    sent = send_unmask(study, total, grid)
    silent = collect(grid, sent, wait, lambda site, message: total.open(site, unpack_reply(message.content)))
    return total.mean(silent)


def ticket(study: Study, number: int) -> Ticket:
    """The terms of round ``number``, addressed to nobody yet."""
    now, plan = study.checkpoint(), study.plan
    kind = kind_of(plan, number)
    vectors: dict[str, Vector] = {} if kind == "statistics" else {"model": now.model}
    if isinstance(plan.strategy, Scaffold) and kind == "train":
        vectors["control"] = now.state.get("control", np.zeros_like(now.model))
    header = TicketHeader(
        run=now.run,
        plan=now.plan,
        round=number,
        site="",
        normalisation=now.normalisation,
        cohort=tuple(study.cohort.values()),
    )
    return Ticket(header, vectors, chunks_of(vectors, each))


def noise_variance(plan: StudyPlan, answered: int) -> float:
    """Variance of the shared noise in each parameter of the mean update over so many hospitals."""
    each = part_of(plan, training_event(plan, 1)) * (plan.privacy.clip_norm or 0.0)
    terms, spread = plan.training, each * answered**0.5
    if plan.privacy.unit == "site":
        return (spread / answered) ** 2
    return update_variance(spread, terms.learning_rate, terms.batch_size, answered)


def send(study: Study, asked: Ticket, grid: Grid, kind: str) -> dict[str, str]:
    """The same ticket to every hospital that takes part and is there; message id to hospital."""
    packed = pack_vectors(asked.vectors)
    to = {site: node for site, node in study.enrolled.items() if not study.cohort or site in study.cohort}
    messages = [
        Message(
            pack(asked.header.model_copy(update={"site": site}), packed), node, kind, group_id=str(asked.header.round)
        )
        for site, node in to.items()
    ]
    return dict(zip(grid.push_messages(messages), to, strict=True))


def send_unmask(study: Study, total: MaskedTotal, grid: Grid) -> dict[str, str]:
    """To each hospital in a sum: who is in it, and what they signed. Message id to hospital."""
    nothing = pack_vectors()
    to = {site: study.enrolled[site] for site in total.active if site in study.enrolled}
    messages = [
        Message(pack(total.question(site), nothing), node, "query.unmask", group_id=str(total.number))
        for site, node in to.items()
    ]
    return dict(zip(grid.push_messages(messages), to, strict=True))


def ask(grid: Grid, nodes: Sequence[int], kind: str, plan: str) -> dict[str, int]:
    """The same question to each node, of which nothing but the plan's digest is known; message id to node."""
    content = pack(TicketHeader(run="none", plan=plan, round=0, site=""), pack_vectors())
    return dict(zip(grid.push_messages([Message(content, node, kind) for node in nodes]), nodes, strict=True))


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


def step(study: Study, number: int, mean: Mean) -> Checkpoint:
    """The strategy's step from the model on disk by the mean update; after the last round, the average if asked for."""
    plan, before = study.plan, study.checkpoint()
    state: State = dict(before.state)
    control, average = state.pop("control", None), state.pop("average", None)
    strategy = STRATEGIES.get(plan.strategy.name, STRATEGIES["fedavg"])
    terms = plan.strategy if plan.strategy.name in STRATEGIES else _PLAIN_MEAN
    if isinstance(plan.strategy, FedAdam) and plan.strategy.correct_noise:
        strategy = partial(fedadam_without_noise, variance=noise_variance(plan, len(mean.answered)))
    model, state = strategy(before.model, mean.vectors.pop("update"), state, terms)
    if isinstance(plan.strategy, Scaffold):
        share = np.float32(len(mean.answered) / len(study.cohort or study.enrolled))
        state["control"] = (0 if control is None else control) + share * mean.vectors.pop("control")
    if plan.averaging:
        average = averaged(average, model, number, plan.averaging.decay)
        if number == plan.rounds:  # the hospitals judge what is handed over
            model = average
        else:
            state["average"] = average
    return replace(before, round=number, model=np.ascontiguousarray(model, dtype=np.float32), state=state)


@dataclass(frozen=True)
class _PlainMean:
    server_learning_rate: float = 1.0


_PLAIN_MEAN = _PlainMean()
