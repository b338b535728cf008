"""cloister_shared.noise: the laws that privacy is proved for, by tests whose bytes can be drawn again."""

import math
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from cloister_shared import noise
from cloister_shared.noise import (
    discrete_gaussian,
    draw_subset,
    gaussians,
    grid,
    keystream,
    noisy,
    reproducible,
    rounded,
    sum_gap,
    uniforms,
)

LEAST_P = 1e-3
"""Seeds are fixed, so a law that is right passes for ever; one that is wrong fails by many orders."""


def fits(counts, chances):
    """Whether counts are a sample of the law; cells that expect fewer than 8 are put together."""
    observed, expected = np.asarray(counts, float), np.asarray(chances) * np.sum(counts)
    rare = expected < 8
    if expected[rare].sum() < 8:
        if observed[rare].sum() > 40:
            return False
        rare[np.argmin(np.where(rare, np.inf, expected))] = True
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    return stats.chisquare(observed, expected, sum_check=False).pvalue > LEAST_P if observed.size > 1 else True


# --- bytes -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "count", [0, 1, 15, 16, 17, noise.BLOCK - 1, noise.BLOCK, noise.BLOCK + 1, 3 * noise.BLOCK + 7]
)
def test_as_many_bytes_as_asked(count):
    assert len(keystream()(count)) == count


def test_a_keystream_never_repeats():
    draw = keystream()
    assert len({draw(16) for _ in range(1000)}) == 1000
    assert draw(2 * noise.BLOCK)[: noise.BLOCK] != draw(noise.BLOCK)
    assert keystream()(16) != keystream()(16)


def test_a_keystream_is_uniform_bytes():
    drawn = np.frombuffer(keystream()(1 << 20), np.uint8)
    # Not reproducible: the bar is that of a generator that is broken, not of one that is unlucky.
    assert stats.chisquare(np.bincount(drawn, minlength=256)).pvalue > 1e-9


def test_a_keystream_changes_its_key(monkeypatch):
    keys = []
    fresh = os.urandom
    monkeypatch.setattr(noise, "REKEY", 64)
    monkeypatch.setattr(os, "urandom", lambda count: keys.append(fresh(count)) or keys[-1])
    draw = keystream()
    for _ in range(10):
        draw(32)
    assert len(set(keys)) == len(keys) == 5
    assert {len(key) for key in keys} == {32}


def test_a_keystream_shows_no_key(monkeypatch):
    monkeypatch.setattr(os, "urandom", lambda count: b"\x5a" * count)
    stream = noise._Keystream()
    draw = stream.draw
    shown = [
        repr(draw),
        repr(stream),
        *(repr(getattr(stream, name)) for name in stream.__slots__ if name != "__weakref__"),
    ]
    assert not any("5a5a" in text or "ZZZZ" in text for text in shown)
    with pytest.raises(TypeError):
        pickle.dumps(stream)


def test_a_forked_child_draws_other_bytes():
    draw = keystream()
    draw(5)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, draw(32))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        drawn = pipe.read()
    os.waitpid(child, 0)
    assert len(drawn) == 32
    assert drawn != draw(32)


def test_a_child_forked_while_a_thread_draws_can_draw():
    """Were the lock inherited, the child would wait for a thread that it does not have."""
    stream = noise._Keystream()
    with stream._lock:
        child = os.fork()
        if child == 0:
            try:
                stream.draw(1)
            finally:
                os._exit(7)
    for _ in range(500):
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            break
        time.sleep(0.01)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child never got its bytes")
    assert os.waitstatus_to_exitcode(status) == 7


def test_threads_never_share_bytes():
    draw = keystream()
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda _: draw(16 * 64), range(400)))
    blocks = [part[at : at + 16] for part in drawn for at in range(0, len(part), 16)]
    assert len(set(blocks)) == len(blocks)


def test_reproducible_is_reproducible():
    assert reproducible("a")(100) == reproducible("a")(100) != reproducible("b")(100)


# --- continuous noise --------------------------------------------------------------------------------------
def test_uniforms_are_53_bits_of_each_word():
    words = np.array([0, 2**64 - 1, 1 << 63, 1 << 11, (1 << 11) - 1], "<u8")
    assert uniforms(lambda count: words.tobytes()[:count], 5).tolist() == [0.0, 1 - 2.0**-53, 0.5, 2.0**-53, 0.0]


def test_uniforms_are_uniform():
    drawn = uniforms(reproducible("uniform"), 1_000_000)
    assert stats.kstest(drawn, "uniform").pvalue > LEAST_P


