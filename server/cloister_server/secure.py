"""The coordinator's half of the secure sum: what it adds up without seeing it, and how the sum comes to light."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister_server.cores import each, parts
from cloister_server.total import Glimpse, Mean, decoded, require_quorum
from cloister_shared import masking, tally
from cloister_shared.envelope import Roster
from cloister_shared.errors import EnvelopeRefused, QuorumLost, ReplyRejected
from cloister_shared.layout import Layout
from cloister_shared.masking import Encoding, Masks, Ring, encoding_of, norm
from cloister_shared.plan import Scaffold, StudyPlan
from cloister_shared.tally import Numbers
from cloister_shared.wire import Advert, Reply, Statement, Ticket, UnmaskHeader, digest_of, read_signed

_LOST = "Take the hospital off the roster and start a new run."


class MaskedTotal:
    """One round's sum modulo 2^32, still masked, and the sealed shares that can open it."""

    def __init__(self, plan: StudyPlan, layout: Layout, roster: Roster, asked: Ticket) -> None:
        """``asked`` are the terms of the round; its cohort is in them.

        Raises:
            EnvelopeRefused: the cohort holds a key that no pinned hospital signed.
        """
        self.plan, self.layout, self.roster, self.terms = plan, layout, roster, asked.header
        adverts = [read_signed(envelope, Advert, roster) for envelope in asked.header.cohort]
        self.sites = tuple(advert.site for advert in adverts)
        least = max(advert.min_cohort for advert in adverts)
        self.need = max(masking.threshold(len(self.sites)), plan.cohort.min_sites, least)
        """Hospitals without which the others do not open the sum."""
        self.number, self.transcript = asked.header.round, asked.transcript
        self.rejected: dict[str, str] = {}
        self._vectors: dict[str, Ring] = {}
        self._statements: dict[str, str] = {}
        self._shares: dict[str, bytes] = {}
        self._keys: dict[str, NDArray[np.uint8]] = {}
        self._glimpse: tuple[str, list[int]] | None = None

    @property
    def active(self) -> tuple[str, ...]:
        """Who is in the sum."""
        return tuple(site for site in self.sites if site in self._statements)

    @property
    def dropped(self) -> tuple[str, ...]:
        """Who of the cohort is not."""
        return tuple(site for site in self.sites if site not in self._statements)

    # --- collecting ------------------------------------------------------------------------------------------
    def add(self, site: str, reply: Reply) -> None:
        """Check a masked reply and add it.

        Raises:
            ReplyRejected: says in what it is odd; nothing of it was added.
        """
        header, octets, sizes = reply.header, reply.octets, self._sizes()
        if (header.site, header.round) != (site, self.number):
            raise ReplyRejected(f"the reply is {header.site}'s for round {header.round}")
        if header.layout != self.layout.digest or reply.vectors or set(octets) != set(sizes):
            raise ReplyRejected(f"the reply holds {', '.join(sorted(octets)) or 'nothing'} of another model")
        for name, size in sizes.items():
            if octets[name].size != size:
                raise ReplyRejected(f"{name} holds {octets[name].size} bytes, not {size}")
        if header.rows or header.metrics or header.estimates:
            raise ReplyRejected("the reply says beside the sum what belongs inside it")
        try:
            said = read_signed(header.signed, Statement, self.roster)
        except EnvelopeRefused as refusal:
            raise ReplyRejected(refusal.said) from None
        if (said.site, said.transcript) != (site, self.transcript):
            raise ReplyRejected("the reply was made under other terms")
        if said.masked != digest_of(octets, reply.chunks):
            raise ReplyRejected("the reply is not the one that was signed: it changed on the way")
        encoding = encoding_of(self.plan)
        if "update" in octets and self._glimpse is None:
            first = np.zeros(min(_GLIMPSE, self.layout.size), np.uint32)
            encoding.add_packed(first, octets["update"][: first.size * encoding.bits // 8])
            self._glimpse = site, encoding.signed(first).tolist()
        for name in (*masking.VECTORS, "tally"):
            if name in octets:
                packing = _TALLY if name == "tally" else encoding
                size = octets[name].size // (packing.bits // 8)
                _put_in(packing, self._vectors.setdefault(name, np.zeros(size, np.uint32)), octets[name])
        self._statements[site], self._shares[site] = header.signed, octets["shares"].tobytes()

    def _sizes(self) -> dict[str, int]:
        """Bytes of each part of a reply."""
        plan, sites = self.plan, len(self.sites)
        sizes = {
            "tally": masking.to_limbs(np.zeros(len(tally.names(plan, self.number)))).nbytes,
            "shares": sites * (sites * masking.SEALED + 32),
        }
        if tally.kind_of(plan, self.number) == "train":
            sizes["update"] = self.layout.size * plan.aggregation.bits // 8
            if isinstance(plan.strategy, Scaffold):
                sizes["control"] = sizes["update"]
        return sizes

    def close(self, rejected: dict[str, str]) -> None:
        """Take nobody else in, and refuse to ask for shares of a sum that the hospitals would not open.

        Raises:
            QuorumLost: names who is missing and why.
        """
        absent = dict.fromkeys(self.dropped, "not there")
        self.rejected = absent | rejected
        require_quorum(f"Round {self.number}", len(self.active), self.need, self.rejected)

    def collected(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """What ``restore`` reads: a header and arrays."""
        header = {"transcript": self.transcript, "statements": self._statements, "rejected": self.rejected}
        header["glimpse"] = self._glimpse
        shares = np.frombuffer(b"".join(self._shares.values()), np.uint8)
        return header, {**self._vectors, "shares": shares}

    def restore(self, saved: tuple[dict[str, Any], dict[str, NDArray[Any]]] | None) -> bool:
        """Take up what was collected before a crash, if there is anything."""
        if saved is None:
            return False
        header, self._vectors = saved
        self._statements, self.rejected = header["statements"], header["rejected"]
        self._glimpse = header["glimpse"]
        shares = np.split(self._vectors.pop("shares"), len(self._statements))
        self._shares = {site: share.tobytes() for site, share in zip(self._statements, shares, strict=True)}
        return True

    # --- opening ---------------------------------------------------------------------------------------------
    def question(self, site: str) -> UnmaskHeader:
        """Who is in the sum and who is not, and what those in it signed."""
        return UnmaskHeader(
            run=self.terms.run,
            round=self.number,
            site=site,
            transcript=self.transcript,
            active=self.active,
            dropped=self.dropped,
            statements=tuple(self._statements[active] for active in self.active),
        )

    def open(self, site: str, reply: Reply) -> None:
        """Take the keys that a hospital gives away.

        Raises:
            ReplyRejected: they are not so many as were asked for.
        """
        keys = reply.octets.get("keys")
        size = len(self.active) * (1 + len(self.dropped)) * 32
        if (reply.header.site, reply.header.round) != (site, self.number) or keys is None or keys.size != size:
            raise ReplyRejected("the reply does not hold the keys that were asked for")
        self._keys[site] = keys

    def mean(self, silent: dict[str, str]) -> Mean:
        """Put the seeds together, take the masks off the sum, and decode it. Gives the sum away.

        Raises:
            QuorumLost: too few gave keys, or a hospital masked otherwise than it said; names it where it can.
        """
        what = f"Round {self.number} is collected, but its sum cannot be opened yet"
        require_quorum(what, len(self._keys), masking.threshold(len(self.sites)), silent)
        seeds = [
            (self._seed(dealer, slot), -1 if slot == dealer else -masking.sign(dealer, slot))
            for dealer in self.active
            for slot in (dealer, *self.dropped)
        ]
        at = 0
        for name in (*masking.VECTORS, "tally"):
            if name in self._vectors:
                _take_off(self._vectors[name], seeds, at)
                at += self._vectors[name].nbytes
        try:
            numbers = self._numbers()
            means = decoded(self.plan, self._vectors, len(self.sites), len(self.active), numbers.get("rows") or 0.0)
        except ReplyRejected as odd:
            raise QuorumLost(
                f"Round {self.number}: {odd}; a hospital masked otherwise than it said.", mend=_LOST
            ) from None
        if clipped := numbers.get("clipped"):
            numbers["clipped"] = clipped / len(self.active)
        size = norm(means["update"]) if "update" in means else 0.0
        glimpse = None
        if self._glimpse:
            glimpse = Glimpse(*self._glimpse, means["update"][: len(self._glimpse[1])].tolist())
        return Mean(self.active, self.rejected, means, numbers, size, glimpse=glimpse)

    def _numbers(self) -> Numbers:
        sums = masking.from_limbs(self._vectors.pop("tally"), len(self.active))
        found = tally.from_sums(self.plan, self.number, sums)
        if found.pop("sites") != len(self.active):
            raise ReplyRejected("the sum does not count the hospitals in it")
        return found

    def _seed(self, dealer: str, slot: str) -> bytes:
        """One seed from the first shares that open. A key that opens nothing is told under its holder's name."""
        need, column = masking.threshold(len(self.sites)), self.sites.index(slot)
        asked = (dealer, *self.dropped).index(slot) + self.active.index(dealer) * (1 + len(self.dropped))
        shares, wrong = dict[int, int](), list[str]()
        for holder, keys in self._keys.items():
            if len(shares) == need:
                break
            row = self.sites.index(holder)
            at = (row * len(self.sites) + column) * masking.SEALED
            try:
                key = keys[asked * 32 : asked * 32 + 32].tobytes()
                shares[row] = masking.unseal(self._shares[dealer][at : at + masking.SEALED], key)
            except ReplyRejected as odd:
                wrong.append(holder)
                self.rejected[holder] = f"in the sum; but of {dealer}'s shares {odd}"
        end = (column - len(self.sites)) * 32
        print_ = self._shares[dealer][end : end + 32 or None]
        if len(shares) < need:
            raise QuorumLost(
                f"Round {self.number}: {len(shares)} of {need} keys open the shares that {dealer} dealt; not those of"
                f" {', '.join(wrong)}. Either they gave wrong keys or {dealer} sealed garbage.",
                mend="Ask them; without whoever it is, start a new run.",
            )
        try:
            seed = masking.combine(shares)
        except ReplyRejected:
            seed = b""
        if not hmac.compare_digest(masking.fingerprint(seed, self.transcript, dealer, column), print_):
            raise QuorumLost(f"Round {self.number}: the shares that {dealer} dealt open no seed.", mend=_LOST)
        return seed


_TALLY = Encoding(32, 1.0, 0)
_GLIMPSE = 200


def _put_in(encoding: Encoding, total: Ring, packed: NDArray[np.uint8]) -> None:
    """Add a packed vector, in place: to the parts of a large sum side by side."""
    width = encoding.bits // 8

    def add(part: slice) -> None:
        encoding.add_packed(total[part], packed[part.start * width : part.stop * width])

    each(add, parts(total.size))


def _take_off(ring: Ring, seeds: Sequence[tuple[bytes, int]], start: int) -> None:
    """Add these masks, from octet ``start`` of each on, in place: to the parts of a large sum side by side."""

    def add(part: slice) -> None:
        Masks(seeds, start + 4 * part.start).add_to(ring[part])

    each(add, parts(ring.size))
