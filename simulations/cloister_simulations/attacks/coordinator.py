"""A hostile coordinator before the sum: keys and cohorts, terms, and the same asked again."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import numpy as np
from pydantic import ConfigDict

from cloister_client.consent import MIN_COHORT
from cloister_client.site import Site
from cloister_shared import masking
from cloister_shared.envelope import Identity, new_identity, save_roster
from cloister_shared.plan_file import amend
from cloister_shared.wire import Advert, Reply, Ticket, TicketHeader, Vector, sign
from cloister_simulations.attacks.attack import attack
from cloister_simulations.attacks.consortium import (
    CULPRIT,
    HOSPITAL,
    HOSPITALS,
    MATHEMATICS,
    OTHERS,
    ROWS,
    VICTIM,
    Consortium,
    Loot,
    Refused,
    any_of,
)


# --- keys and cohorts --------------------------------------------------------------------------------------
@attack("key substitution", HOSPITAL, "not pinned")
def key_substitution(consortium: Consortium) -> str:
    """The victim's key is one of the coordinator's own."""
    return _swapped(consortium, new_identity(consortium.folder / "attacker.key"), VICTIM)


@attack("weak key", HOSPITAL, "no point of X25519")
def weak_key(consortium: Consortium) -> str:
    """A colluding hospital shows the point zero: all secrets with it are the same."""
    return _swapped(consortium, consortium.identity(CULPRIT), CULPRIT, "0" * 64)


@attack("same key twice", HOSPITAL, "the same key")
def same_key_twice(consortium: Consortium) -> str:
    """A colluding hospital shows another's key: one secret counts for two."""
    said = json.loads(base64.b64decode(json.loads(consortium.study.cohort["birch"])["payload"]))
    return _swapped(consortium, consortium.identity(CULPRIT), CULPRIT, said["key"])


def _swapped(consortium: Consortium, signer: Identity, site: str, key: str | None = None) -> str:
    keys = {**consortium.study.cohort, site: _advert(consortium, site, signer, key)}
    consortium.send("birch", consortium.asked(cohort=tuple(keys.values())))
    return f"birch made masks with the attacker's key in the place of {site}'s"


def _advert(consortium: Consortium, site: str, signer: Identity, key: str | None = None) -> str:
    header, key = consortium.asked().header, key or masking.new_key()[1]
    return sign(signer, Advert(run=header.run, plan=header.plan, site=site, key=key, min_cohort=MIN_COHORT))


@attack("sybils", HOSPITAL, "not pinned")
def sybils(consortium: Consortium) -> str:
    """A cohort of the victim and three hospitals that do not exist."""
    invented = {
        name: _advert(consortium, name, new_identity(consortium.folder / f"{name}.key"))
        for name in ("fir", "oak", "yew")
    }
    consortium.send(VICTIM, consortium.asked(cohort=(consortium.study.cohort[VICTIM], *invented.values())))
    return f"{VICTIM} took part with three hospitals that do not exist"


@attack("two names", HOSPITAL, "under two names")
def two_names(consortium: Consortium) -> str:
    """A hospital is pinned under a second name as well, its key in capitals."""
    own, path = consortium.identity(CULPRIT), consortium.folder / "sites" / VICTIM / "roster.json"
    save_roster(path, json.loads(path.read_text(encoding="utf-8")) | {"zelkova": own.public.upper()})
    consortium.sites[VICTIM] = consortium.opened(VICTIM)
    cohort = (*consortium.study.cohort.values(), _advert(consortium, "zelkova", own))
    consortium.send(VICTIM, consortium.asked(cohort=cohort))
    return f"{VICTIM} counted one hospital under two names"


@attack("cohort too small", HOSPITAL, "The cohort has 2 hospitals")
def small_cohort(consortium: Consortium) -> str:
    """A cohort of two, of which each learns the other's update."""
    cohort = consortium.study.cohort
    consortium.send("birch", consortium.asked(cohort=(cohort["birch"], cohort[VICTIM])))
    return "birch took part in a sum of two"


@attack("split view", HOSPITAL, "agreed to other terms")
def split_view(consortium: Consortium) -> str:
    """Half see a cohort with the victim, half one without: its masks stay open."""
    fewer = tuple(envelope for site, envelope in consortium.study.cohort.items() if site != VICTIM)
    loot, other = Loot(consortium, sites=HOSPITALS[:3]), Loot(consortium, consortium.asked(cohort=fewer), HOSPITALS[3:])
    loot.masked |= other.masked
    any_of([lambda site=site: loot.ask(site, HOSPITALS) for site in HOSPITALS[:3]])
    return loot.open()