@pytest.mark.parametrize("count", [0, 1, 2, 31, noise.BLOCK // 8, noise.BLOCK // 8 + 1])
def test_as_many_normals_as_asked(count):
    drawn = gaussians(reproducible("few"), count)
    assert drawn.shape == (count,)
    assert np.isfinite(drawn).all()


def test_gaussians_are_normal_and_independent():
    drawn = gaussians(reproducible("normal"), 4_000_000)
    assert stats.kstest(drawn, "norm").pvalue > LEAST_P
    assert fits(np.histogram(stats.norm.cdf(drawn), 1000, (0, 1))[0], np.full(1000, 1e-3))
    for apart in (1, 2, drawn.size // 2):
        assert abs(np.mean(drawn[apart:] * drawn[:-apart])) < 4 / math.sqrt(drawn.size - apart)


def test_every_layer_and_the_tail_have_their_share():
    """Cells as narrow as the layers' edges, and beyond the last layer, where another way of drawing begins."""
    drawn = np.abs(gaussians(reproducible("layers"), 4_000_000))
    edges = [0, *noise._WIDTH[255:0:-1], 3.8, 4.0, 4.2, 4.5, np.inf]
    assert fits(np.histogram(drawn, edges)[0], np.diff(2 * stats.norm.cdf(edges) - 1))


def test_the_tail_is_the_normal_one():
    drawn = noise._tail(reproducible("tail"), 200_000)
    beyond = stats.norm.sf(noise._LAST)
    assert stats.kstest(stats.norm.sf(drawn) / beyond, "uniform").pvalue > LEAST_P


def test_layers_have_one_area_and_close_at_the_top():
    width, height = noise._WIDTH, noise._HEIGHT
    assert width[1:256] * np.diff(height)[1:] == pytest.approx(np.full(255, width[0] * height[1]), rel=1e-12)


def test_the_tail_is_not_cut():
    """Words of nought are the least likely: they reach further than 53 or 64 bits would."""
    assert math.sqrt(2 * noise._exponentials(bytes, 1)[0]) == pytest.approx(13.37, abs=0.01)
    assert np.abs(gaussians(lambda count: np.full(count // 8, 2**63 - 256, "<u8").tobytes(), 1))[0] > noise._LAST


def test_small_exponentials_use_the_second_word():
    words = iter([np.array([3 << 20, 1 << 50], "<u8"), np.array([1 << 63], "<u8")])
    drawn = noise._exponentials(lambda count: next(words).tobytes(), 2)
    assert drawn.tolist() == pytest.approx([-math.log(((3 << 20) + 0.5) * 2.0**-64), 14 * math.log(2)], rel=1e-15)


# --- releases ----------------------------------------------------------------------------------------------
@given(st.floats(1e-200, 1e200), st.lists(st.floats(-30, 30), min_size=1))
def test_what_is_rounded_is_on_the_grid(spread, scaled):
    values = np.array(scaled) * spread
    released = rounded(values, spread)
    cells = released / grid(spread)
    assert spread / 1024 / 1.0001 <= 2 * grid(spread) <= spread / 512 * 1.0001
    assert (cells == np.rint(cells)).all()
    assert not np.signbit(released[released == 0]).any()
    assert (np.abs(released - values) <= grid(spread) / 2).all()
    if 1e-30 < spread < 1e30:
        assert (released.astype(np.float32) == released).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_noisy_is_the_rounded_sum(dtype):
    values = np.linspace(-5, 5, 3 * noise.BLOCK // 8 // 2).reshape(2, -1).astype(dtype)
    released = noisy(reproducible("sum"), values, 0.37)
    assert released.dtype == dtype
    assert released.shape == values.shape
    assert (np.rint(released / grid(0.37)) == released / grid(0.37)).all()
    assert stats.kstest((released - values).ravel() / 0.37, "norm").pvalue > LEAST_P


@pytest.mark.parametrize("spread", [0.0, -1.0, math.nan, math.inf, 1e-300, 1e300])
def test_no_rounding_without_noise(spread):
    with pytest.raises(ValueError, match="cannot be rounded"):
        rounded(np.zeros(3), spread)


def test_single_precision_comes_too_late():
    with pytest.raises(ValueError, match="float64"):
        rounded(np.zeros(3, np.float32), 1.0)


def told_apart(released, ours, theirs):
    """The share of outputs that only one of two neighbouring values can have led to (Mironov 2012).

    Noise below 2 is a multiple of 2^-52 near the other value, as is the sum: what is not, cannot come from there.
    """
    reachable = (released - theirs) + theirs == released
    return np.mean(~reachable & ((released - ours) + ours == released))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_low_bits_of_naive_noise_tell_the_value_and_ours_do_not(dtype):
    entropy = reproducible("attack")
    naive = gaussians(entropy, 20_000).astype(dtype)
    assert told_apart(naive, dtype(0), dtype(1)) > 0.2
    ours = noisy(entropy, np.zeros(20_000, dtype), 1.0)
    assert told_apart(ours, dtype(0), dtype(1)) == 0


def test_every_cell_is_reached_from_either_value_with_its_chance():
    """Neighbours 0 and 1/3, noise of 1: each cell within 3 has the normal law's chance from both."""
    edges = (np.arange(-3 * 32, 3 * 32 + 1) + 0.5 / 16) / 32  # 16 cells together, edges between cells
    for value in (0.0, 1 / 3):
        drawn = noisy(reproducible(f"cells of {value}"), np.full(1_000_000, value), 1.0)
        counts = np.histogram(drawn, edges)[0]
        chances = np.diff(stats.norm.cdf(edges + grid(1.0) / 2 - grid(1.0) / 2 - value))
        inside = chances.sum()
        assert fits(counts, chances / inside)


# --- who is drawn ------------------------------------------------------------------------------------------
@pytest.fixture
def counted(monkeypatch):
    """No coin is thrown, however many are drawn of however few."""
    monkeypatch.setattr(noise, "_MANY", 1)
    monkeypatch.setattr(noise, "_SMALL", 0)


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(("population", "rate"), [(7, 0.3), (40, 0.06), (1000, 0.002), (1000, 0.06), (100_000, 0.0005)])
def test_the_number_drawn_is_binomial(population, rate):
    entropy = reproducible(f"number of {population} at {rate}")
    sizes = [draw_subset(entropy, population, rate).size for _ in range(3000)]
    counts = np.bincount(sizes, minlength=population + 1)
    assert fits(counts, stats.binom.pmf(np.arange(population + 1), population, rate))


@pytest.mark.parametrize(
    ("trials", "rate"), [(1, 0.5), (20, 0.01), (1000, 1e-6), (1000, 0.999), (10**6, 1e-3), (10**6, 0.5)]
)
def test_the_binomial_law_is_scipys_and_that_of_fifty_digits(trials, rate):
    least, below = noise._binomial(trials, rate)
    assert below == pytest.approx(stats.binom.cdf(np.arange(least, least + below.size), trials, rate), abs=1e-11)
    assert stats.binom.cdf(least - 1, trials, rate) < 1e-28
    assert stats.binom.sf(least + below.size, trials, rate) < 1e-28
    with localcontext(prec=50):
        odds, chances = Decimal(rate) / (1 - Decimal(rate)), [Decimal(1)]
        for k in range(least, least + below.size):
            chances.append(chances[-1] * (trials - k) / (k + 1) * odds)
        whole = sum(chances)
        exact = [float(chance / whole) for chance in chances]
    assert np.abs(np.diff(below, prepend=0, append=1) - exact).sum() / 2 < 1e-12


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("rate", [0.05, 0.2, 0.6])
def test_drawn_like_a_coin_for_each(rate):
    """Each alone, each pair, and which set of all that there are."""
    entropy, draws, population = reproducible(f"coins {rate}"), 12_000, 6
    drawn = np.zeros((draws, population))
    for row in drawn:
        row[draw_subset(entropy, population, rate)] = 1
    error = 4.5 / math.sqrt(draws)
    assert drawn.mean(0) == pytest.approx(np.full(population, rate), abs=error)
    centred = drawn - rate
    pairs = centred.T @ centred / draws
    assert pairs == pytest.approx(np.eye(population) * rate * (1 - rate), abs=error)
    sets = np.bincount((drawn @ 2 ** np.arange(population)).astype(int), minlength=2**population)
    sizes = np.array([bin(index).count("1") for index in range(2**population)])
    assert fits(sets, rate**sizes * (1 - rate) ** (population - sizes))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # it is the same for all examples
@pytest.mark.usefixtures("counted")
@given(st.integers(0, 3000), st.floats(0, 0.9), st.text(max_size=3))
def test_a_subset_is_sorted_and_without_repeats(population, rate, seed):
    drawn = draw_subset(reproducible(seed), population, rate)
    assert drawn.dtype == np.int64
    assert (np.diff(drawn) > 0).all()
    assert drawn.size == 0 or (drawn[0] >= 0 and drawn[-1] < population)


@pytest.mark.parametrize(("population", "rate"), [(100_000, 0.001), (100_000, 0.3), (1000, 0.01)])
def test_either_way_draws_the_rate(population, rate):
    """As shipped: counted where few of many are drawn, else by coins."""
    entropy = reproducible(f"either {rate}")
    sizes = [draw_subset(entropy, population, rate).size for _ in range(200)]
    assert abs(np.mean(sizes) - population * rate) < 4 * math.sqrt(population * rate / 200)
    assert np.var(sizes) == pytest.approx(population * rate * (1 - rate), rel=0.4)


@pytest.mark.parametrize("population", [5, 50_000])
def test_all_or_none(population):
    assert draw_subset(os.urandom, population, 1).tolist() == list(range(population))
    assert draw_subset(os.urandom, population, 0).size == draw_subset(os.urandom, 0, 0.5).size == 0
    for rate in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="no probability"):
            draw_subset(os.urandom, population, rate)


def test_words_beyond_the_last_multiple_are_drawn_again():
    words = iter([np.array([2**64 - 1, 7, 2**64 - 2], "<u8"), np.array([2**64 - 1, 9], "<u8"), np.array([10], "<u8")])
    assert noise._below(lambda count: next(words).tobytes(), 10, 3).tolist() == [0, 7, 9]
    assert noise._below(reproducible("two"), 1, 3).tolist() == [0, 0, 0]


# --- noise for integers ------------------------------------------------------------------------------------
def law(sigma):
    reach = math.ceil(12 * sigma) + 2
    integers = np.arange(-reach, reach + 1)
    weights = np.exp(-(integers**2) / (2 * sigma**2))
    return integers, weights / weights.sum()


@pytest.mark.parametrize("sigma", [0.1, 0.25, 0.7, 1, 1.9, 3, 50])
def test_discrete_gaussians_have_their_law(sigma):
    drawn = discrete_gaussian(reproducible(f"discrete {sigma}"), sigma, 400_000)
    integers, chances = law(sigma)
    assert drawn.dtype == np.int64
    assert np.abs(drawn).max() <= integers[-1]
    assert fits(np.bincount(drawn - integers[0], minlength=integers.size), chances)


@pytest.mark.parametrize("sigma", [0.5, 10.0, 1e6, 2.0**40])
def test_discrete_gaussians_moments(sigma):
    drawn = discrete_gaussian(reproducible(f"moments {sigma}"), sigma, 1_000_000).astype(float)
    integers, chances = law(sigma) if sigma < 1e3 else (np.array([-sigma, sigma]), np.array([0.5, 0.5]))
    variance = (integers**2 * chances).sum()
    assert abs(drawn.mean()) < 4 * math.sqrt(variance / drawn.size)
    assert drawn.var() == pytest.approx(variance, rel=4 * math.sqrt(3 / drawn.size))
    assert np.mean(drawn[1:] * drawn[:-1]) / variance == pytest.approx(0, abs=4e-3)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, 2.0**41])
def test_no_discrete_noise_of_such_a_sigma(sigma):
    with pytest.raises(ValueError, match="cannot be drawn"):
        discrete_gaussian(os.urandom, sigma, 1)


@pytest.mark.parametrize("sigma", [0.5, 0.7, 1.0, 1.3])
@pytest.mark.parametrize("sites", [2, 3, 5])
def test_the_sum_is_within_its_gap_of_one_gaussian(sigma, sites):
    """The sum's law by convolution, against that of sigma √sites, wherever doubles can hold both."""
    total, (_, chances) = np.ones(1), law(sigma)
    for _ in range(sites):
        total = np.convolve(total, chances)
    middle = total.size // 2
    reach = math.ceil(5 * sigma * math.sqrt(sites))
    integers, single = law(sigma * math.sqrt(sites))
    there = np.abs(integers) <= reach
    ratio = np.log(total[middle - reach : middle + reach + 1] / single[there])
    assert 0 < np.abs(ratio).max() <= sum_gap(sigma, sites, 1) + 1e-12


def test_the_gap_vanishes_and_grows_with_the_dimension():
    assert sum_gap(10.0, 100, 25_000_000) == 0
    assert sum_gap(0.7, 3, 10) == pytest.approx(10 * sum_gap(0.7, 3, 1))
    assert sum_gap(0.7, 1, 10) == sum_gap(0.1, 1, 10) == 0
    assert sum_gap(0.49, 2, 1) == math.inf
    # The first term, by hand: 10 exp(-π²) at sigma = 1 and two sites.
    assert sum_gap(1.0, 2, 1) == pytest.approx(10 * math.exp(-(math.pi**2)))
