"""Hospitals and coordinator of the secure sum together: exact whoever drops out, and one answer a round."""

import json
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_client.secure import SecureSum
from cloister_server.secure import MaskedTotal
from cloister_server.store import Store
from cloister_server.total import Mean
from cloister_shared import durable, masking
from cloister_shared.envelope import new_identity
from cloister_shared.errors import CloisterError, KeyBroken, QuorumLost, TicketRefused
from cloister_shared.layout import Layout
from cloister_shared.masking import threshold
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend, read_plan
from cloister_shared.wire import Reply, ReplyHeader, Ticket, TicketHeader, UnmaskHeader

PLAN = read_plan("""
study: sums
title: Sums
task: {name: tabular}
table:
  features: [{name: age, kind: number, range: [0, 100]}]
  target: {name: died, positive: 1, negative: 0}
rounds: 1000
strategy: {name: scaffold}
training: {learning_rate: 0.1, batch_size: 8, local_steps: 1}
privacy: {mechanism: none}
""")
BY_ROWS = {"aggregation": {"weights": "rows"}, "cohort": {"min_patients": 20, "max_rows": 50_000, "max_sites": 20}}
DEAL = masking.deal
LAYOUT = Layout((("weight", 40), ("bias", 3)), ())


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    """These tests ask what is written, not that it survives a power cut."""
    monkeypatch.setattr(durable, "_flush", lambda path: None)


class Consortium:
    """``sites`` hospitals with their keys, and a coordinator that is honest unless told otherwise."""

    def __init__(self, folder: Path, sites: int, plan: StudyPlan = PLAN, min_cohort: int = 2) -> None:
        self.plan, self.folder, self.min_cohort = plan, folder, min_cohort
        self.names = [f"h{k:03}" for k in range(sites)]
        self.keys = {name: new_identity(folder / f"{name}.key") for name in self.names}
        self.roster = {name: key.public for name, key in self.keys.items()}
        self.hospitals = {name: self.open(name) for name in self.names}
        first = self.header(0, cohort=())
        self.cohort = tuple(self.hospitals[name].advert(first) for name in self.names)

    def open(self, name: str) -> SecureSum:
        """The hospital, as after a restart."""
        own = self.folder / name
        own.mkdir(exist_ok=True)
        return SecureSum(self.plan, self.plan.digest, name, self.keys[name], self.roster, self.min_cohort, own)

    def header(self, number: int, **changes: object) -> TicketHeader:
        terms = {"run": "run-1", "plan": self.plan.digest, "round": number, "site": ""}
        return TicketHeader(**{**terms, **({} if "cohort" in changes else {"cohort": self.cohort}), **changes})

    def ticket(self, number: int, **changes: object) -> Ticket:
        return Ticket(self.header(number, **changes), {"model": np.full(LAYOUT.size, number, np.float32)})

    def total(self, asked: Ticket) -> MaskedTotal:
        return MaskedTotal(self.plan, LAYOUT, self.roster, asked)

    def masked(self, name: str, asked: Ticket, rows: int = 30) -> Reply:
        """One hospital's masked reply to a ticket; its update depends on its name and the round alone."""
        hospital = self.hospitals[name]
        hospital.admit(asked)
        update, control = (self.update(name, asked.header.round, k) for k in (0, 1))
        header = ReplyHeader(
            run="run-1", round=asked.header.round, site=name, layout=LAYOUT.digest, rows=rows, metrics={"loss": 2.0}
        )
        return hospital.mask(asked, Reply(header, {"update": update, "control": control}))

    def update(self, name: str, number: int, k: int = 0) -> np.ndarray:
        generator = np.random.default_rng([self.names.index(name), number, k])
        return generator.normal(scale=0.3, size=LAYOUT.size).astype(np.float32)

    def round(self, number: int, dropped: Sequence[str] = (), silent: Sequence[str] = ()) -> Mean:
        """``dropped`` never send a masked update; ``silent`` do, and then give no keys."""
        asked = self.ticket(number)
        total = self.total(asked)
        for name in self.names:
            if name not in dropped:
                total.add(name, self.masked(name, asked))
        total.close({})
        for name in total.active:
            if name not in silent:
                total.open(name, self.hospitals[name].unmask(total.question(name)))
        return total.mean(dict.fromkeys(silent, "silent"))

    def expected(self, number: int, active: Sequence[str], k: int = 0) -> np.ndarray:
        """The mean as plain integer arithmetic has it."""
        encoding, n = masking.encoding_of(self.plan), len(self.names)
        scale = np.float32(2.0**encoding.fraction_bits / n)
        ints = sum(np.rint(self.update(name, number, k) * scale).astype(np.int64) for name in active)
        return (ints * (1.0 / (len(active) / n * 2.0**encoding.fraction_bits))).astype(np.float32)


