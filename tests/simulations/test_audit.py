"""cloister_simulations.audit: bounds that hold, lines that fail for their own fault only, and four bugs caught."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import optimize, stats
from typer.testing import CliRunner

from cloister_client import privacy
from cloister_shared.budget import Event, epsilon
from cloister_shared.errors import PlanRefused
from cloister_shared.noise import reproducible
from cloister_simulations import cli
from cloister_simulations.audit import bounds, told
from cloister_simulations.audit.bounds import StepBound, known_batches, one_run, per_step, tight_epsilon
from cloister_simulations.audit.canaries import (
    DELTA,
    FEATURES,
    CanaryModel,
    Observed,
    Size,
    batch_sizes,
    observe,
    plan_of,
    rows_of,
)
from cloister_simulations.audit.conformance import checks
from cloister_simulations.audit.gate import Finding, audit
from cloister_simulations.audit.mechanism import MECHANISMS, Plant, claim, real

SMALL = Size(rows=1000, canaries=900, coins=200, batch_size=50, steps=200)
"""Half a second of training: the bound is some 93 % of what the event allows."""
EVENT = Event(noise_multiplier=2.2, sample_rate=0.05, steps=300)


@pytest.fixture(scope="module")
def found() -> Callable[[float, Plant | None], Finding]:
    """An audit of the small size, with the same noise every time; each is done once."""
    done: dict[tuple[float, Plant | None], Finding] = {}

    def audited(claimed: float, plant: Plant | None) -> Finding:
        if (claimed, plant) not in done:
            done[claimed, plant] = audit(claimed, plant, size=SMALL, entropy=reproducible(f"audit {claimed}"))
        return done[claimed, plant]

    return audited


def failed(finding: Finding) -> set[str]:
    return {check.name for check in finding.checks if not check.holds}


def simulated(seed: int, *, event: Event = EVENT, steps: int = 300, canaries: int = 400, coins: int = 0) -> Observed:
    """What a flawless mechanism would show, by its law."""
    generator = np.random.default_rng(seed)
    member = np.ones(canaries, dtype=bool)
    member[:coins] = generator.random(coins) < 0.5
    counts = (generator.random((steps, canaries)) < event.sample_rate).astype(np.int64)
    drawn = (counts > 0) & member
    sums = drawn + event.noise_multiplier * generator.normal(size=drawn.shape)
    return Observed(
        event, sums.astype(np.float32), drawn, member, coins, counts[:, member], 1e6, sums.sum(axis=0), moved=()
    )


# --- the real mechanism ------------------------------------------------------------------------------------
@pytest.mark.parametrize("claimed", [2.0, 8.0])
def test_a_sound_mechanism_is_bounded_tightly_and_not_caught(found, claimed):
    finding = found(claimed, None)
    assert finding.caught == []
    assert 0.9 <= finding.share <= 1
    assert finding.verdict == "holds"
    assert finding.lower < finding.allowed <= claimed
    assert finding.allowed == pytest.approx(claimed, rel=5e-3)
    assert finding.one_run <= finding.allowed
    assert finding.steps == SMALL.steps
    assert finding.charged == epsilon([finding.event], DELTA) > claimed


@pytest.mark.parametrize(
    ("plant", "lines", "sentence"),
    [
        (Plant.NOISE, {"noise, sd over claimed", "noise, chi-square"}, "The noise has 0.9"),
        (Plant.TWICE, {"one record in the sum"}, "One record moves the sum by "),
        (
            Plant.SHUFFLED,
            {"draws, size of batches", "draws, how often each row", "draws, step after step"},
            "Batches of 50 to 50 rows are no Poisson draws",
        ),
        (
            Plant.BATCHNORM,
            {"state without noise", "model with BatchNorm"},
            "The model's net.0.norm.running_mean moved in training with no noise",
        ),
    ],
)
def test_a_planted_bug_is_caught_by_its_own_lines_and_by_the_bound(found, plant, lines, sentence):
    """At epsilon 2, where it is hardest; the benchmark does it at 8 too."""
    finding = found(2.0, plant)
    assert failed(finding) - {"final model alone, ε at least"} == lines
    assert any(said.startswith(sentence) for said in finding.caught)
    assert finding.lower > finding.allowed
    assert finding.verdict == "caught"


def test_a_bound_without_end_is_said_and_is_null_in_json(found):
    finding = found(2.0, Plant.BATCHNORM)
    assert math.isinf(finding.lower)
    assert "What leaves shows one row for certain: no epsilon describes that." in finding.caught
    assert json.loads(json.dumps(finding.as_json(), allow_nan=False))["lower"] is None


def test_the_canary_model_is_only_watched(found):
    """The wrapped network trains as it would without canaries' columns, and the columns hardly move."""
    plan = plan_of(2.0, SMALL)
    observed = observe(real, plan, claim(plan, SMALL.rows), replace(SMALL, steps=30), reproducible("watch"))
    np.testing.assert_allclose(observed.final, observed.sums.sum(axis=0), atol=1e-3)
    assert observed.reach > 1e5
    assert observed.steps == 30
    assert (observed.drawn & ~observed.member).sum() == 0


