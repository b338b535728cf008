"""Who is attacked: six hospitals with invented rows, and all that a hostile coordinator has of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cloister_client.app import client_app
from cloister_client.consent import ANY
from cloister_client.dataset import Dataset, Rows
from cloister_client.quality import QualityReport
from cloister_client.site import Site
from cloister_server.app import open_study
from cloister_server.rounds import KINDS, secure_mean, ticket
from cloister_server.secure import MaskedTotal
from cloister_server.store import Store
from cloister_server.total import Mean
from cloister_shared import masking
from cloister_shared.envelope import Identity, read_identity
from cloister_shared.inputs import columns
from cloister_shared.masking import Masks, encoding_of
from cloister_shared.plan_file import amend, read_plan
from cloister_shared.tally import kind_of
from cloister_shared.wire import REFUSED, Reply, Ticket, TicketHeader, UnmaskHeader, pack, pack_vectors, unpack_reply
from cloister_simulations.grid import InProcessGrid
from cloister_simulations.site_folder import enrol_all, invented_names

HOSPITAL, COORDINATOR, MATHEMATICS = "hospital", "coordinator", "mathematics"
"""Who can refuse. Mathematics does where nobody need say no: too few shares open, or too many keys are possible."""


class Refused(Exception):
    """Somebody said no, or the mathematics did."""

    def __init__(self, by: str, reason: str) -> None:
        super().__init__(reason)
        self.by, self.reason = by, reason


PLAN = """\
study: attacked
title: Three numbers and an outcome
task: {name: tabular, model: mlp, hidden: [16]}
table:
  target: {name: outcome, positive: 1, negative: 0}
  features:
    - {name: a, kind: number, range: [-2, 2]}
    - {name: b, kind: number, range: [-2, 2]}
    - {name: c, kind: number, range: [-2, 2]}
cohort: {min_sites: 3, min_patients: 4}
rounds: 3
round_timeout: 5
strategy: {name: fedavg}
training: {learning_rate: 0.5, batch_size: 64, local_steps: 2}
privacy: {mechanism: none}
evaluation: {min_count: 1, resamples: 100}
"""
HOSPITALS = tuple(invented_names(6))
VICTIM, CULPRIT = "cedar", "alder"
"""Whose update the attacker wants; the hospital that is the attacker's, where one is."""
OTHERS = tuple(site for site in HOSPITALS if site != VICTIM)
ROWS = dict.fromkeys(HOSPITALS, 16) | {VICTIM: 48}


