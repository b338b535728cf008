"""The hospital's half of the secure sum: its keys of each run, what it agreed to, and what it has answered.

A run's keys are in one file that the owner alone can read. It is written before anything leaves: a round is
agreed to once, under one transcript, and its masks are opened once, for one question. With the answer the keys
of the round are gone: what is in the file leads to later rounds, never back.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from cloister_shared import durable, masking, tally
from cloister_shared.envelope import Identity, Roster
from cloister_shared.errors import KeyBroken, ReplyRejected, TicketRefused
from cloister_shared.masking import Masks, encoding_of, round_seed, weight
from cloister_shared.plan import StudyPlan
from cloister_shared.wire import (
    Advert,
    Octets,
    Reply,
    ReplyHeader,
    Statement,
    Ticket,
    TicketHeader,
    UnmaskHeader,
    Vector,
    digest_of,
    read_signed,
    sign,
)

_COORDINATOR = "Correct the coordinator."


class _Keys(BaseModel):
    """What is on disk of one run. ``chains`` lead to the masks of round ``round`` and later ones."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)

    plan: str
    public: str
    private: str = Field(default="", repr=False)
    """X25519, until the chains are made from it."""
    chains: dict[str, str] = Field(default_factory=dict[str, str], repr=False)
    cohort: str = ""
    round: int = 0
    transcript: str = ""
    """Of round ``round``, once it is agreed to."""
    question: str = ""
    """The last question answered: whose masks to open. ``answer`` is what was given away, so no secret."""
    answer: str = Field(default="", repr=False)