def test_a_row_counts_as_often_as_it_is_in_one_pass():
    """A mechanism may pass a batch in parts, and rows again to try the model; only a pass with a row twice is odd."""
    model = CanaryModel(3)
    x = torch.zeros(4, 2 + FEATURES)
    x[:, 0] = torch.tensor([0, 1, 4, 4])
    for part in (x[:2], x[:1], x[2:]):
        model(part)
    assert model.shown(6).tolist() == [1, 1, 0, 0, 2, 0]
    model.seen.clear()
    assert model.shown(2).tolist() == [0, 0]


def test_statistics_of_raw_rows_are_refused_by_the_client():
    plan = plan_of(2.0, SMALL)
    with pytest.raises(PlanRefused, match="BatchNorm1d"):
        batch_sizes(real, plan, EVENT, 100, 0, reproducible("x"), norm=True)


def test_the_client_is_left_as_it_was():
    before = privacy.refuse_running_statistics
    plan = plan_of(2.0, SMALL)
    for plant, build in MECHANISMS.items():
        rows = rows_of(np.ones(1, dtype=bool), 60, np.random.default_rng(0))
        build(CanaryModel(1, plant is Plant.BATCHNORM), rows, plan, EVENT, reproducible("x"))
    assert privacy.refuse_running_statistics is before


def test_shuffled_batches_are_epochs_and_a_missing_row_shows():
    """Also where the last batch is short: the free place is taken by a row that the mechanism silences."""
    plan = plan_of(2.0, replace(SMALL, batch_size=10))
    sizes = [batch_sizes(MECHANISMS[Plant.SHUFFLED], plan, EVENT, rows, 8, reproducible("x")) for rows in (40, 39)]
    assert sizes[0].tolist() == [10] * 8
    assert sizes[1].tolist() == [10, 10, 10, 9] * 2


# --- bounds ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("noise", "rate", "steps", "expected"),
    [(1.0, 0.05, 100, 3.502), (2.0, 0.05, 1000, 3.700), (5.0, 0.2, 1000, 5.87), (50.0, 1.0, 500, 1.760)],
)
def test_tight_epsilon_of_known_events(noise, rate, steps, expected):
    """By Opacus's PRV accountant, less its error term of 0.01."""
    assert tight_epsilon(noise, rate, steps, 1e-5) == pytest.approx(expected, abs=6e-3)


@pytest.mark.parametrize("noise", [0.2, 1.0, 4.0])
def test_tight_epsilon_of_one_gaussian_is_the_analytic_one(noise):
    """Balle and Wang 2018, theorem 8."""

    def delta(at: float) -> float:
        a, b = 1 / (2 * noise) - at * noise, -1 / (2 * noise) - at * noise
        return float(stats.norm.cdf(a) - math.exp(at) * stats.norm.cdf(b))

    expected = optimize.brentq(lambda at: delta(at) - 1e-5, 0, 60)
    assert tight_epsilon(noise, 1.0, 1, 1e-5) == pytest.approx(expected, abs=2e-3)


def test_the_step_bound_covers_in_at_least_95_of_100_runs(monkeypatch):
    """Epsilon rises with rate * shift / spread, so that ratio stands in for it: 300 accountings would take a minute."""
    monkeypatch.setattr(bounds, "tight_epsilon", lambda noise, rate, steps, delta: rate / noise)
    runs = [per_step(simulated(seed, steps=60, canaries=150), DELTA).epsilon for seed in range(300)]
    truth = EVENT.sample_rate / EVENT.noise_multiplier
    assert np.mean(np.array(runs) > truth) <= bounds.RISK
    assert np.median(runs) > 0.7 * truth  # and does not hide behind a bound of nothing


def test_the_step_bound_is_of_the_whole_claimed_run_however_few_steps_were_seen():
    event = replace(EVENT, steps=1000)
    bound = per_step(simulated(1, event=event, canaries=2000), DELTA)
    assert 0.85 * tight_epsilon(2.2, 0.05, 1000, DELTA) < bound.epsilon < tight_epsilon(2.2, 0.05, 1000, DELTA)


def test_canaries_that_never_show_bound_nothing():
    observed = simulated(0)
    blind = replace(observed, sums=observed.sums - observed.drawn)
    assert per_step(blind, DELTA).epsilon == 0