class Consortium:
    """Six hospitals behind a real ClientApp, and whoever speaks to them."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        """``changes`` amend the plan."""
        self.plan, self.folder = amend(read_plan(PLAN), **changes), folder
        enrol_all(folder, HOSPITALS, self.plan)
        self.sites = {site: self.opened(site) for site in HOSPITALS}
        self.tamper: Callable[[str, Reply], Reply] | None = None
        """What a hostile hospital makes of its reply to a kind of message."""
        honest = client_app(lambda context: self.sites[str(context.node_config["site"])])

        def app(message: Any, context: Any) -> Any:
            answer = honest(message, context)
            if self.tamper and context.node_config["site"] == CULPRIT and not answer.has_error():
                said = self.tamper(message.metadata.message_type, unpack_reply(answer.content))
                answer.content = pack(said.header, pack_vectors(said.vectors, said.octets))
            return answer

        self.grid = InProcessGrid(app, HOSPITALS)  # pyright: ignore[reportArgumentType] it is only ever called
        self.study = open_study(self.plan, Store(folder), self.grid)

    def opened(self, site: str) -> Site:
        """A hospital on its folder, as after a restart."""
        seen = QualityReport(site, ROWS[site], [])
        data = Dataset(columns(self.plan.table), _rows(site, 0), _rows(site, 1), seen, ANY)
        return Site(self.plan, data, self.folder / "sites" / site)

    def identity(self, site: str) -> Identity:
        """A hospital's signing key, for attacks in which that hospital is the attacker's."""
        return read_identity(self.folder / "sites" / site / "identity.key")

    # --- what a coordinator can say --------------------------------------------------------------------------
    def asked(self, number: int = 1, **changes: Any) -> Ticket:
        """The ticket that an honest coordinator would send, with ``changes`` to its header."""
        honest = ticket(self.study, number)
        return Ticket(honest.header.model_copy(update=changes), honest.vectors)

    def send(self, site: str, asked: Ticket, kind: str = "") -> Reply:
        """Put a ticket to a hospital.

        Raises:
            Refused: the hospital said no.
        """
        header = asked.header.model_copy(update={"site": site})
        return self.say(site, kind or KINDS[kind_of(self.plan, header.round)], header, asked.vectors)

    def say(self, site: str, kind: str, header: TicketHeader | UnmaskHeader, vectors: Any = None) -> Reply:
        """Any message at all, as ``rounds`` packs it."""
        content, node = pack(header, pack_vectors(vectors or {})), self.study.enrolled[site]
        names = self.grid.push_messages([self.grid.create_message(content, kind, node, str(header.round))])
        (reply,) = self.grid.pull_messages(names)
        if not reply.has_error():
            return unpack_reply(reply.content)
        if reply.error.code != REFUSED:
            raise RuntimeError(f"{site} broke: {reply.error.reason}")
        raise Refused(HOSPITAL, str(reply.error.reason))

    def cohort(self, run: str, sites: Sequence[str] = HOSPITALS) -> tuple[str, ...]:
        """Signed keys of these hospitals for a run of the attacker's choice."""
        asked = Ticket(self.asked(0, run=run, cohort=()).header)
        return tuple(self.send(site, asked, "query.advertise").header.signed for site in sites)

    def mean(self, sites: Sequence[str], asked: Ticket) -> NDArray[np.float32]:
        """The mean update of these hospitals, the rest of the ticket's cohort being declared dropped out."""
        total = MaskedTotal(self.plan, self.study.layout, self.study.roster, asked)
        for site in sites:
            total.add(site, self.send(site, asked))
        total.close({})
        for site in sites:
            total.open(site, self.say(site, "query.unmask", total.question(site)))
        return total.mean({}).vectors["update"]

    def round(self) -> Mean:
        """An honest coordinator's round."""
        return secure_mean(self.study, 1, self.grid)

    # --- what nobody outside may see -------------------------------------------------------------------------
    def update(self, site: str, asked: Ticket | None = None) -> NDArray[np.float32]:
        """What the attacker wants, to hold what it found against."""
        asked = asked or self.asked()
        own = Ticket(asked.header.model_copy(update={"site": site}), asked.vectors)
        reply = self.sites[site].answers.find(asked.header.run, own.digest)
        assert reply, "the hospital was asked before"
        return reply.vectors["update"]

    def recovered(self, found: NDArray[Any], asked: Ticket | None = None) -> str:
        """Say that the victim's update was had, after holding it against the true one."""
        truth = self.update(VICTIM, asked)
        error = float(np.abs(found - truth).max() / np.abs(truth).max())
        assert error < 0.01, "the attack's own arithmetic is wrong"
        return f"recovered the update of {VICTIM} to {error:.0e} of its largest value"


def _rows(site: str, part: int) -> Rows:
    generator = np.random.default_rng([HOSPITALS.index(site), part])
    x = generator.normal(size=(ROWS[site], 3)).astype(np.float32)
    y = (x[:, 0] - x[:, 1] + generator.normal(size=len(x)) > 0).astype(np.float32)
    return Rows(torch.from_numpy(x), torch.from_numpy(y), np.arange(len(x)))


