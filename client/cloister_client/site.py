"""One hospital in one study: verify the ticket, load, train, reply. It answers to the plan it approved."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cloister_client.answers import Answers, LocalState, drawn_moments
from cloister_client.combat import checked, effects, inputs, sent
from cloister_client.consent import consent
from cloister_client.dataset import Dataset, Rows
from cloister_client.evaluate import at_a_glance, in_full, seen
from cloister_client.ledger import Ledger
from cloister_client.lineage import Lineage
from cloister_client.network import Network
from cloister_client.own_model import OwnModel
from cloister_client.privacy import (
    Mechanism,
    Units,
    dp_sgd,
    noisy,
    plain,
    ring_spread,
    with_its_part,
)
from cloister_client.secure import SecureSum
from cloister_client.spending import Spending
from cloister_client.statistics import noisy_readiness, noisy_risks, noisy_statistics
from cloister_client.tickets import require
from cloister_client.train import sgd, train
from cloister_shared.budget import Event
from cloister_shared.charges import evaluation_event, readiness_event, statistics_event, training_event
from cloister_shared.combat import Constants
from cloister_shared.envelope import read_identity, read_roster
from cloister_shared.errors import TicketRefused, UpdateRefused
from cloister_shared.layout import gathered, initial_model, layout_of
from cloister_shared.noise import Entropy, keystream, reproducible
from cloister_shared.objective import objective_of
from cloister_shared.outcomes.judging import Estimate
from cloister_shared.plan import FedProx, Scaffold, StudyPlan
from cloister_shared.tally import Numbers
from cloister_shared.wire import (
    Octets,
    Reply,
    ReplyHeader,
    Ticket,
    UnmaskHeader,
    Vectors,
)

Estimates = dict[str, dict[str, tuple[float | None, float | None, float | None]]]
"""Of each model, the value and interval of each metric."""


class Site:
    """One hospital in one study: the plan it approved, its rows, its model, and what it must remember."""

    def __init__(
        self,
        plan: StudyPlan,
        dataset: Dataset,
        folder: Path,
        *,
        ledger: Path | None = None,
        population: str = "patients",
        approved: str = "",
        identity: Path | None = None,
        lineage: Lineage | None = None,
        noise_seed: int | None = None,
    ) -> None:
        """``folder`` keeps the answers and, for secure sums, ``identity.key`` and ``roster.json``; public weights too.

        ``identity`` is the path of the hospital's signing key, where that is not in ``folder``.
        ``ledger`` is the hospital's, which all its studies on one ``population`` share; without it, this study
        keeps one of its own in ``folder``. ``approved`` is the digest of the quote that the hospital approved, if
        it did: other charges are then refused. ``lineage`` writes down whose rows are used; simulations in one process
        do without. ``noise_seed`` voids privacy; simulations alone pass it.
        """
        self.plan, self.dataset, self.name = plan, dataset, dataset.quality.site
        self._digest = plan.digest  # taken once: every ticket is held against it
        model = initial_model(plan, folder)
        self.layout = layout_of(plan, model)
        self._vector = gathered(model, self.layout.shared + self.layout.local)
        self._shared, self._local = np.split(self._vector, [self.layout.size])
        self.network = Network(model, objective_of(plan), self._vector)
        folder.mkdir(parents=True, exist_ok=True)
        self.answers, self.local = Answers(folder), LocalState(folder)
        self.ledger = Ledger(ledger or folder / "ledger.sqlite", population) if plan.private else None
        self.spending = Spending(plan, dataset, self.ledger) if self.ledger else None
        self.folder, self.noise_seed, self.approved, self.lineage = folder, noise_seed, approved, lineage
        self._entropy: Entropy = keystream()
        self._constants: Constants | None = None
        self._private: Mechanism | None = None
        self._initial_local = self._local.copy()
        self.own = OwnModel(plan, folder, self.layout) if plan.personalisation.ditto else None
        self._keeps = bool(self.layout.local or self.own) or isinstance(plan.strategy, Scaffold)
        self.secure = None
        if plan.aggregation.secure_sum:
            key, roster = read_identity(identity or folder / "identity.key"), read_roster(folder / "roster.json")
            self.secure = SecureSum(plan, self._digest, self.name, key, roster, dataset.policy.min_cohort, folder)

    def close(self) -> None:
        """Let go of the hospital's files."""
        for file in (self.ledger, self.lineage):
            if file:
                file.close()

    # --- the things a coordinator can ask ---------------------------------------------------------------
    def enrol(self) -> ReplyHeader:
        """Who this is, and the order of parameters it will speak in. A private plan's whole cost is reserved first.

        Raises:
            ConsentRefused: the hospital's policy does not allow the plan.
            PlanRefused: shared noise does not fit into the ring.
            BudgetExceeded: the hospital's ceiling does not admit the plan.
        """
        consent(self.dataset.policy, self.plan, self.name)
        if self.plan.shared_noise:  # before anything is charged for a noise that the ring cannot carry
            event = training_event(self.plan, 1)
            for sites in (self.plan.cohort.min_sites, self.plan.cohort.max_sites):
                ring_spread(self.plan, event, sites, self.layout.size)
        if self.spending:
            self.spending.reserve(self.approved)
        return ReplyHeader(run="enrol", round=0, site=self.name, layout=self.layout.digest)

    def advertise(self, ticket: Ticket) -> Reply:
        """This hospital's signed key for the secure sums of a run."""
        assert self.secure, "check refuses it otherwise"
        header = ReplyHeader(run=ticket.header.run, round=0, site=self.name, signed=self.secure.advert(ticket.header))
        return Reply(header)

    def readiness(self, ticket: Ticket) -> Reply:
        """What this hospital's records hold, under noise of its own: told by itself, so no mask hides it."""
        if (coverage := self.dataset.coverage) is None:
            raise TicketRefused("The plan does not ask for readiness.", mend="Correct the coordinator.")
        event = readiness_event(self.plan)

        def work() -> Reply:
            if event:
                self._commit(ticket, event)
            self._uses(ticket)
            found = noisy_readiness(coverage, self.plan, self._draw_from(ticket, "readiness"))
            # Not self._reply, which tells how many training rows there are.
            return Reply(ReplyHeader(run=ticket.header.run, round=0, site=self.name, metrics=found))

        return self._once(ticket, work, masked=False) if event else work()

    def statistics(self, ticket: Ticket) -> Reply:
        """Noisy sums and counts over this hospital's training rows, for normalisation and of the cohort."""
        if not self.plan.asks_statistics:
            raise TicketRefused("The plan does not ask for statistics.", mend="Correct the coordinator.")

        def work() -> Reply:
            if self.plan.harmonises:
                return self._reply(ticket, {}, metrics=sent(self.plan, self._own_moments(ticket)))
            return self._reply(ticket, {}, metrics=self._statistics(ticket))

        return self._once(ticket, work)

    def _statistics(self, ticket: Ticket) -> Numbers:
        if event := statistics_event(self.plan):
            self._commit(ticket, event)
        self._uses(ticket)
        return noisy_statistics(self.dataset.train, self.plan, self._draw_from(ticket))

    def _own_moments(self, ticket: Ticket) -> Numbers:
        """For ``combat``: drawn and paid for once a plan, whoever asks first, and from then on the same."""
        return drawn_moments(self.folder, self._digest, lambda: self._statistics(ticket))

    def train(self, ticket: Ticket) -> Reply:
        """One round: judge the incoming model, train from it, reply with the difference."""
        return self._once(ticket, lambda: self._train(ticket))

    def evaluate(self, ticket: Ticket) -> Reply:
        """Every metric of the final model on the held-out rows, and of its fine-tuned copy if the plan has one.

        With a share of epsilon for it: noisy counts of the risks that it gives, from which metrics follow.
        """
        event = evaluation_event(self.plan)

        def work() -> Reply:
            if event:
                self._commit(ticket, event)
            self._uses(ticket)
            if event is None:
                return self._reply(ticket, {}, estimates=self.judge(ticket))
            _, rows = self._opened(ticket)
            found = noisy_risks(rows, seen(self.network, rows)[1], self.plan, event, self._draw_from(ticket))
            return self._reply(ticket, {}, metrics=found)

        # Exact metrics are the same whenever they are asked for. Kept, they would take the place of the last round's
        # noisy answer, and that round asked again would be a second draw of noise for one commitment.
        reply = self._once(ticket, work) if event or self.secure else work()
        if self.lineage:
            self.lineage.receives(ticket.vectors["model"], self.folder)
        if self.ledger:  # the study is over: what it did not spend is free again
            self.ledger.settle(self._digest)
        return reply

    def judge(self, ticket: Ticket) -> Estimates:
        """What ``evaluate`` says, as this hospital's own people may read it."""
        train_rows, test_rows = self._opened(ticket)
        terms, seed = self.plan.evaluation, self.plan.seed
        found = {"final": in_full(self.network, test_rows, terms, seed)}
        if steps := self.plan.personalisation.fine_tune_steps:
            mechanism = self._plain(train_rows, ticket)
            train(mechanism, self.plan.training, steps)
            found["fine-tuned"] = in_full(self.network, test_rows, terms, seed)
        if self.own:
            self.own.load(self.local.before(self._digest, self.plan.rounds + 1))
            found["ditto"] = in_full(self.own.network, test_rows, terms, seed)
        return {name: _plain_values(metrics) for name, metrics in found.items()}

    def unmask(self, request: UnmaskHeader) -> Reply:
        """Help to open a round's sum."""
        if self.secure is None or request.site != self.name:
            raise TicketRefused(
                f"{self.name} has nothing to unmask for {request.site}.", mend="Correct the coordinator."
            )
        return self.secure.unmask(request)

    def final_predictions(self, ticket: Ticket) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Truth and prediction of the held-out rows. For simulations: no message ever carries them."""
        _, test_rows = self._opened(ticket)
        return seen(self.network, test_rows)

    def _opened(self, ticket: Ticket) -> tuple[Rows, Rows]:
        """Training and held-out rows, with the final model in place."""
        rows = self._rows(ticket)
        self._load(ticket, self.local.before(self._digest, self.plan.rounds + 1))
        return rows

    # --- a round -------------------------------------------------------------------------------------------
    def _train(self, ticket: Ticket) -> Reply:
        plan, number = self.plan, ticket.header.round
        train_rows, test_rows = self._rows(ticket)
        kept = (self.local.before(self._digest, number) or {}) if self._keeps else {}
        start = self._load(ticket, kept)
        common = self._vector.copy() if self.own else start
        judged = {} if plan.evaluation.epsilon_share else at_a_glance(self.network, test_rows, plan.evaluation)
        mechanism = self._mechanism(train_rows, ticket)
        if mechanism.event:
            self._commit(ticket, mechanism.event)
        self._uses(ticket)
        pull = plan.strategy.mu if isinstance(plan.strategy, FedProx) else 0.0
        correction = None
        if isinstance(plan.strategy, Scaffold):
            correction = self._correction(ticket, kept, mechanism.parameters)
        if plan.shared_noise and plan.privacy.unit != "site":
            update = self._one_step(mechanism)
        else:
            train(mechanism, plan.training, plan.training.local_steps, pull=pull, correction=correction)
            update = self._shared - start
        if mechanism.event and plan.shared_noise:
            sites = len(ticket.header.cohort)
            ring = with_its_part(update, plan, mechanism.event, sites, self._bytes)
            return self._reply(ticket, {}, {"update": ring.view(np.uint8)}, metrics=judged)
        if mechanism.event and plan.privacy.unit == "site":
            update = noisy(update, plan, mechanism.event, self._bytes)
        vectors: Vectors = {"update": update}
        keep: Vectors = {"layers": self._local} if self.layout.local else {}
        if self.own and (ditto := plan.personalisation.ditto):
            self.own.load(kept)
            keep["ditto"] = self.own.trained(ditto, common, train_rows, self._seeded(ticket))
        if correction is not None:
            # Karimireddy et al. 2020, option II: c_i <- c_i - c + (x - y_i) / (K * learning rate)
            scale = plan.training.local_steps * plan.training.learning_rate
            vectors["control"] = (-ticket.vectors["control"] - vectors["update"] / scale).astype(np.float32)
            keep["control"] = kept.get("control", np.zeros_like(start)) + vectors["control"]
        if keep:
            self.local.save(self._digest, number, keep)
        return self._reply(ticket, vectors, metrics=judged)

    def _one_step(self, mechanism: Mechanism) -> NDArray[np.float32]:
        """The step alone: beside a parameter it would lose low bits, and with them the bound on a patient's part."""
        mechanism.gradient()
        self._vector[:] = 0.0
        with torch.no_grad():
            sgd(mechanism.parameters, self.plan.training)()
        return self._shared.copy()

    def _correction(self, ticket: Ticket, kept: Vectors, parameters: Sequence[Tensor]) -> list[Tensor]:
        """SCAFFOLD's c - c_i, shaped like the parameters; zero for those that stay here."""
        whole = np.zeros_like(self._vector)
        whole[: self.layout.size] = ticket.vectors["control"] - kept.get("control", np.float32(0.0))
        return [torch.from_numpy(whole).as_strided(p.size(), p.stride(), p.storage_offset()) for p in parameters]

    def _mechanism(self, rows: Rows, ticket: Ticket) -> Mechanism:
        if not self.plan.private:
            return self._plain(rows, ticket)
        self._entropy = self._draw_from(ticket)
        if self.plan.privacy.unit == "site":  # the noise is on the update, not on its steps
            return replace(self._plain(rows, ticket), event=training_event(self.plan, 1))
        if self._private is None:
            assert self.spending is not None
            event = self.spending.training(len(Units.of(rows, self.plan.privacy.unit or "record")))
            self._private = dp_sgd(self.network.model, self.network.objective, rows, self.plan, event, self._bytes)
        return self._private

    def _plain(self, rows: Rows, ticket: Ticket) -> Mechanism:
        """Batches that depend on seed, hospital and round alone, so that a round can be done over."""
        return plain(self.network, rows, self.plan.training.batch_size, self._seeded(ticket))

    def _seeded(self, ticket: Ticket) -> torch.Generator:
        digest = hashlib.sha256(f"{self.plan.seed}|{self.name}|{ticket.header.round}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))

    # --- what every request passes through -------------------------------------------------------------------
    def check(self, ticket: Ticket, kind: str) -> None:
        """Hold a ticket against the approved plan; ``kind`` is the work asked for.

        Raises:
            ConsentRefused: the hospital's policy does not allow the plan.
            TicketRefused: it is for another plan, hospital or round, or its vectors are not what the work needs.
            UpdateRefused: the hospital has more rows than the plan allows.
        """
        consent(self.dataset.policy, self.plan, self.name)
        require(ticket, kind, self.plan, self._digest, self.name, self.layout.size)
        if kind == "advertise" and self.secure is None:
            raise TicketRefused("The plan has no secure sum.", mend="Correct the coordinator.")
        if len(self.dataset.train) > self.plan.cohort.max_rows:  # before epsilon is spent on what would not count
            raise UpdateRefused(f"{self.name} has more rows than the plan's cohort.max_rows.")
        if kind not in ("advertise", "readiness") and self.secure:
            self.secure.admit(ticket)

    def _once(self, ticket: Ticket, work: Callable[[], Reply], *, masked: bool = True) -> Reply:
        """Do the work, or repeat the answer this very ticket already had.

        An answer is on disk before it is sent, so a noisy update exists once however often it is asked for, and
        one mask never hides two updates.
        """
        if not (self.plan.private or self._keeps or self.secure):
            return work()
        digest = ticket.digest
        with self.answers.locked(ticket.header.run):  # or two at once would both find none
            reply = self.answers.find(ticket.header.run, digest)
            if reply is None:
                reply = work()
                with self.answers.saving(digest, reply):
                    return self._masked(ticket, reply) if masked else reply
        return self._masked(ticket, reply) if masked else reply

    def _masked(self, ticket: Ticket, reply: Reply) -> Reply:
        return self.secure.mask(ticket, reply) if self.secure else reply

    def _commit(self, ticket: Ticket, event: Event) -> None:
        assert self.spending is not None  # a private plan has it
        self.spending.commit(ticket, event)

    def _uses(self, ticket: Ticket) -> None:
        """After the commitment, which may be refused, and before there is anything that could leave."""
        if self.lineage:
            self.lineage.uses(ticket.header.round)

    def _bytes(self, count: int) -> bytes:
        return self._entropy(count)

    def _draw_from(self, ticket: Ticket, purpose: str = "") -> Entropy:
        """Where this request's sampling and noise come from: a fresh keystream, but in a simulation that says so."""
        if self.noise_seed is None:
            return keystream()
        return reproducible(f"{self.noise_seed}|{self.name}|{purpose or ticket.header.round}")

    def _rows(self, ticket: Ticket) -> tuple[Rows, Rows]:
        """Training and held-out rows, centred and scaled; the constants may not change within a run."""
        constants = ticket.header.normalisation if self.plan.normalises else self.constants
        if constants is None:
            raise TicketRefused("The ticket lacks the federated statistics.", mend="Correct the coordinator.")
        if self._constants is None:
            plan, data = self.plan, self.dataset
            checked(plan, constants)
            own = effects(plan, self._own_moments(ticket), constants) if plan.harmonises else None
            self._train_rows, self._test_rows = (inputs(rows, plan, constants, own) for rows in (data.train, data.test))
            self._constants = constants
        elif constants != self._constants:
            raise TicketRefused("The federated statistics changed within the run.", mend="Start a new run.")
        return self._train_rows, self._test_rows

    @cached_property
    def constants(self) -> tuple[tuple[float, float], ...]:
        """Centre and scale of each number column, from the plan or from this hospital's own training rows."""
        at = [i for i, c in enumerate(self.dataset.columns) if c.kind == "number" and not c.absent]
        if self.plan.normalisation.method == "plan":
            return tuple((self.dataset.columns[i].centre, self.dataset.columns[i].scale) for i in at)
        return own_constants(self.dataset.train, at)

    def _load(self, ticket: Ticket, kept: Vectors | None) -> NDArray[np.float32]:
        """Put the incoming model, and the layers kept here, into the network; the vector that came in."""
        start = ticket.vectors["model"]
        self._shared[:] = start
        self._local[:] = (kept or {}).get("layers", self._initial_local)
        return start

    def _reply(
        self,
        ticket: Ticket,
        vectors: Vectors,
        octets: Octets | None = None,
        metrics: dict[str, float | None] | None = None,
        estimates: Estimates | None = None,
    ) -> Reply:
        header = ReplyHeader(
            run=ticket.header.run,
            round=ticket.header.round,
            site=self.name,
            layout=self.layout.digest,
            rows=len(self.dataset.train),
            metrics=metrics or {},
            estimates=estimates or {},
        )
        return Reply(header, vectors, octets or {})


def own_constants(rows: Rows, at: Sequence[int]) -> tuple[tuple[float, float], ...]:
    """Mean and standard deviation of the number columns ``at`` over these rows; a constant column scales by 1."""
    x = rows.x[:, list(at)].double()
    mean, sd = x.mean(dim=0), x.std(dim=0)
    return tuple((float(m), float(s) if s > 0 else 1.0) for m, s in zip(mean, sd, strict=True))


def _plain_values(metrics: dict[str, Estimate]) -> dict[str, tuple[float | None, float | None, float | None]]:
    return {name: (estimate.value, estimate.low, estimate.high) for name, estimate in metrics.items()}