@attack("two runs", HOSPITAL, "another run of this plan")
def two_runs(consortium: Consortium) -> str:
    """Without noise, one round in two runs; the second cohort lacks the victim."""
    return _difference(consortium, OTHERS)


@attack("two sums", HOSPITAL, "another run of this plan")
def two_sums(consortium: Consortium) -> str:
    """The same with the same cohort, the victim declared dropped in the second."""
    return _difference(consortium, HOSPITALS)


def _difference(consortium: Consortium, cohort: Sequence[str]) -> str:
    """The victim's update, as the difference of round 1 in two runs; it is not in the sum of the second."""
    everybody = consortium.mean(HOSPITALS, consortium.asked())
    again = consortium.asked(run="another", cohort=consortium.cohort("another", cohort))
    others = consortium.mean(OTHERS, again)
    return consortium.recovered(len(HOSPITALS) * everybody - len(OTHERS) * others)


# --- terms -------------------------------------------------------------------------------------------------
class _Extended(TicketHeader):
    model_config = ConfigDict(extra="allow")


def _say_also(consortium: Consortium, **terms: float) -> None:
    asked = consortium.asked(site=VICTIM)
    header = _Extended.model_validate({**asked.header.model_dump(), **terms})
    consortium.say(VICTIM, "train", header, asked.vectors)


@attack("tampered parameters", HOSPITAL, "extra inputs")
def other_parameters(consortium: Consortium) -> str:
    """Bound, scale and threshold of the coordinator's own, in the ticket."""
    terms = {"bound": 1e9, "fraction_bits": 0, "threshold": 1}
    any_of([lambda name=name, value=value: _say_also(consortium, **{name: value}) for name, value in terms.items()])
    return f"{VICTIM} took a parameter from the ticket"


@attack("rows by refusals", HOSPITAL, "total_rows: extra inputs")
def rows_by_refusals(consortium: Consortium) -> str:
    """A search with false totals of rows in the ticket: which are refused?"""
    weighted = Consortium(consortium.folder / "weighted", aggregation={"weights": "rows"}, cohort={"max_rows": 50_000})
    answers = set[str]()
    for total in (1, ROWS[VICTIM] - 1, ROWS[VICTIM], 10**6):
        try:
            _say_also(weighted, total_rows=total)
            answers.add("taken")
        except Refused as refusal:
            answers.add(refusal.reason)
    if len(answers) == 1 and "taken" not in answers:
        raise Refused(HOSPITAL, answers.pop())  # the same to each: nothing to search by
    return f"what {VICTIM} answers depends on the total, so a search finds its row count"


@attack("rows by rounding", HOSPITAL, "so far above min_patients")
def rows_by_rounding(consortium: Consortium) -> str:
    """A plan of vast max_rows: small hospitals' updates round to nothing."""
    vast = 1_200_000_000  # so no hospital of 16 rows moves a parameter by half a step
    weighted = Consortium(
        consortium.folder / "weighted", aggregation={"weights": "rows"}, cohort={"max_rows": vast, "min_patients": 4}
    )
    asked = weighted.asked()
    mean = weighted.mean(HOSPITALS, asked)
    steps = 2.0**weighted.plan.fraction_bits / (len(HOSPITALS) * vast)
    alone = np.rint(weighted.update(VICTIM, asked) * ROWS[VICTIM] * steps)
    if not np.array_equal(np.rint(mean * sum(ROWS.values()) * steps), alone):
        raise Refused(MATHEMATICS, "The sum holds more than one hospital's update.")
    return f"the sum was {VICTIM}'s update alone: {np.count_nonzero(alone)} parameters of it"


@attack("tampered plan", HOSPITAL, "approved")
def amended_plan(consortium: Consortium) -> str:
    """A plan with another bound, behind the hospitals' backs."""
    other = amend(consortium.plan, aggregation={"bound": 1000.0})
    consortium.send(VICTIM, consortium.asked(plan=other.digest))
    return f"{VICTIM} worked by a plan that it had not approved"


@attack("tampered model", HOSPITAL, "agreed to other terms")
def model_of_its_own(consortium: Consortium) -> str:
    """The victim alone gets a model whose update stands out of the sum."""
    honest = consortium.asked()
    loot = Loot(consortium, sites=OTHERS)
    special = Ticket(honest.header, {"model": honest.vectors["model"] * np.float32(50)})
    loot.masked |= Loot(consortium, special, [VICTIM]).masked
    any_of([lambda site=site: loot.ask(site, HOSPITALS) for site in OTHERS])
    return f"the hospitals opened a sum in which {VICTIM} had another model"