@dataclass(frozen=True)
class SecureSum:
    """One hospital in the secure sums of one study."""

    plan: StudyPlan
    plan_digest: str
    site: str
    identity: Identity
    roster: Roster
    """Every hospital that this one has pinned."""
    min_cohort: int
    folder: Path

    # --- set-up, once a run --------------------------------------------------------------------------------
    def advert(self, ticket: TicketHeader) -> str:
        """This hospital's signed key for a run; the same however often it is asked for."""
        with self._locked():
            if self._path(ticket.run).exists():
                keys = self._read(ticket.run)
            else:
                private, public = masking.new_key()
                keys = _Keys(plan=self.plan_digest, public=public, private=private.hex())
                self._write(ticket.run, keys)
        terms = {"run": ticket.run, "plan": self.plan_digest, "site": self.site, "key": keys.public}
        return sign(self.identity, Advert(**terms, min_cohort=self.min_cohort))

    # --- a round -------------------------------------------------------------------------------------------
    def admit(self, ticket: Ticket) -> None:
        """Agree to a round's terms, durably, before any work is done for it.

        Raises:
            TicketRefused: the cohort is not one that this hospital accepts, or the round is over, or was agreed
                to under other terms.
        """
        with self._locked():
            self._admit(ticket)

    def _admit(self, ticket: Ticket) -> None:
        header, keys = ticket.header, self._read(ticket.header.run)
        digest = hashlib.sha256(json.dumps(header.cohort).encode()).hexdigest()
        if not keys.cohort:
            self._begin(header, keys)
            keys.cohort = digest
        elif keys.cohort != digest:
            raise TicketRefused("The cohort changed within the run.", mend="Start a new run.")
        if header.round < keys.round:
            raise TicketRefused(f"Round {header.round} is over here.", mend="Go on with the next round.")
        if header.round == keys.round and keys.transcript:
            if not hmac.compare_digest(keys.transcript, ticket.transcript):
                raise TicketRefused(
                    f"{self.site} agreed to round {header.round} under other terms.", mend="Send the same ticket again."
                )
            return
        _advance(keys, header.round)
        keys.transcript = ticket.transcript
        self._write(header.run, keys)

    def mask(self, ticket: Ticket, reply: Reply) -> Reply:
        """What may leave of a reply: ring elements that look random, sealed shares, and a signed statement.

        The vectors of ``reply`` are used up.

        Raises:
            TicketRefused: the round was not agreed to under this ticket.
        """
        header, keys = ticket.header, self._read(ticket.header.run)
        if keys.transcript != ticket.transcript:
            raise TicketRefused(f"{self.site} did not agree to this ticket.", mend=_COORDINATOR)
        transcript = keys.transcript
        chains = {site: bytes.fromhex(chain) for site, chain in keys.chains.items()}
        seeds = {site: round_seed(chain, transcript, "mask") for site, chain in chains.items()}
        masks = Masks((seed, 1 if site == self.site else masking.sign(self.site, site)) for site, seed in seeds.items())

        octets, clipped = Octets(), 0.0
        encoding, weights = encoding_of(self.plan), {"update": weight(self.plan, len(chains), reply.header.rows)}
        for name in masking.VECTORS:
            if name in reply.octets:  # encoded already, with this hospital's part of the noise
                octets[name] = encoding.pack(encoding.mask(reply.octets[name].view(np.uint32), masks))
            elif name in reply.vectors:
                vector, changed = self._within(name, reply.vectors[name])
                ring, over = encoding.encode(vector, weights.get(name, 1 / len(chains)), masks)
                octets[name], clipped = encoding.pack(ring), max(clipped, changed, over / vector.size)
        said = {"clipped": clipped} | self._numbers(reply)
        numbers = masking.to_limbs(tally.to_vector(self.plan, header.round, said))
        masks.add_to(numbers)
        octets["tally"] = numbers.astype("<u4").view(np.uint8)

        octets["shares"] = np.frombuffer(self._shares(chains, seeds, transcript), np.uint8)
        signed = sign(self.identity, Statement(transcript=transcript, site=self.site, masked=digest_of(octets)))
        plain = ReplyHeader(
            run=header.run, round=header.round, site=self.site, layout=reply.header.layout, signed=signed
        )
        return Reply(plain, {}, octets)

    def _shares(self, chains: dict[str, bytes], seeds: dict[str, bytes], transcript: str) -> bytes:
        """Of each seed a sealed share for every hospital, a row a hospital; then the seeds' fingerprints."""
        sites = sorted(seeds)
        secrets = [seeds[site] for site in sites]
        polynomials = round_seed(chains[self.site], transcript, "polynomials")
        rows = masking.deal(secrets, masking.threshold(len(sites)), len(sites), polynomials)
        sealed = [
            masking.seal(share, key)
            for holder, row in zip(sites, rows, strict=True)
            for share, key in zip(
                row,
                masking.seal_keys(chains[holder], transcript, self.site, holder, len(sites)),
                strict=True,
            )
        ]
        prints = [masking.fingerprint(secret, transcript, self.site, slot) for slot, secret in enumerate(secrets)]
        return b"".join(sealed + prints)

    def unmask(self, request: UnmaskHeader) -> Reply:
        """Give away the keys of this hospital's shares: of the self masks of those in the sum, and of the masks
        that those share with the hospitals that dropped out. Then forget the round.

        Raises:
            TicketRefused: another question was answered for this round, or this one may not be answered at all.
        """
        with self._locked():
            keys = self._read(request.run)
            question = hashlib.sha256(
                json.dumps([request.round, request.transcript, request.active, request.dropped]).encode()
            ).hexdigest()
            if not hmac.compare_digest(question, keys.question):
                self._may_answer(request, keys)
                answer = self._answer(request, keys)
                _advance(keys, request.round + 1)
                keys.question, keys.answer = question, answer.hex()
                self._write(request.run, keys)  # before a key leaves: a restart cannot be used to ask twice
        given = np.frombuffer(bytes.fromhex(keys.answer), np.uint8)
        return Reply(ReplyHeader(run=request.run, round=request.round, site=self.site), {}, {"keys": given})

    # --- what each step checks --------------------------------------------------------------------------------
    def _begin(self, header: TicketHeader, keys: _Keys) -> None:
        """Hold the cohort against the roster and the hospital's policy, and make a chain with each member."""
        adverts = [self._advert(envelope, header.run) for envelope in header.cohort]
        sites = [advert.site for advert in adverts]
        if sites != sorted(set(sites)):
            raise TicketRefused("The cohort names a hospital twice, or is not sorted.", mend=_COORDINATOR)
        if len({advert.key for advert in adverts}) < len(adverts):
            raise TicketRefused("Two hospitals of the cohort show the same key.", mend=_COORDINATOR)
        least = max(self.min_cohort, self.plan.cohort.min_sites)
        if not least <= len(sites) <= self.plan.cohort.max_sites:
            raise TicketRefused(
                f"The cohort has {len(sites)} hospitals; {self.site} takes part with {least} to"
                f" {self.plan.cohort.max_sites}.",
                mend="Wait for more hospitals, or ask this one to change its policy.",
            )
        if keys.public not in [advert.key for advert in adverts if advert.site == self.site]:
            raise TicketRefused(f"The cohort lacks {self.site}, or shows another key for it.", mend=_COORDINATOR)
        self._refuse_another_run(header.run)
        private = bytes.fromhex(keys.private)
        for advert in adverts:
            if advert.site == self.site:
                chain = masking.draw()
            else:
                both = sorted([keys.public, advert.key])
                try:
                    chain = masking.first_chain(private, advert.key, [header.run, self.plan_digest, *both])
                except ReplyRejected as odd:
                    raise TicketRefused(f"{advert.site}: {odd}.", mend="That hospital needs a new key.") from None
            keys.chains[advert.site] = chain.hex()
        keys.private = ""

    def _refuse_another_run(self, run: str) -> None:
        """Without noise, the same plan gives the same updates again, and the difference of two sums over other
        hospitals is one hospital's. With it, the ledger counts all runs of a plan.
        """
        for path in () if self.plan.private else self.folder.glob("*.keys.json"):
            other = self._load(path)
            if path != self._path(run) and other.plan == self.plan_digest and other.cohort:
                raise TicketRefused(
                    f"{self.site} took part in another run of this plan; two sums tell the difference.",
                    mend="Resume that run; or give the plan a new version and have it approved.",
                )

    def _advert(self, envelope: str, run: str) -> Advert:
        """A cohort member's key, if a pinned hospital signed it for this run of this plan."""
        said = read_signed(envelope, Advert, self.roster)
        if (said.run, said.plan) != (run, self.plan_digest):
            raise TicketRefused(f"The key of {said.site} is for another run.", mend=_COORDINATOR)
        return said

    def _may_answer(self, request: UnmaskHeader, keys: _Keys) -> None:
        """Refuse a question that would open more than one sum of enough hospitals that agree on the terms."""
        active, dropped, sites = request.active, request.dropped, sorted(keys.chains)
        if request.round != keys.round or not keys.transcript:
            raise TicketRefused(
                f"{self.site} has no open round {request.round}: it answers once a round.", mend=_COORDINATOR
            )
        if not hmac.compare_digest(request.transcript, keys.transcript):
            raise TicketRefused(f"{self.site} agreed to round {request.round} under other terms.", mend=_COORDINATOR)
        if set(active) & set(dropped):
            raise TicketRefused("A hospital is both in the sum and dropped out.", mend=_COORDINATOR)
        if sorted([*active, *dropped]) != sites or list(active) != sorted(active) or list(dropped) != sorted(dropped):
            raise TicketRefused("Active and dropped hospitals are not the round's cohort.", mend=_COORDINATOR)
        if self.site not in active:
            raise TicketRefused(f"{self.site} is not in the sum it is asked to open.", mend=_COORDINATOR)
        least = max(masking.threshold(len(sites)), self.min_cohort, self.plan.cohort.min_sites)
        if len(active) < least:
            raise TicketRefused(
                f"The sum is over {len(active)} hospitals; {self.site} opens one over {least} or more.",
                mend="Wait for more hospitals to answer.",
            )
        if len(request.statements) != len(active):
            raise TicketRefused("A hospital in the sum has made no statement.", mend=_COORDINATOR)
        for site, envelope in zip(active, request.statements, strict=True):
            said = read_signed(envelope, Statement, self.roster)
            if said.site != site or not hmac.compare_digest(said.transcript, keys.transcript):
                raise TicketRefused(
                    f"{site} agreed to other terms: another cohort, model or plan was shown to it.", mend=_COORDINATOR
                )

    def _answer(self, request: UnmaskHeader, keys: _Keys) -> bytes:
        sites = sorted(keys.chains)
        given: list[bytes] = []
        for dealer in request.active:
            chain = bytes.fromhex(keys.chains[dealer])
            own = masking.seal_keys(chain, keys.transcript, dealer, self.site, len(sites))
            given += [own[sites.index(slot)] for slot in (dealer, *request.dropped)]
        return b"".join(given)

    def _within(self, name: str, vector: Vector) -> tuple[Vector, float]:
        """A vector to write into that the plan lets leave, and the share of it that had to be changed for that.

        Changed and not refused: what a model does to one hospital's rows must not show in whether it answers.
        """
        vector = vector if vector.flags.writeable else vector.copy()
        size, most = masking.norm(vector), self.plan.aggregation.max_update_norm
        if not np.isfinite(size):
            broken = ~np.isfinite(vector)
            vector[broken] = 0.0
            return self._within(name, vector)[0], float(broken.mean())
        if name == "update" and size > most:
            vector *= np.float32(most / size)
            return vector, 1.0
        return vector, 0.0

    def _numbers(self, reply: Reply) -> tally.Numbers:
        """Metrics or statistics, and rows, by their names in the tally."""
        header = reply.header
        found: tally.Numbers = {"rows": float(header.rows), **header.metrics}
        for model, metrics in header.estimates.items():
            found |= {f"{model} {name}": value for name, (value, _, _) in metrics.items()}
        return found

    # --- the file --------------------------------------------------------------------------------------------
    def _locked(self) -> AbstractContextManager[None]:
        """One request at a time, or two could both find a round unanswered, or a plan without a run."""
        return durable.locked(self.folder / "keys")

    def _path(self, run: str) -> Path:
        return self.folder / f"{run}.keys.json"

    def _read(self, run: str) -> _Keys:
        path = self._path(run)
        if not path.exists():
            raise TicketRefused(f"{self.site} has given no key for this run.", mend="Ask for its key first.")
        keys = self._load(path)
        if keys.plan != self.plan_digest:
            raise TicketRefused("The run is of another plan.", mend="Start a new run.")
        return keys

    def _load(self, path: Path) -> _Keys:
        try:
            return _Keys.model_validate_json(path.read_text(encoding="utf-8"))
        except ValueError:
            raise KeyBroken(f"{path} is damaged.", mend="Move it away and start a new run.") from None

    def _write(self, run: str, keys: _Keys) -> None:
        durable.save_secret(self._path(run), keys.model_dump_json())


def _advance(keys: _Keys, number: int) -> None:
    """Forget the rounds before ``number``."""
    for _ in range(number - keys.round):
        keys.chains = {site: masking.next_chain(bytes.fromhex(chain)).hex() for site, chain in keys.chains.items()}
    if number > keys.round:
        keys.round, keys.transcript = number, ""
