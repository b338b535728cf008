"""cloister_shared.shared_noise: what is promised is kept against every company, and known figures come out."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_shared.budget import Event, calibrate, epsilon
from cloister_shared.errors import BudgetExceeded
from cloister_shared.shared_noise import Events, certificate, part, rounding_inflation

DELTA = 1e-5
STATISTICS = Event(40.0, 1.0, 1, purpose="statistics")
# Few terms, so that the accountant's curves are found again and the tests stay quick.
TARGETS = st.sampled_from([(1.0, 0.2, 200), (3.0, 1.0, 20), (0.5, 0.01, 100)])
COMPANIES = st.integers(2, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1)))


def events(claimed: float = 1.0, rate: float = 0.2, rounds: int = 200, before: Events = ()) -> Events:
    return (*before, Event(calibrate(rate, rounds, claimed, DELTA, before), rate, rounds))


def with_noise(of: Events, noise: float) -> float:
    return epsilon([replace(event, noise_multiplier=noise * event.noise_multiplier) for event in of], DELTA)


def test_known_figures():
    """20 hospitals, epsilon 1 at a rate of 0.2 over 200 rounds, as Google's tighter accountant (PLD) priced it."""
    terms = events()
    each = part(terms, DELTA, sites=20)
    alone, third, others = certificate(terms, DELTA, each, sites=20)
    found = [alone.epsilon, third.epsilon, with_noise(terms, each * math.sqrt(10)), others.epsilon]
    assert found == pytest.approx([1.0, 1.25, 1.47, 5.8], rel=0.02)
    assert [row.colluding for row in (alone, third, others)] == [0, 7, 19]
    # Rényi accounting asks for 8 % more noise than the tighter one that found 10.67.
    assert terms[0].noise_multiplier == pytest.approx(1.085 * 10.67, rel=1e-3)
    assert others.noise == pytest.approx(each)


@settings(max_examples=30, deadline=None)
@given(TARGETS, COMPANIES, st.sampled_from([(), (STATISTICS,)]))
def test_the_claim_is_kept_against_every_company_that_is_allowed(target, company, before):
    (claimed, rate, rounds), (sites, colluding) = target, company
    terms = events(claimed, rate, rounds, before)
    each = part(terms, DELTA, sites, colluding)
    for fewer in range(colluding + 1):
        assert with_noise(terms, each * math.sqrt(sites - fewer)) <= claimed
    # and not by much more noise than that takes
    assert with_noise(terms, each * math.sqrt(sites - colluding)) >= 0.999 * claimed


@settings(max_examples=20, deadline=None)
@given(TARGETS, COMPANIES, st.sampled_from([None, 4.0, 9.0]), st.sampled_from([(), (STATISTICS,)]))
def test_a_certificate_gets_worse_with_the_company(target, company, alone, before):
    (claimed, rate, rounds), (sites, colluding) = target, company
    terms = events(claimed, rate, rounds, before)
    each = part(terms, DELTA, sites, colluding, alone)
    rows = certificate(terms, DELTA, each, sites, colluding)
    assert [row.colluding for row in rows] == sorted(row.colluding for row in rows)
    assert [row.epsilon for row in rows] == sorted(row.epsilon for row in rows)
    assert rows[0].who == "the coordinator alone"
    assert rows[-1].colluding == sites - 1
    for row in rows:
        assert row.epsilon == with_noise(terms, row.noise)
        if row.colluding <= colluding:
            assert row.epsilon <= claimed
        if alone:
            assert row.epsilon <= max(alone, claimed)


@pytest.mark.parametrize("before", [(), (STATISTICS,)])
def test_the_floor_is_kept_against_everybody(before):
    terms = events(before=before)
    without, floored = (part(terms, DELTA, 20, epsilon_alone=alone) for alone in (None, 3.0))
    assert certificate(terms, DELTA, without, 20)[-1].epsilon > 5
    assert 2.99 < certificate(terms, DELTA, floored, 20)[-1].epsilon <= 3
    assert part(terms, DELTA, 20, epsilon_alone=6.0) == without


def test_a_floor_that_no_noise_keeps_is_refused():
    with pytest.raises(BudgetExceeded, match="against all others cannot be kept"):
        part(events(), DELTA, 20, epsilon_alone=1e-7)


def test_those_that_drop_out_take_their_noise_along():
    """Calibrated for a quorum of 10: 10 answers keep the claim, 12 more than keep it, 9 would not."""
    terms = events()
    each = part(terms, DELTA, sites=10)
    found = [with_noise(terms, each * math.sqrt(answered)) for answered in (9, 10, 12)]
    assert found[0] > 1 >= found[1] > found[2]


@given(
    st.integers(1, 40).flatmap(lambda d: st.tuples(*[st.lists(st.floats(-5, 5), min_size=d, max_size=d)] * 2)),
    st.floats(0.1, 10),
    st.sampled_from([1.0, 3.7, 2.0**10]),
)
def test_rounding_changes_a_sum_by_no_more_than_it_is_inflated(values, clip_norm, scale):
    """One patient more, clipped: the integers move by at most the inflated clip_norm times the scale."""
    total, gradient = np.array(values)
    gradient *= min(1.0, clip_norm / max(float(np.linalg.norm(gradient)), 1e-12))
    moved = np.linalg.norm(np.rint(scale * (total + gradient)) - np.rint(scale * total))
    assert moved <= scale * clip_norm * rounding_inflation(clip_norm, scale, total.size) * (1 + 1e-9)


def test_the_inflation_is_nearly_reached_and_nearly_nothing():
    dimension, clip_norm = 10_000, 1.0
    total = np.full(dimension, 0.4999999)
    gradient = np.full(dimension, clip_norm / math.sqrt(dimension))
    moved = np.linalg.norm(np.rint(total + gradient) - np.rint(total))
    assert moved == pytest.approx(rounding_inflation(clip_norm, 1.0, dimension) - 1)
    assert rounding_inflation(1.0, 2.0**24, 1_000_000) == pytest.approx(1.00006, abs=1e-6)
