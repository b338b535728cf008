"""A hostile hospital, which tampers with its own replies, and the real coordinator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from cloister_server.app import open_study
from cloister_server.total import Mean
from cloister_shared import masking
from cloister_shared.wire import Advert, Octets, Reply, Statement, digest_of, read_signed, sign
from cloister_simulations.attacks.attack import attack
from cloister_simulations.attacks.consortium import (
    COORDINATOR,
    CULPRIT,
    HOSPITALS,
    Consortium,
    Refused,
)


def altered(consortium: Consortium, change: Callable[[Octets], object]) -> Mean:
    """A round in which the culprit changes its masked reply, and signs it."""

    def tamper(kind: str, reply: Reply) -> Reply:
        if "shares" not in reply.octets:
            return reply
        octets = {name: part.copy() for name, part in reply.octets.items()}
        change(octets)
        said = Statement(transcript=consortium.asked().transcript, site=CULPRIT, masked=digest_of(octets))
        signed = sign(consortium.identity(CULPRIT), said)
        return Reply(reply.header.model_copy(update={"signed": signed}), {}, octets)

    consortium.tamper = tamper
    return consortium.round()


def _left_out(mean: Mean) -> str:
    """What the coordinator said of the culprit, if the sum is right without it."""
    if reason := mean.rejected.get(CULPRIT):
        raise Refused(COORDINATOR, f"{CULPRIT}: {reason}")
    return f"the coordinator added up what {CULPRIT} sent"


@attack("truncated update", COORDINATOR, "holds 320 bytes, not 324")
def truncated(consortium: Consortium) -> str:
    """A masked update that is one parameter short."""
    return _left_out(altered(consortium, lambda octets: octets.update(update=octets["update"][:-4])))


@attack("reordered blocks", COORDINATOR, "masked otherwise")
def reordered(consortium: Consortium) -> str:
    """Two blocks change places: each is well formed, and no mask comes off."""
    altered(consortium, lambda octets: octets.update(update=np.roll(octets["update"], octets["update"].size // 8 * 4)))
    return "the coordinator took noise for a mean"


@attack("counts twice", COORDINATOR, "does not count the hospitals")
def counts_twice(consortium: Consortium) -> str:
    """A hospital counts for two inside the sum, to weigh its metrics twice."""

    def twice(octets: Octets) -> None:
        limbs = octets["tally"].view("<u4")[:3]
        limbs += masking.to_limbs(np.array([2.0])) - masking.to_limbs(np.array([1.0]))

    altered(consortium, twice)
    return f"the sum counts {CULPRIT} twice"


@attack("garbage shares", COORDINATOR, f"keys open the shares that {CULPRIT} dealt")
def garbage_shares(consortium: Consortium) -> str:
    """A hospital deals noise in the place of shares."""
    generator = np.random.default_rng(0)
    altered(consortium, lambda o: o.update(shares=generator.integers(0, 256, o["shares"].size, np.uint8)))
    return f"the coordinator opened a sum with {CULPRIT}'s garbage"


@attack("wrong share", COORDINATOR, "does not open the share")
def wrong_share(consortium: Consortium) -> str:
    """A hospital gives keys that open nothing, to spoil the sum."""
    consortium.tamper = lambda kind, reply: (
        replace(reply, octets={"keys": np.zeros_like(reply.octets["keys"])}) if "keys" in reply.octets else reply
    )
    mean = consortium.round()
    truth = np.mean([consortium.update(site) for site in HOSPITALS], axis=0)
    assert np.abs(mean.vectors["update"] - truth).max() < 1e-5, "the sum must be right without those keys"
    return _left_out(mean)


@attack("vast minimum", COORDINATOR, "is left out")
def vast_minimum(consortium: Consortium) -> str:
    """A hospital's minimum is a million: is no sum ever opened?"""

    def tamper(kind: str, reply: Reply) -> Reply:
        if not kind.endswith("advertise"):
            return reply
        own = read_signed(reply.header.signed, Advert, consortium.study.roster)
        signed = sign(consortium.identity(CULPRIT), own.model_copy(update={"min_cohort": 10**6}))
        return replace(reply, header=reply.header.model_copy(update={"signed": signed}))

    consortium.tamper = tamper
    study = consortium.study
    study.store.save(replace(study.checkpoint(), cohort={}))
    consortium.study = open_study(consortium.plan, study.store, consortium.grid)
    consortium.round()
    if CULPRIT not in consortium.study.cohort:
        raise Refused(COORDINATOR, f"{CULPRIT} is left out: its minimum is above the cohort. The others go on.")
    return "the coordinator took the minimum and opened the sum in spite of it"