@pytest.fixture
def five(tmp_path) -> Consortium:
    return Consortium(tmp_path, 5)


def patterns(sites: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every choice of those who never send and of those who send and then fall silent."""
    spare = sites - threshold(sites)
    for gone, quiet in product(range(spare + 1), repeat=2):
        for dropped in combinations(range(sites), gone):
            rest = [site for site in range(sites) if site not in dropped]
            if gone + quiet <= spare:
                yield from ((dropped, silent) for silent in combinations(rest, quiet))


@pytest.mark.parametrize("sites", [3, 4, 5, 6, *(pytest.param(sites, marks=pytest.mark.slow) for sites in (7, 8))])
def test_exact_under_every_drop_out_pattern(tmp_path, sites):
    all_of_them = Consortium(tmp_path, sites)
    for number, (dropped, silent) in enumerate(patterns(sites), start=1):
        gone, quiet = ([all_of_them.names[k] for k in ks] for ks in (dropped, silent))
        active = [name for name in all_of_them.names if name not in gone]
        mean = all_of_them.round(number, gone, quiet)
        assert mean.answered == tuple(active)
        for k, name in enumerate(("update", "control")):
            assert mean.vectors[name].tobytes() == all_of_them.expected(number, active, k).tobytes()
        assert mean.numbers["loss"] == 2.0


@given(data=st.data(), sites=st.integers(9, 50))
@settings(max_examples=4, deadline=None)
def test_exact_under_random_drop_outs(tmp_path_factory, data, sites):
    all_of_them = Consortium(tmp_path_factory.mktemp("random"), sites)
    spare = sites - threshold(sites)
    away = data.draw(st.lists(st.sampled_from(all_of_them.names), unique=True, max_size=spare))
    cut = data.draw(st.integers(0, len(away)))
    active = [name for name in all_of_them.names if name not in away[:cut]]
    mean = all_of_them.round(7, away[:cut], away[cut:])
    assert mean.vectors["update"].tobytes() == all_of_them.expected(7, active).tobytes()


def test_one_drop_out_too_many_opens_nothing(five):
    with pytest.raises(QuorumLost, match="Round 1: 3 of the 4 hospitals needed"):
        five.round(1, dropped=five.names[:2])
    with pytest.raises(QuorumLost, match="its sum cannot be opened yet: 3 of the 4"):
        five.round(2, silent=five.names[:2])


def test_a_masked_update_tells_nothing_of_the_update(five):
    """Two rounds with the same update have nothing in common, and neither looks like it."""
    seen = [five.masked("h000", five.ticket(number)).octets["update"].view("<i4") for number in (1, 2)]
    own = five.update("h000", 1)
    assert abs(np.corrcoef(seen[0], own)[0, 1]) < 0.6
    assert (seen[0] != seen[1]).all()


def test_weights_travel_inside(tmp_path):
    plan = amend(PLAN, strategy={"name": "fedavg"}, **BY_ROWS)
    some = Consortium(tmp_path, 3, plan)
    asked = some.ticket(1)
    total = some.total(asked)
    rows = {"h000": 20, "h001": 50_000, "h002": 50}
    for name, count in rows.items():
        some.hospitals[name].admit(asked)
        header = ReplyHeader(run="run-1", round=1, site=name, layout=LAYOUT.digest, rows=count)
        reply = some.hospitals[name].mask(asked, Reply(header, {"update": some.update(name, 1)}))
        assert (reply.header.rows, reply.header.metrics) == (0, {})
        total.add(name, reply)
    total.close({})
    for name in total.active:
        total.open(name, some.hospitals[name].unmask(total.question(name)))
    mean = total.mean({})
    exact = sum(count * some.update(name, 1).astype(float) for name, count in rows.items()) / 50_070
    assert np.linalg.norm(mean.vectors["update"] - exact) < 1e-6 * np.linalg.norm(exact)
    assert mean.numbers["rows"] == 50_070


def test_an_update_of_too_large_a_norm_is_made_smaller_and_told_in_the_sum(tmp_path):
    plan = amend(PLAN, aggregation={"max_update_norm": 0.5})
    some = Consortium(tmp_path, 3, plan)
    mean = some.round(1)
    exact = np.mean([0.5 * u / np.linalg.norm(u) for u in (some.update(name, 1) for name in some.names)], axis=0)
    assert mean.vectors["update"] == pytest.approx(exact, abs=1e-7)
    assert mean.numbers["clipped"] == 1.0


# --- once a round, whatever happens --------------------------------------------------------------------------
def test_asked_again_a_hospital_repeats_itself_byte_for_byte(five):
    asked = five.ticket(1)
    first = five.masked("h000", asked)
    five.hospitals["h000"] = five.open("h000")
    again = five.masked("h000", asked)
    assert first.header == again.header
    assert {name: octets.tobytes() for name, octets in first.octets.items()} == {
        name: octets.tobytes() for name, octets in again.octets.items()
    }


def collected(some: Consortium, number: int, dropped: Sequence[str] = ()) -> MaskedTotal:
    asked = some.ticket(number)
    total = some.total(asked)
    for name in some.names:
        if name not in dropped:
            total.add(name, some.masked(name, asked))
    total.close({})
    return total


def test_the_same_question_has_the_same_answer_and_another_none_even_after_a_restart(five):
    total = collected(five, 1)
    question = total.question("h000")
    given = five.hospitals["h000"].unmask(question).octets["keys"].tobytes()
    five.hospitals["h000"] = five.open("h000")
    assert five.hospitals["h000"].unmask(question).octets["keys"].tobytes() == given
    other = question.model_copy(update={"active": five.names[:4], "dropped": ("h004",)})
    other = other.model_copy(update={"active": tuple(five.names[:4]), "statements": question.statements[:4]})
    with pytest.raises(TicketRefused, match="it answers once a round"):
        five.hospitals["h000"].unmask(other)
    with pytest.raises(TicketRefused, match="Round 1 is over here"):
        five.masked("h000", five.ticket(1))


def test_what_was_collected_can_be_opened_after_a_crash_of_the_coordinator(five, tmp_path):
    total = collected(five, 1, dropped=["h004"])
    total.open("h000", five.hospitals["h000"].unmask(total.question("h000")))
    store = Store(tmp_path)
    store.save_collected(*total.collected())
    after = five.total(five.ticket(1))
    assert after.restore(store.load_collected(after.transcript))
    for name in after.active:
        after.open(name, five.hospitals[name].unmask(after.question(name)))
    mean = after.mean({})
    assert mean.vectors["update"].tobytes() == five.expected(1, five.names[:4]).tobytes()
    following = five.total(five.ticket(2))
    assert not following.restore(store.load_collected(following.transcript))


def test_keys_are_the_owners_alone_and_gone_after_the_round(five):
    path = five.folder / "h000" / "run-1.keys.json"
    collected_total = collected(five, 1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = json.loads(path.read_text())
    assert before["private"] == ""  # gone as soon as the chains are made
    five.hospitals["h000"].unmask(collected_total.question("h000"))
    after = json.loads(path.read_text())
    assert after["round"] == 2
    assert not set(before["chains"].values()) & set(after["chains"].values())
    for site, chain in before["chains"].items():
        assert masking.next_chain(bytes.fromhex(chain)).hex() == after["chains"][site]
    assert not list(path.parent.glob("*.tmp"))


def test_no_secret_is_shown(five):
    collected(five, 1)
    hospital = five.hospitals["h000"]
    keys = json.loads((five.folder / "h000" / "run-1.keys.json").read_text())
    shown = repr(hospital) + repr(hospital._read("run-1")) + str(hospital.identity)
    assert not any(chain in shown for chain in keys["chains"].values())


def test_damaged_keys_are_not_quoted(five):
    path = five.folder / "h000" / "run-1.keys.json"
    path.write_text(path.read_text().replace('"round":0', '"round":"secret-in-here"'))
    with pytest.raises(KeyBroken, match="is damaged") as refused:
        five.hospitals["h000"].admit(five.ticket(1))
    assert "secret-in-here" not in str(refused.value)
    assert refused.value.__suppress_context__


def test_rounds_may_be_missed(five):
    five.round(1)
    five.round(2, dropped=["h003"])
    five.round(5, dropped=["h002"])
    assert five.round(9).answered == tuple(five.names)


@pytest.mark.parametrize("spoil", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_counts_as_nothing_and_is_told_in_the_sum(tmp_path, spoil):
    """A refusal would tell the coordinator what its model did to one hospital's rows."""
    some = Consortium(tmp_path, 3)
    honest, some.update = some.update, lambda name, number, k=0: spoilt(honest(name, number, k), name, spoil)
    mean = some.round(1)
    exact = np.mean([np.nan_to_num(some.update(name, 1), nan=0, posinf=0, neginf=0) for name in some.names], axis=0)
    assert mean.vectors["update"] == pytest.approx(exact, abs=1e-7)
    assert mean.numbers["clipped"] == pytest.approx(1 / 3 / LAYOUT.size, abs=1e-6)


def spoilt(update: np.ndarray, name: str, spoil: float) -> np.ndarray:
    if name == "h001":
        update[3] = spoil
    return update


def test_without_noise_a_plan_is_run_once(five):
    """Or the difference of two sums, over the same updates, would be one hospital's."""
    again = tuple(five.hospitals[name].advert(five.header(0, cohort=(), run="run-2")) for name in five.names)
    five.round(1)
    with pytest.raises(TicketRefused, match="took part in another run of this plan"):
        five.hospitals["h000"].admit(five.ticket(1, run="run-2", cohort=again))


def test_wrong_keys_from_too_many_are_not_blamed_on_the_dealer_alone(five):
    total = collected(five, 1)
    for name in total.active[:4]:
        reply = five.hospitals[name].unmask(total.question(name))
        if name == "h001":
            reply = Reply(reply.header, {}, {"keys": np.zeros(reply.octets["keys"].size, np.uint8)})
        total.open(name, reply)
    with pytest.raises(QuorumLost, match="3 of 4 keys open the shares that h000 dealt; not those of h001"):
        total.mean({})


# --- vectors: one mistake each -------------------------------------------------------------------------------
TICKETS = {
    "no cohort": ({"cohort": ()}, "has 0 hospitals"),
    "not sorted": ({"cohort": lambda c: c.cohort[::-1]}, "twice, or is not sorted"),
    "a hospital twice": ({"cohort": lambda c: (c.cohort[0], *c.cohort)}, "twice, or is not sorted"),
    "without this hospital": ({"cohort": lambda c: c.cohort[1:]}, "lacks h000"),
    "one alone": ({"cohort": lambda c: c.cohort[:1]}, "has 1 hospitals; h000 takes part with 2 to 100"),
    "key not signed": ({"cohort": lambda c: (*c.cohort[:4], "{}")}, "no signed envelope"),
    "a run without keys": ({"run": "run-2"}, "given no key for this run"),
    "of another run": ({"cohort": lambda c: (*c.cohort[:4], other_run(c))}, "key of h004 is for another run"),
    "of another plan": ({"cohort": lambda c: (*c.cohort[:4], other_plan(c))}, "key of h004 is for another run"),
}


def other_run(some: Consortium) -> str:
    return some.hospitals["h004"].advert(some.header(0, cohort=(), run="run-3"))


def other_plan(some: Consortium) -> str:
    plan = amend(PLAN, rounds=3)
    own = some.folder / "elsewhere"
    own.mkdir()
    hospital = SecureSum(plan, plan.digest, "h004", some.keys["h004"], some.roster, 2, own)
    return hospital.advert(some.header(0, cohort=()))


@pytest.mark.parametrize("name", TICKETS)
def test_a_ticket_with_one_mistake_is_refused(five, name):
    changes, said = TICKETS[name]
    made = {key: value(five) if callable(value) else value for key, value in changes.items()}
    with pytest.raises(CloisterError, match=said):
        five.hospitals["h000"].admit(five.ticket(1, **made))
    five.hospitals["h000"].admit(five.ticket(1))  # and nothing was agreed to


LATER = {
    "another model": (lambda c: Ticket(c.header(2), {"model": np.zeros(LAYOUT.size, np.float32)}), "under other terms"),
    "other constants": (lambda c: c.ticket(2, normalisation=((0.0, 1.0),)), "under other terms"),
    "another cohort": (lambda c: c.ticket(2, cohort=c.cohort[:4]), "cohort changed within the run"),
    "an old round": (lambda c: c.ticket(1), "Round 1 is over here"),
}


@pytest.mark.parametrize("name", LATER)
def test_a_round_is_agreed_to_once(five, name):
    five.hospitals["h000"].admit(five.ticket(2))
    made, said = LATER[name]
    with pytest.raises(TicketRefused, match=said):
        five.hospitals["h000"].admit(made(five))
    five.hospitals["h000"].admit(five.ticket(2))


def without(question: UnmaskHeader, *names: str) -> dict[str, object]:
    """The same question with these hospitals dropped."""
    kept = [k for k, site in enumerate(question.active) if site not in names]
    return {
        "active": tuple(question.active[k] for k in kept),
        "dropped": tuple(sorted((*question.dropped, *names))),
        "statements": tuple(question.statements[k] for k in kept),
    }


QUESTIONS = {
    "round not begun": (lambda c, q: {"round": 3}, "no open round 3"),
    "another run": (lambda c, q: {"run": "run-9"}, "given no key"),
    "another transcript": (lambda c, q: {"transcript": "0" * 64}, "under other terms"),
    "active and dropped": (lambda c, q: {"dropped": ("h001", "h004")}, "both in the sum and dropped out"),
    "nobody dropped": (lambda c, q: {"dropped": ()}, "not the round's cohort"),
    "a stranger": (lambda c, q: {"dropped": ("h009",)}, "not the round's cohort"),
    "one twice": (
        lambda c, q: {
            "active": ("h000", "h000", "h001", "h002", "h003"),
            "statements": (q.statements[0], *q.statements),
        },
        "not the round's cohort",
    ),
    "not sorted": (
        lambda c, q: {"active": q.active[::-1], "statements": q.statements[::-1]},
        "not the round's cohort",
    ),
    "without this one": (lambda c, q: without(q, "h000"), "h000 is not in the sum"),
    "below two thirds": (lambda c, q: without(q, "h003"), "over 3 hospitals; h000 opens one over 4"),
    "sum of one": (lambda c, q: without(q, "h001", "h002", "h003"), "over 1 hospitals"),
    "a statement missing": (lambda c, q: {"statements": q.statements[:3]}, "made no statement"),
    "statements swapped": (
        lambda c, q: {"statements": (q.statements[1], q.statements[0], *q.statements[2:])},
        "agreed to other terms",
    ),
    "statement of another round": (
        lambda c, q: {"statements": (*q.statements[:3], c.masked("h003", c.ticket(2)).header.signed)},
        "h003 agreed to other terms",
    ),
    "no statement but a key": (lambda c, q: {"statements": (*q.statements[:3], c.cohort[3])}, "was shown as statement"),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_with_one_mistake_is_refused(five, name):
    total = collected(five, 1, dropped=["h004"])
    question = total.question("h000")
    changes, said = QUESTIONS[name]
    with pytest.raises(CloisterError, match=said):
        five.hospitals["h000"].unmask(question.model_copy(update=changes(five, question)))
    assert five.hospitals["h000"].unmask(question).octets["keys"].size == 4 * 2 * 32


REPLIES = {
    "another's": (lambda r: {"header": r.header.model_copy(update={"site": "h001"})}, "is h001's for round 1"),
    "another round's": (lambda r: {"header": r.header.model_copy(update={"round": 2})}, "for round 2"),
    "another model's": (lambda r: {"header": r.header.model_copy(update={"layout": "x"})}, "of another model"),
    "a part missing": (lambda r: {"octets": {k: v for k, v in r.octets.items() if k != "control"}}, "another model"),
    "cut short": (lambda r: {"octets": r.octets | {"update": r.octets["update"][:-1]}}, "bytes, not"),
    "shares cut short": (lambda r: {"octets": r.octets | {"shares": r.octets["shares"][:-1]}}, "bytes, not"),
    "blocks in another order": (
        lambda r: {"octets": r.octets | {"update": r.octets["update"][::-1]}},
        "changed on the",
    ),
    "one bit": (lambda r: {"octets": r.octets | {"tally": r.octets["tally"] ^ 1}}, "changed on the way"),
    "shares changed": (lambda r: {"octets": r.octets | {"shares": r.octets["shares"] ^ 1}}, "changed on the way"),
    "not signed": (lambda r: {"header": r.header.model_copy(update={"signed": ""})}, "no signed envelope"),
    "rows beside it": (lambda r: {"header": r.header.model_copy(update={"rows": 3})}, "beside the sum"),
    "metrics beside it": (
        lambda r: {"header": r.header.model_copy(update={"metrics": {"loss": 1.0}})},
        "beside the sum",
    ),
    "a plain update": (lambda r: {"vectors": {"update": np.zeros(43, np.float32)}}, "another model"),
}


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_with_one_mistake_is_rejected_and_adds_nothing(five, name):
    asked = five.ticket(1)
    total = five.total(asked)
    sound = five.masked("h000", asked)
    changes, said = REPLIES[name]
    parts = {"header": sound.header, "vectors": sound.vectors, "octets": sound.octets} | changes(sound)
    with pytest.raises(CloisterError, match=said):
        total.add("h000", Reply(**parts))
    for member in five.names:
        total.add(member, five.masked(member, asked))
    total.close({})
    for member in total.active:
        total.open(member, five.hospitals[member].unmask(total.question(member)))
    assert total.mean({}).vectors["update"].tobytes() == five.expected(1, five.names).tobytes()


# --- hostile hospitals ---------------------------------------------------------------------------------------
def test_wrong_keys_are_told_by_name_and_the_others_suffice(five):
    total = collected(five, 1)
    for name in total.active:
        reply = five.hospitals[name].unmask(total.question(name))
        if name == "h001":
            reply = Reply(reply.header, {}, {"keys": np.frombuffer(os.urandom(reply.octets["keys"].size), np.uint8)})
        total.open(name, reply)
    mean = total.mean({})
    assert mean.vectors["update"].tobytes() == five.expected(1, five.names).tobytes()
    assert "the key does not open the share" in mean.rejected["h001"]


@pytest.mark.parametrize("what", ["sealed", "secret"])
def test_who_deals_garbage_is_named(five, monkeypatch, what):
    said = "the shares that h002 dealt open no seed"
    asked = five.ticket(1)
    total = five.total(asked)
    for name in five.names:
        with monkeypatch.context() as hostile:
            if name == "h002" and what == "sealed":
                hostile.setattr(masking, "seal", lambda share, key: os.urandom(masking.SEALED))
                said = "0 of 4 keys open the shares that h002 dealt"
            if name == "h002" and what == "secret":
                hostile.setattr(masking, "deal", lambda s, *terms: DEAL([os.urandom(32) for _ in s], *terms))
            total.add(name, five.masked(name, asked))
    total.close({})
    for name in total.active:
        total.open(name, five.hospitals[name].unmask(total.question(name)))
    with pytest.raises(QuorumLost, match=said):
        total.mean({})


def test_who_masks_otherwise_than_it_says_spoils_a_sum_that_is_then_refused(five, monkeypatch):
    asked = five.ticket(1)
    total = five.total(asked)
    for name in five.names:
        with monkeypatch.context() as hostile:
            if name == "h002":
                hostile.setattr(masking, "sign", lambda me, peer: 1)
            total.add(name, five.masked(name, asked))
    total.close({})
    for name in total.active:
        total.open(name, five.hospitals[name].unmask(total.question(name)))
    with pytest.raises(QuorumLost, match="masked otherwise than it said"):
        total.mean({})


def test_two_questions_at_once_have_one_answer(tmp_path):
    """Threads that ask a hospital to open the same round for two different sums: one of them is refused."""
    some = Consortium(tmp_path, 6)
    total = collected(some, 1)
    question = total.question("h000")
    asked = [question, question.model_copy(update=without(question, "h005"))]
    outcomes: list[str] = []
    start = threading.Barrier(2)

    def ask(which: UnmaskHeader) -> None:
        start.wait()
        try:
            some.open("h000").unmask(which)
            outcomes.append("answered")
        except TicketRefused:
            outcomes.append("refused")

    threads = [threading.Thread(target=ask, args=(which,)) for which in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["answered", "refused"]
