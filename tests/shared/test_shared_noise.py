"""cloister_shared.shared_noise: what is promised is kept against every company, and known figures come out."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_shared.budget import Event, calibrate, epsilon
from cloister_shared.errors import BudgetExceeded, PlanRefused
from cloister_shared.shared_noise import certificate, remaining, rounding_inflation, share

DELTA = 1e-5
STATISTICS = Event(8.0, 1.0, 1, purpose="statistics")
# Few terms, so that the accountant's curves are found again and the tests stay quick.
TARGETS = st.sampled_from([(1.0, 0.2, 200), (3.0, 1.0, 20), (0.5, 0.01, 100)])
COMPANIES = st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1)))


def test_known_figures():
    """20 hospitals, epsilon 1 at a rate of 0.2 over 200 rounds, as Google's tighter accountant (PLD) priced it."""
    each = share(1.0, DELTA, 0.2, 200, sites=20)
    alone, third, others = certificate(each, DELTA, 0.2, 200, sites=20)
    half = epsilon([Event(remaining(each, 20, 10), 0.2, 200)], DELTA)
    found = [alone.epsilon, third.epsilon, half, others.epsilon]
    assert found == pytest.approx([1.0, 1.25, 1.47, 5.8], rel=0.02)
    assert [row.colluding for row in (alone, third, others)] == [0, 7, 19]
    # Rényi accounting asks for 8 % more noise than the tighter one that found 10.67.
    assert alone.noise_multiplier == pytest.approx(1.085 * 10.67, rel=1e-3)
    assert others.noise_multiplier == pytest.approx(each)


@settings(max_examples=30, deadline=None)
@given(TARGETS, COMPANIES)
def test_the_claim_is_kept_against_every_company_that_is_allowed(target, company):
    (claimed, rate, rounds), (sites, colluding) = target, company
    each = share(claimed, DELTA, rate, rounds, sites, colluding)
    for fewer in range(colluding + 1):
        assert epsilon([Event(remaining(each, sites, fewer), rate, rounds)], DELTA) <= claimed
    # and not by much more noise than that takes
    assert epsilon([Event(remaining(each, sites, colluding), rate, rounds)], DELTA) >= 0.999 * claimed


@settings(max_examples=20, deadline=None)
@given(TARGETS, COMPANIES, st.sampled_from([None, 4.0, 9.0]), st.sampled_from([(), (STATISTICS,)]))
def test_a_certificate_gets_worse_with_the_company(target, company, alone, before):
    (claimed, rate, rounds), (sites, colluding) = target, company
    each = share(claimed, DELTA, rate, rounds, sites, colluding, alone, before)
    rows = certificate(each, DELTA, rate, rounds, sites, colluding, before)
    assert [row.colluding for row in rows] == sorted(row.colluding for row in rows)
    assert [row.epsilon for row in rows] == sorted(row.epsilon for row in rows)
    assert rows[0].who == "the coordinator alone"
    assert rows[-1].colluding == sites - 1
    for row in rows:
        assert row.epsilon == epsilon([*before, Event(row.noise_multiplier, rate, rounds)], DELTA)
        if row.colluding <= colluding:
            assert row.epsilon <= claimed
        if alone:
            assert row.epsilon <= max(alone, claimed)


def test_the_floor_is_kept_against_everybody():
    without, floored = (share(1.0, DELTA, 0.2, 200, 20, epsilon_alone=alone) for alone in (None, 3.0))
    assert certificate(without, DELTA, 0.2, 200, 20)[-1].epsilon > 5
    assert 2.99 < certificate(floored, DELTA, 0.2, 200, 20)[-1].epsilon <= 3
    assert floored == calibrate(0.2, 200, 3.0, DELTA)
    assert share(1.0, DELTA, 0.2, 200, 20, epsilon_alone=6.0) == without


def test_what_came_before_counts_against_all():
    each, after = (share(1.0, DELTA, 0.2, 200, 5, 1, 4.0, before) for before in ((), (STATISTICS,)))
    assert after > each
    rows = certificate(after, DELTA, 0.2, 200, 5, 1, (STATISTICS,))
    assert rows[1].epsilon <= 1
    with pytest.raises(BudgetExceeded):
        share(0.1, DELTA, 0.2, 200, 5, before=(STATISTICS,))


def test_those_that_drop_out_take_their_noise_along():
    """Calibrated for a quorum of 10: 10 answers keep the claim, 12 more than keep it, 9 would not."""
    each = share(1.0, DELTA, 0.2, 200, sites=10)
    found = [epsilon([Event(remaining(each, answered, 0), 0.2, 200)], DELTA) for answered in (9, 10, 12)]
    assert found[0] > 1 >= found[1] > found[2]


@pytest.mark.parametrize(("sites", "colluding"), [(3, 3), (3, 4), (3, -1), (0, 0)])
def test_somebody_must_be_left(sites, colluding):
    with pytest.raises(PlanRefused, match="no other is there"):
        share(1.0, DELTA, 0.2, 200, sites, colluding)
    with pytest.raises(PlanRefused, match="no other is there"):
        certificate(1.0, DELTA, 0.2, 200, sites, colluding)


def test_a_hospital_alone_is_central():
    each = share(1.0, DELTA, 0.2, 200, sites=1)
    assert each == pytest.approx(calibrate(0.2, 200, 1.0, DELTA))
    (row,) = certificate(each, DELTA, 0.2, 200, sites=1)
    assert row.colluding == 0


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