@given(right=st.integers(0, 60), guesses=st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_guesses_under_pure_privacy_are_a_binomial_test(right, guesses):
    """With delta 0 theorem 5.2 is Clopper and Pearson's bound on the chance of a right guess."""
    right = min(right, guesses)
    chance = stats.beta.ppf(0.05, right, guesses - right + 1) if right else 0.0
    expected = max(0.0, math.log(chance / (1 - chance))) if chance > 0 else 0.0
    assert bounds._guesses(1000, guesses, right, 0.0, 0.05) == pytest.approx(expected, abs=2e-3)


def test_delta_costs_the_guesses_something():
    without, with_ = (bounds._guesses(1000, 100, 95, delta, 0.05) for delta in (0.0, 1e-4))
    assert 0 < with_ < without


def test_one_run_stays_below_the_truth_and_sees_a_canary_without_noise():
    """A full-batch Gaussian over 12 runs; then next to no noise."""
    event = Event(1.24, 1.0, 1)
    allowed = tight_epsilon(1.24, 1.0, 1, DELTA)
    lower = [one_run(simulated(s, event=event, steps=1, canaries=1000, coins=1000), DELTA) for s in range(12)]
    assert 0.5 < np.median(lower) < max(lower) < allowed
    loud = simulated(0, event=replace(event, noise_multiplier=0.05), steps=1, canaries=1000, coins=1000)
    assert one_run(loud, DELTA) > allowed


def test_batches_of_known_size_are_bounded_by_the_distance_of_their_sizes():
    step = StepBound(shift=1.0, spread=2.0, rate=0.1, epsilon=0.0)
    full, less = np.full(40, 10), np.tile([10, 10, 10, 9], 10)
    assert known_batches([full, full], [less, less], step, DELTA) == tight_epsilon(2 / math.sqrt(10), 1.0, 1, DELTA)
    assert known_batches([full, full], [full, full], step, DELTA) == 0
    assert known_batches([full, full + np.eye(1, 40, dtype=int)[0]], [less, less], step, DELTA) is None


# --- conformance: one fault, one line ----------------------------------------------------------------------
def _sums(change: Callable[[NDArray[np.float32], NDArray[np.bool_]], NDArray]) -> Callable[[Observed], Observed]:
    return lambda seen: replace(seen, sums=change(seen.sums, seen.drawn).astype(np.float32))


def _draws(change: Callable[[NDArray[np.int64]], NDArray]) -> Callable[[Observed], Observed]:
    """Other draws, and the sums that they would give."""

    def changed(seen: Observed) -> Observed:
        counts = change(seen.counts.copy()).astype(np.int64)
        drawn = counts > 0
        sums = seen.sums - seen.drawn.astype(np.float32) + drawn
        return replace(seen, counts=counts, drawn=drawn, sums=sums.astype(np.float32))

    return changed


def _repeat_a_step(sums, drawn):
    noise = sums - drawn
    noise[200] = noise[3]
    return noise + drawn


def _repeat_a_canary(sums, drawn):
    noise = sums - drawn
    noise[:, 77] = noise[:, 5]
    return noise + drawn


def _uniform_noise(sums, drawn):
    flat = np.random.default_rng(0).uniform(-1, 1, sums.shape)
    return drawn + EVENT.noise_multiplier * math.sqrt(3) * flat


def _some_row_twice(counts):
    counts[np.unravel_index(np.flatnonzero(counts)[7], counts.shape)] = 2
    return counts


def _same_rate_for_all_at_once(counts):
    """Steps of few and steps of many rows; the mean rate is right."""
    generator = np.random.default_rng(1)
    rates = np.where(np.arange(len(counts)) % 2, 0.8, 1.2) * EVENT.sample_rate
    return generator.random(counts.shape) < rates[generator.permutation(len(counts)), None]


def _some_rows_more_often(counts):
    generator = np.random.default_rng(2)
    return generator.random(counts.shape) < np.where(np.arange(counts.shape[1]) % 2, 0.6, 1.4) * EVENT.sample_rate


def _never_twice_in_a_row(counts):
    """A Markov chain of the right rate that never stays."""
    generator = np.random.default_rng(3)
    drawn, rate = np.zeros(counts.shape, dtype=bool), EVENT.sample_rate
    drawn[0] = generator.random(counts.shape[1]) < rate
    for step in range(1, len(drawn)):
        drawn[step] = ~drawn[step - 1] & (generator.random(counts.shape[1]) < rate / (1 - rate))
    return drawn


FAULTS: dict[str, tuple[Callable[[Observed], Observed], set[str]]] = {
    "weak canary": (lambda seen: replace(seen, reach=0.8), {"canary before clipping"}),
    "half a record": (_sums(lambda sums, drawn: sums - 0.5 * drawn), {"one record in the sum"}),
    "noise off by 1 %": (_sums(lambda sums, drawn: drawn + 1.01 * (sums - drawn)), {"noise, chi-square"}),
    "uniform noise": (_sums(_uniform_noise), {"noise, normal (Kolmogorov)", "noise, chi-square"}),
    "noise of another step": (_sums(_repeat_a_step), {"noise, step and step"}),
    "noise of another canary": (_sums(_repeat_a_canary), {"noise, canary and canary"}),
    "row twice": (_draws(_some_row_twice), {"row twice in a batch"}),
    "another rate": (
        lambda seen: replace(seen, event=replace(EVENT, sample_rate=0.054)),
        {"draws, rate"},
    ),
    "batches vary": (_draws(_same_rate_for_all_at_once), {"draws, size of batches"}),
    "favoured rows": (_draws(_some_rows_more_often), {"draws, how often each row"}),
    "rows rest after a draw": (_draws(_never_twice_in_a_row), {"draws, step after step"}),
    "a buffer moves": (lambda seen: replace(seen, moved=("bn.running_mean",)), {"state without noise"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_its_own_line(fault):
    change, lines = FAULTS[fault]
    broken = list(checks(change(simulated(11, canaries=800)), refused=True))
    wrong = {check.name for check in broken if not check.holds}
    # A uniform noise's variance is so exact only by chance; other lines of its fault may or may not fail.
    assert wrong == lines or (fault == "uniform noise" and "noise, normal (Kolmogorov)" in wrong <= lines)
    assert all(check.said.endswith(".") for check in broken)


def test_the_law_itself_fails_no_line_in_30_runs():
    for seed in range(30):
        assert [check.name for check in checks(simulated(seed, steps=150, canaries=300), True) if not check.holds] == []


def test_a_client_that_takes_batchnorm_fails_its_line():
    assert [check.name for check in checks(simulated(11), False) if not check.holds] == ["model with BatchNorm"]


# --- the command -------------------------------------------------------------------------------------------
def sim(*arguments):
    return CliRunner().invoke(cli.app, ["audit", *map(str, arguments)])


@pytest.fixture
def small_and_still(monkeypatch, found):
    """The command on the small size with noise that is the same every time."""
    monkeypatch.setattr(told, "audit", lambda claimed, plant, **_: found(claimed, plant))


def test_the_command_prints_tables_of_100_columns_and_exits_with_0(small_and_still):
    done = sim()
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "lower bound, 95 %" in done.stdout
    assert done.stdout.count("holds") == 2
    assert "draws, size of batches" in done.stdout
    assert "The mechanism is what its events say" in done.stdout


def test_the_command_says_what_it_caught_and_exits_with_1(small_and_still):
    done = sim("--epsilon", 2, "--plant", "twice")
    assert done.exit_code == 1
    assert re.search(
        r"ε 2: One record moves the sum by (1\.9|2\.0)\d clip bounds, where the event allows 1\.", done.stdout
    )
    assert "The mechanism is what" not in done.stdout


def test_the_command_gives_json(small_and_still):
    done = sim("--epsilon", 8, "--json")
    assert done.exit_code == 0
    (one,) = json.loads(done.stdout)
    assert one["claimed"] == 8
    assert one["verdict"] == "holds"
    assert one["caught"] == []
    assert one["event"]["steps"] == SMALL.steps


def test_too_little_time_vouches_for_nothing(monkeypatch):
    """Fails closed: what was not seen is not passed."""
    monkeypatch.setattr(told, "audit", partial(audit, entropy=reproducible("short")))
    monkeypatch.setattr(told, "Size", lambda: SMALL)
    done = sim("--epsilon", 2, "--seconds", 0)
    assert done.exit_code == 1
    assert "loose" in done.stdout
    assert "after 20 steps: too little was seen to vouch" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--plant", "weeds"], "There is no plant weeds. Write one of noise, twice, shuffled, batchnorm."),
        (["--epsilon", "0"], "--epsilon 0 cannot be audited. Write a number from 0.01 to 100."),
        (["--epsilon", "nan"], "--epsilon nan cannot be audited."),
    ],
)
def test_a_mistake_is_answered_by_a_sentence(arguments, sentence):
    done = sim(*arguments)
    assert done.exit_code == 1
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_words_of_the_option_are_those_of_the_code():
    assert set(cli.PLANTS) == set(Plant)
    assert torch.get_default_dtype() is torch.float32  # which the canaries' scale is made for
