"""Whole rounds in process with training stubbed: real coordinator, real hospitals, updates of any size.

A stubbed hospital is a ``Site`` whose training hands over a stretch of made-up normal numbers; all else is as
shipped: it checks the ticket, keeps its answer, masks, seals and unmasks. The grid takes the CPU time of each
hospital's work, less the making of its update; what the process spent beside it is the coordinator's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import torch
from flwr.app import ArrayRecord, Error, Message
from numpy.typing import NDArray

from cloister_client.app import client_app
from cloister_client.consent import ANY
from cloister_client.dataset import Dataset, Rows
from cloister_client.quality import QualityReport
from cloister_client.site import Site
from cloister_server.rounds import Study, run_round
from cloister_server.store import Checkpoint, Store
from cloister_shared.envelope import read_roster
from cloister_shared.layout import Layout
from cloister_shared.masking import Encoding, Masks, Ring, encoding_of
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend
from cloister_shared.wire import Reply, Ticket, TicketHeader
from cloister_simulations.federation import Arm, plan_for
from cloister_simulations.grid import LOST, Fault, InProcessGrid
from cloister_simulations.scenario import read_scenario
from cloister_simulations.site_folder import enrol_all

Vector = NDArray[np.float32]
RUN = "benchmark"


@dataclass(frozen=True)
class Terms:
    """One round. Hospitals are numbered from 0."""

    hospitals: int
    parameters: int
    dropped: Sequence[int] = ()
    """Their update never arrives."""
    silent: Sequence[int] = ()
    """Their masked update arrives; asked to unmask, they say nothing."""
    rows: Sequence[int] = ()
    """Patients of each, as weights; without them each hospital counts alike."""
    max_rows: int | None = None
    """The plan's; the largest hospital's, if absent."""
    sd: float = 0.01
    """Of the updates."""
    bound: float = 1.5
    bits: int = 32
    secure: bool = True

    @cached_property
    def plan(self) -> StudyPlan:
        return amend(
            plan_for(read_scenario("breast-cancer").plan, Arm("federated"), 0),
            cohort={"min_sites": 3, "min_patients": min(self.rows, default=1), "max_rows": self.most_rows},
            aggregation={
                "secure_sum": self.secure,
                "weights": "rows" if self.rows else "equal",
                "max_update_norm": 1e6,
                "bound": self.bound,
                "bits": self.bits,
            },
        )

    @property
    def most_rows(self) -> int:
        return self.max_rows or max(self.rows, default=1)

    @cached_property
    def _noise(self) -> Vector:
        drawn = np.random.default_rng(0).standard_normal(self.parameters + self.hospitals, dtype=np.float32)
        drawn *= np.float32(self.sd)
        return drawn

    def update(self, k: int) -> Vector:
        """What hospital ``k`` learned; the same each time."""
        return self._noise[k : k + self.parameters].copy()

    @property
    def answered(self) -> list[int]:
        """Whose updates are in the sum."""
        return [k for k in range(self.hospitals) if k not in self.dropped]

    def mean(self) -> NDArray[np.float64]:
        """What the round should come to, in double precision."""
        weights = {k: self.rows[k] if self.rows else 1 for k in self.answered}
        total = np.zeros(self.parameters)
        for k, weight in weights.items():
            total += weight * self.update(k).astype(np.float64)
        return total / sum(weights.values())

    def integers(self) -> Ring:
        """The integers that the hospitals encode, added up without a mask."""
        encoding, total = encoding_of(self.plan), np.zeros(self.parameters, np.uint32)
        for k in self.answered:
            weight = self.rows[k] / (self.hospitals * self.most_rows) if self.rows else 1 / self.hospitals
            total += encoding.encode(self.update(k), weight, Masks([]))[0]
        return total


@dataclass(frozen=True)
class Cost:
    """What a round took and what came out. Seconds of CPU, but ``wall``."""

    coordinator: float
    hospitals: dict[str, float]
    wall: float
    sent: int
    """Bytes that one hospital sent, the largest of all."""
    model: Vector

    @property
    def worst(self) -> float:
        """The hospital that worked longest."""
        return max(self.hospitals.values())

    @property
    def cpu(self) -> float:
        """All parties together."""
        return self.coordinator + sum(self.hospitals.values())


def one_round(terms: Terms, number: int = 1) -> Cost:
    """Round ``number`` of a new run; in the first one the hospitals check each other's keys as well."""
    with TemporaryDirectory() as scratch, opened(terms, Path(scratch)) as (study, grid):
        for before in range(1, number):
            run_round(study, before, grid)
        grid.reset()
        began, cpu = time.perf_counter(), time.process_time()
        run_round(study, number, grid)
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        work = {name: grid.spent[name] - site.making for name, site in grid.sites.items()}
        return Cost(cpu - sum(grid.spent.values()), work, wall, max(grid.sent.values()), study.checkpoint().model)