@attack("path in a name", HOSPITAL, "should match pattern")
def outside_name(consortium: Consortium) -> str:
    """A run is named so that its keys land over another file."""
    header = TicketHeader.model_construct(**{**dict(consortium.asked(0).header), "run": "../birch/identity"})
    consortium.send(VICTIM, Ticket(header), "query.advertise")
    return f"{VICTIM} wrote where the coordinator said"


# --- models made to tell ------------------------------------------------------------------------------------
@attack("value by refusals", HOSPITAL, "answers alike")
def value_by_refusals(consortium: Consortium) -> str:
    """Models that overflow on a training row with a > x: does the hospital still answer?"""

    def model(empty: Vector, x: float) -> None:
        empty[0], empty[48] = 1e38, -1e38 * x  # the first unit is 1e38 (a - x), or 0; its step overflows

    return _tells(consortium, [consortium.asked(1), consortium.asked(2)], model)


@attack("value by faults", HOSPITAL, "answers alike")
def value_by_faults(consortium: Consortium) -> str:
    """Final models that are no number on a held-out row with a > x: do their metrics fail?"""
    terms = {"mechanism": "site", "unit": "record", "epsilon": 3.0, "delta": 1e-5, "clip_norm": 1.0}
    private = Consortium(consortium.folder / "private", privacy=terms)  # which may be run again
    final = private.plan.rounds + 1

    def model(empty: Vector, x: float) -> None:
        empty[[0, 3]], empty[[48, 49]], empty[[64, 65]] = 1e38, -1e38 * x, (3e38, -3e38)  # inf - inf

    return _tells(private, [private.asked(final, run=run, cohort=private.cohort(run)) for run in ("a", "b")], model)


def _tells(consortium: Consortium, tickets: list[Ticket], make: Callable[[Vector, float], None]) -> str:
    """Whether the victim answers a model that overflows on all its rows as it answers one that does on none."""
    answers = set[str]()
    for asked, x in zip(tickets, (-3.0, 3.0), strict=True):
        model = np.zeros_like(asked.vectors["model"])
        make(model, x)
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # at the hospital
                consortium.send(VICTIM, Ticket(asked.header, {"model": model}))
            answers.add("")
        except (Refused, RuntimeError) as error:
            answers.add(str(error))
    if answers == {""}:
        raise Refused(HOSPITAL, f"{VICTIM} answers alike, whatever the model.")
    return f"what {VICTIM} answers depends on its rows, one bit a round"


# --- the same again ----------------------------------------------------------------------------------------
@attack("replay of a round", HOSPITAL, "is over here")
def old_ticket(consortium: Consortium) -> str:
    """A finished round's ticket, for another update under the same masks."""
    asked = consortium.asked()
    consortium.send(VICTIM, asked)
    consortium.send(VICTIM, consortium.asked(2))
    consortium.send(VICTIM, asked)
    return f"{VICTIM} did a finished round again"


@attack("ticket, at once", HOSPITAL, "the same to both")
def ticket_at_once(consortium: Consortium) -> str:
    """One ticket to two processes: does one mask hide two draws of noise?"""
    asked, meet = consortium.asked(site=VICTIM), threading.Barrier(2)

    def process() -> Site:
        site = consortium.opened(VICTIM)
        find, work = site.answers.find, site._train

        def slow_find(run: str, ticket: str) -> Reply | None:
            found = find(run, ticket)
            with suppress(threading.BrokenBarrierError):
                meet.wait(3)
            return found

        site.answers.find = slow_find
        site._train = lambda ticket: _noisy(work(ticket))
        site.check(asked, "train")
        return site

    sites = process(), process()
    with ThreadPoolExecutor(2) as processes:
        one, other = processes.map(lambda site: site.train(asked), sites)
    if one.octets["update"].tobytes() == other.octets["update"].tobytes():
        raise Refused(HOSPITAL, f"{VICTIM} said the same to both, byte for byte.")
    return "one mask hid two draws of noise, whose difference is bare"


def _noisy(reply: Reply) -> Reply:
    """What DP does to an update, without the time that it takes to load."""
    update = reply.vectors["update"]
    return replace(reply, vectors={"update": update + np.random.default_rng().normal(size=update.size).astype("f4")})


@attack("guessed masks", MATHEMATICS, "all bits vary")
def guessed_masks(consortium: Consortium) -> str:
    """All seeds of a mask are tried, if they are few."""
    chain, draws = masking.draw(), 5_000
    seeds = [int.from_bytes(masking.round_seed(chain, str(number), "mask")) for number in range(draws)]
    varying = 0
    for seed in seeds:
        varying |= seed ^ seeds[0]
    if varying.bit_count() < 256 or len(set(seeds)) < draws:
        return f"masks have 2^{varying.bit_count()} seeds"
    raise Refused(MATHEMATICS, f"2^256 seeds: all bits vary, and none of {draws:,} came a second time.")