class Loot:
    """What a hostile coordinator has of one round: masked updates, sealed shares, and keys to some of them."""

    def __init__(self, consortium: Consortium, asked: Ticket | None = None, sites: Iterable[str] = HOSPITALS) -> None:
        """Collect from ``sites`` what they send in answer to a ticket."""
        self.consortium, self.asked = consortium, asked or consortium.asked()
        self.masked = {site: consortium.send(site, self.asked) for site in sites}
        self.keys: dict[tuple[str, str], dict[str, bytes]] = {}

    def question(self, site: str, active: Sequence[str], dropped: Sequence[str]) -> UnmaskHeader:
        """Any question, with whatever statements there are."""
        header = self.asked.header
        said = tuple(self.masked[name].header.signed for name in active if name in self.masked)
        terms = {"transcript": self.asked.transcript, "active": tuple(active), "dropped": tuple(dropped)}
        return UnmaskHeader(run=header.run, round=header.round, site=site, statements=said, **terms)

    def ask(self, site: str, active: Sequence[str], dropped: Sequence[str] = ()) -> None:
        """Have a hospital give its keys for this sum."""
        said = self.consortium.say(site, "query.unmask", self.question(site, active, dropped))
        self.take(site, active, dropped, said)

    def take(self, site: str, active: Sequence[str], dropped: Sequence[str], reply: Reply) -> None:
        """Sort the keys of an answer."""
        keys = iter(np.split(reply.octets["keys"], len(active) * (1 + len(dropped))))
        for dealer in active:
            for slot in (dealer, *dropped):
                self.keys.setdefault((dealer, slot), {})[site] = next(keys).tobytes()

    def collude(self, site: str) -> None:
        """A hospital that is the attacker's gives all its keys, whatever it answered."""
        path = self.consortium.folder / "sites" / site / f"{self.asked.header.run}.keys.json"
        for dealer, chain in json.loads(path.read_text(encoding="utf-8"))["chains"].items():
            own = masking.seal_keys(bytes.fromhex(chain), self.asked.transcript, dealer, site, len(HOSPITALS))
            for slot, key in zip(HOSPITALS, own, strict=True):
                self.keys.setdefault((dealer, slot), {})[site] = key

    def open(self) -> str:
        """Take all masks off the victim's update.

        Raises:
            Refused: too few shares of a mask open.
        """
        seeds = [(self._seed(VICTIM, VICTIM), -1)]
        seeds += [(self._seed(VICTIM, peer), -masking.sign(VICTIM, peer)) for peer in OTHERS]
        encoding, size = encoding_of(self.consortium.plan), self.consortium.study.layout.size
        ring = np.zeros(size, np.uint32)
        encoding.add_packed(ring, self.masked[VICTIM].octets["update"])
        Masks(seeds).add_to(ring)
        return self.consortium.recovered(encoding.decode(ring, 1 / len(HOSPITALS), 1), self.asked)

    def _seed(self, one: str, other: str) -> bytes:
        """The seed of a mask, from whichever of the two dealt shares of it that open."""
        need = masking.threshold(len(HOSPITALS))
        dealt = [self._opened(*pair) for pair in ((one, other), (other, one)) if pair[0] in self.masked]
        shares = max(dealt, key=len)
        if len(shares) < need:
            whose = f"{one}'s own mask" if one == other else f"the mask of {one} and {other}"
            raise Refused(MATHEMATICS, f"Of the {need} shares that open {whose}, {len(shares)} can be had.")
        return masking.combine(dict(list(shares.items())[:need]))

    def _opened(self, dealer: str, slot: str) -> dict[int, int]:
        """The shares of one seed that the attacker can open, by holder."""
        n, found = len(HOSPITALS), dict[int, int]()
        for holder, key in self.keys.get((dealer, slot), {}).items():
            row = HOSPITALS.index(holder)
            at = (row * n + HOSPITALS.index(slot)) * masking.SEALED
            found[row] = masking.unseal(self.masked[dealer].octets["shares"][at : at + masking.SEALED].tobytes(), key)
        return found


def any_of(attempts: Iterable[Callable[[], object]]) -> None:
    """Go on if one attempt went through; else raise the last refusal."""
    last, through = None, False
    for attempt in attempts:
        try:
            attempt()
            through = True
        except Refused as refusal:
            last = refusal
    if last and not through:
        raise last