@contextmanager
def opened(terms: Terms, folder: Path) -> Iterator[tuple[Study, TimedGrid]]:
    """A study of stubbed hospitals that stands before its round 1."""
    plan, layout = terms.plan, Layout((("weights", terms.parameters),), ())
    names = [name_of(k) for k in range(terms.hospitals)]
    enrol_all(folder, names)
    store, cohort = Store(folder), dict[str, str]()
    store.save(Checkpoint(RUN, plan.digest, 0, np.zeros(terms.parameters, np.float32)))
    sites = {name: Hospital(terms, k, folder / "sites" / name, layout) for k, name in enumerate(names)}
    for name, site in sites.items():
        if site.secure:
            cohort[name] = site.secure.advert(TicketHeader(run=RUN, plan=plan.digest, round=0, site=name))
    nodes = {name: node for node, name in enumerate(names, start=1)}
    yield Study(plan, layout, nodes, store, read_roster(folder / "roster.json"), cohort), TimedGrid(terms, sites)


def name_of(k: int) -> str:
    return f"hospital-{k:03d}"


class Hospital(Site):
    """A hospital that has no patients to learn from, only their number."""

    def __init__(self, terms: Terms, k: int, folder: Path, layout: Layout) -> None:
        count = terms.rows[k] if terms.rows else 1
        rows = Rows(torch.zeros(count, 0), torch.zeros(count), np.arange(count))
        super().__init__(terms.plan, Dataset((), rows, rows, QualityReport(name_of(k), count, []), ANY), folder)
        self.layout, self.making = layout, 0.0
        self._learn: Callable[[], Vector] = lambda: terms.update(k)

    def _train(self, ticket: Ticket) -> Reply:
        began = time.process_time()
        update = self._learn()
        self.making += time.process_time() - began
        return self._reply(ticket, {"update": update})


class TimedGrid(InProcessGrid):
    """The in-process grid with a clock and a scale."""

    def __init__(self, terms: Terms, sites: dict[str, Hospital]) -> None:
        faults = [Fault("drop", name_of(k), 1) for k in terms.dropped]
        super().__init__(client_app(lambda context: sites[str(context.node_config["site"])]), sites, faults)
        self.sites, self._silent = sites, {name_of(k) for k in terms.silent}
        self.reset()

    def reset(self) -> None:
        """Begin to count."""
        self.spent, self.sent = dict.fromkeys(self.sites, 0.0), dict.fromkeys(self.sites, 0)
        for site in self.sites.values():
            site.making = 0.0

    def _answer(self, message: Message, name: str) -> Message | None:
        site = str(self._contexts[message.metadata.dst_node_id].node_config["site"])
        if message.metadata.message_type == "query.unmask" and site in self._silent:
            return Message(Error(code=LOST, reason="no answer within the round's time"), reply_to=message)
        began = time.process_time()
        reply = super()._answer(message, name)
        self.spent[site] += time.process_time() - began
        if reply and not reply.has_error():
            self.sent[site] += _octets(reply)
        return reply


def _octets(message: Message) -> int:
    """Bytes of a message's header and vectors; Flower's own framing is some hundred more."""
    vectors = message.content["vectors"]
    assert isinstance(vectors, ArrayRecord)
    return sum(len(array.data) for array in vectors.values()) + len(str(message.content["header"]))


@contextmanager
def sums_seen() -> Iterator[list[Ring]]:
    """The integers that the coordinator decodes, as they come."""
    seen: list[Ring] = []
    decode = Encoding.decode

    def watched(self: Encoding, ring: Ring, weight: float, sites: int) -> Vector:
        seen.append(ring.copy())
        return decode(self, ring, weight, sites)

    with patch.object(Encoding, "decode", watched):
        yield seen


def wrong_in(terms: Terms, ring: Ring) -> int:
    """Elements in which the sum that the coordinator opened is not the sum of the hospitals' integers."""
    return int(np.count_nonzero((ring - terms.integers()) << np.uint32(32 - terms.bits)))


def error(found: Vector, terms: Terms) -> float:
    """Relative ℓ² distance of a round's mean from the one in double precision."""
    mean = terms.mean()
    return float(np.linalg.norm(found - mean) / np.linalg.norm(mean))
