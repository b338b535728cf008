"""cloister_shared.tasks.metrics against scikit-learn, and against what must hold of any interval."""

from math import isnan, nan

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    recall_score,
    roc_auc_score,
)

from cloister_shared.outcomes import binary as metrics
from cloister_shared.outcomes import judging
from cloister_shared.outcomes.binary import METRICS, auroc, evaluate, reliability
from cloister_shared.outcomes.judging import Estimate

pytestmark = pytest.mark.filterwarnings("error")  # no metric may print a warning

Array = NDArray[np.float64]
NEED_BOTH_CLASSES = {"auroc", "auprc", "calibration_slope", "sensitivity", "specificity"}
THRESHOLD = 0.5
ORACLES = {
    "auroc": lambda y, p, w: roc_auc_score(y, p, sample_weight=w),
    "auprc": lambda y, p, w: average_precision_score(y, p, sample_weight=w),
    "brier": lambda y, p, w: brier_score_loss(y, p, sample_weight=w, pos_label=1),
    "accuracy": lambda y, p, w: accuracy_score(y, p >= THRESHOLD, sample_weight=w),
    "sensitivity": lambda y, p, w: recall_score(y, p >= THRESHOLD, sample_weight=w),
    "specificity": lambda y, p, w: recall_score(y, p >= THRESHOLD, sample_weight=w, pos_label=0),
}

heavily_tied = st.sampled_from([0.0, 0.25, 0.5, 0.5 + 1e-12, 0.75, 1.0])
any_probability = st.floats(0, 1)


@st.composite
def cases(draw: st.DrawFn, probability: st.SearchStrategy[float] | None = None) -> tuple[Array, Array, Array]:
    """(y [n], p [n], weights [3, n]) with patients of weight 0, and rows that may lack a class."""
    if probability is None:
        probability = draw(st.sampled_from([heavily_tied, any_probability]))
    patients = st.tuples(st.integers(0, 1), probability, *[st.integers(0, 4)] * 3)
    table = np.array(draw(st.lists(patients, min_size=1, max_size=40)), dtype=np.float64)
    weights = table[:, 2:].T
    assume((weights.sum(axis=1) > 0).all())
    return table[:, 0], table[:, 1], weights


def simulated(n: int, seed: int, slope: float = 1.0) -> tuple[Array, Array]:
    """Patients whose true calibration slope is `slope`."""
    generator = np.random.default_rng(seed)
    logit = generator.normal(size=n) * 1.5
    y = (generator.random(n) < 1 / (1 + np.exp(-slope * logit))).astype(np.float64)
    return y, 1 / (1 + np.exp(-logit))


# Each metric against another implementation.


@pytest.mark.parametrize("name", ORACLES)
@given(case=cases())
@settings(deadline=None)
def test_agrees_with_scikit_learn(name: str, case: tuple[Array, Array, Array]) -> None:
    y, p, weights = case
    answers = METRICS[name](y, p, weights)
    assert answers.shape == (3,)
    for row, answer in zip(weights, answers, strict=True):
        drawn = row > 0
        if name in NEED_BOTH_CLASSES and len(set(y[drawn])) < 2:
            assert isnan(answer)
        else:
            assert answer == pytest.approx(ORACLES[name](y[drawn], p[drawn], row[drawn]), abs=1e-9)


@given(case=cases(st.sampled_from([0.0, 1e-3, 0.1, 0.2, 0.5, 0.6, 0.9, 1.0])))
@settings(deadline=None)
def test_calibration_slope_agrees_with_scikit_learn(case: tuple[Array, Array, Array]) -> None:
    y, p, weights = case
    clipped = np.clip(p, 1e-7, 1 - 1e-7)
    logit = np.log(clipped / (1 - clipped))
    for row, slope in zip(weights, METRICS["calibration_slope"](y, p, weights), strict=True):
        positive, negative = logit[(row > 0) & (y == 1)], logit[(row > 0) & (y == 0)]
        if not separated(positive, negative):
            model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-10, max_iter=1000)
            model.fit(logit[:, None], y, sample_weight=row)
            assert slope == pytest.approx(model.coef_[0, 0], rel=1e-3, abs=1e-3)
        else:
            assert isnan(slope)


def separated(positive: Array, negative: Array) -> bool:
    """Whether some cut leaves the classes on its two sides, or on it."""
    cuts = [*positive, *negative]
    return any(
        ((positive >= cut).all() and (negative <= cut).all()) or ((positive <= cut).all() and (negative >= cut).all())
        for cut in cuts
    )


@given(case=cases())
@settings(deadline=None)
def test_fast_auroc_is_the_weighted_one(case: tuple[Array, Array, Array]) -> None:
    y, p, _ = case
    fast = auroc(y, p)
    assert isinstance(fast, float)
    assert fast == pytest.approx(auroc(y, p, np.ones((1, len(y))))[0], abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("bins", [1, 2, 7, 10])
def test_reliability_agrees_with_scikit_learn(bins: int) -> None:
    y, p = simulated(30 * bins, seed=2)
    points = reliability(y, p, bins)
    observed, predicted = calibration_curve(y, p, n_bins=bins, strategy="quantile")
    assert [point[0] for point in points] == pytest.approx(list(predicted), abs=1e-12)
    assert [point[1] for point in points] == pytest.approx(list(observed), abs=1e-12)
    assert [point[2] for point in points] == [30] * bins


@given(case=cases(), bins=st.integers(1, 50))
@settings(deadline=None)
def test_reliability_bins_hold_everyone_once_and_never_split_a_tie(case: tuple[Array, Array, Array], bins: int) -> None:
    y, p, _ = case
    points = reliability(y, p, bins)
    assert 1 <= len(points) <= min(bins, len(set(p)))
    if len(set(p)) == len(p):
        counts = [count for _, _, count in points]
        assert len(points) == min(bins, len(p))
        assert max(counts) - min(counts) <= 1
    left = np.sort(p)
    for mean, observed, count in points:  # ascending, so each bin is the next run of the sorted p
        members, left = left[:count], left[count:]
        chosen = np.isin(p, members)
        assert chosen.sum() == count
        assert (mean, observed) == pytest.approx((p[chosen].mean(), y[chosen].mean()), abs=1e-12)
    assert len(left) == 0


# The calibration slope at its edges.


def test_calibration_slope_finds_the_truth() -> None:
    for truth in (-0.5, 0.5, 1.0, 2.0):
        y, p = simulated(20_000, seed=1, slope=truth)
        assert METRICS["calibration_slope"](y, p, np.ones((1, len(y))))[0] == pytest.approx(truth, abs=0.1)


@pytest.mark.parametrize(
    ("y", "p"),
    [
        ([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9]),  # complete separation
        ([1, 1, 0, 0], [0.1, 0.2, 0.8, 0.9]),  # complete, the wrong way round
        ([0, 0, 1, 1, 0, 1], [0.1, 0.2, 0.8, 0.9, 0.5, 0.5]),  # touching at one value
        ([0, 1, 1, 0], [0.3, 0.3, 0.3, 0.3]),  # one prediction for all
        ([0, 1], [1e-9, 1e-8]),  # equal once clipped
    ],
)
def test_separated_classes_have_no_calibration_slope(y: list[int], p: list[float]) -> None:
    assert evaluate(y, p, resamples=20)["calibration_slope"] == Estimate(None, None, None, len(y))


def test_calibration_slope_where_a_plain_newton_step_overshoots() -> None:
    y = np.array([1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    p = np.array([0.2, 1.0, 0.99, 1.0, 0.1, 0.6, 1.0])
    slope = METRICS["calibration_slope"](y, p, np.ones((1, len(y))))[0]
    clipped = np.clip(p, 1e-7, 1 - 1e-7)
    model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-10, max_iter=1000)
    model.fit(np.log(clipped / (1 - clipped))[:, None], y)
    assert slope == pytest.approx(model.coef_[0, 0], rel=1e-3)


@pytest.mark.parametrize(
    ("y", "p", "expected"),
    [
        ([0, 1, 0, 1], [0.4, 0.5, 0.50000001, 0.500001], nan),  # all but separate: exp overflows on the way
        ([1, 1, 0, 1], [0.0, 0.49999999, 0.5, 0.50000001], nan),  # a row without curvature on the way
        ([0, 1, 1, 0], [0.5, 0.5, 0.500001, 0.500001], 0.0),  # a last step of exactly 0
    ],
)
def test_awkward_calibration_slopes_print_no_warning(y: list[int], p: list[float], expected: float) -> None:
    slope = METRICS["calibration_slope"](np.array(y, float), np.array(p), np.ones((1, len(y))))[0]
    assert slope == pytest.approx(expected, abs=1e-6, nan_ok=True)


# Estimates and intervals.


def test_names() -> None:
    assert list(METRICS) == [*list(ORACLES)[:3], "calibration_slope", *list(ORACLES)[3:]]
    assert list(evaluate(*simulated(30, seed=0), resamples=5)) == list(METRICS)


@pytest.mark.parametrize("outcome", [0, 1])
def test_one_class_is_none_and_not_nan(outcome: int) -> None:
    answers = evaluate([outcome] * 4, [0.1, 0.4, 0.6, 0.9], resamples=50)
    for name, answer in answers.items():
        assert answer.n == 4
        assert (answer.value is None) == (name in NEED_BOTH_CLASSES)
        assert (answer.low is None) == (answer.high is None) == (answer.value is None)
    assert isnan(auroc(np.full(4, float(outcome)), np.array([0.1, 0.4, 0.6, 0.9])))


def test_resamples_of_one_class_are_left_out() -> None:
    # A third of the resamples draw no positive.
    answer = evaluate([0, 0, 0, 0, 1], [0.1, 0.2, 0.3, 0.7, 0.6], resamples=200)["auroc"]
    assert answer.value == 0.75
    assert answer.low is not None
    assert answer.high is not None
    assert 0 <= answer.low < 0.75 < answer.high <= 1


def test_no_patients() -> None:
    assert evaluate([], []) == dict.fromkeys(METRICS, Estimate(None, None, None, 0))
    assert reliability([], []) == []
    assert isnan(auroc(np.array([]), np.array([])))


def test_one_patient() -> None:
    assert evaluate([1], [0.75], resamples=10)["brier"] == Estimate(0.0625, 0.0625, 0.0625, 1)


def test_the_threshold_itself_is_called_positive() -> None:
    y, p = [0, 0, 0, 1, 1], [0.1, 0.3, 0.3, 0.3, 0.9]
    at = {name: answer.value for name, answer in evaluate(y, p, threshold=0.3, resamples=5).items()}
    above = {name: answer.value for name, answer in evaluate(y, p, threshold=0.31, resamples=5).items()}
    assert (at["accuracy"], at["sensitivity"], at["specificity"]) == (0.6, 1.0, 1 / 3)
    assert (above["accuracy"], above["sensitivity"], above["specificity"]) == (0.8, 0.5, 1.0)


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_accuracy_interval_is_the_binomial_one(level: float) -> None:
    y, p = simulated(100, seed=3)
    answer = evaluate(y, p, level=level, resamples=10_000)["accuracy"]
    expected = binom.ppf([(1 - level) / 2, (1 + level) / 2], 100, answer.value) / 100
    assert [answer.low, answer.high] == pytest.approx(list(expected), abs=0.0101)


def test_auroc_interval_is_that_of_resampled_patients() -> None:
    y, p = simulated(100, seed=4)
    generator = np.random.default_rng(9)
    rows = [generator.integers(100, size=100) for _ in range(1000)]
    expected = np.percentile([roc_auc_score(y[row], p[row]) for row in rows], [2.5, 97.5])
    answer = evaluate(y, p)["auroc"]
    assert [answer.low, answer.high] == pytest.approx(list(expected), abs=0.015)


def test_accuracy_interval_covers_the_truth() -> None:
    truth, trials, covered = 0.8, 200, 0
    generator = np.random.default_rng(12)
    for trial in range(trials):
        right = generator.random(200) < truth
        y = generator.integers(2, size=200)
        answer = evaluate(y, np.where(right, y, 1 - y), resamples=300, seed=trial)["accuracy"]
        assert answer.low is not None
        assert answer.high is not None
        covered += answer.low <= truth <= answer.high
    assert 0.88 <= covered / trials <= 0.99


def test_the_seed_decides_the_interval() -> None:
    y, p = simulated(60, seed=5)
    assert evaluate(y, p, seed=1) == evaluate(y, p, seed=1) == evaluate(y, p, seed=np.random.default_rng(1))
    assert evaluate(y, p, seed=1)["auroc"] != evaluate(y, p, seed=2)["auroc"]
    generator = np.random.default_rng(1)
    assert evaluate(y, p, seed=generator)["auroc"] != evaluate(y, p, seed=generator)["auroc"]


def test_the_order_of_the_patients_decides_nothing() -> None:
    y, p = simulated(60, seed=6)
    p = p.round(1)
    assert evaluate(y, p) == evaluate(y[::-1], p[::-1])


def test_the_block_size_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    y, p = simulated(60, seed=7)
    whole = evaluate(y, p, resamples=100)
    monkeypatch.setattr(judging, "CELLS", 60 * 7)
    for name, answer in evaluate(y, p, resamples=100).items():
        assert [answer.value, answer.low, answer.high] == pytest.approx(
            [whole[name].value, whole[name].low, whole[name].high], abs=1e-9
        )


def test_the_callers_arrays_are_left_alone() -> None:
    y, p = simulated(30, seed=8)
    before = y.copy(), p.copy()
    evaluate(y, p, resamples=5)
    reliability(y, p)
    auroc(y, p)
    assert (y == before[0]).all()
    assert (p == before[1]).all()


def test_estimate_in_words() -> None:
    assert str(Estimate(0.9434, 0.9111, 0.9678, 50)) == "0.943 (0.911 to 0.968)"
    assert str(Estimate(0.5, None, None, 2)) == "0.500 (interval not estimable)"
    assert str(Estimate(None, None, None, 0)) == "not estimable"


# Refused arguments.


@pytest.mark.parametrize(
    ("y", "p", "sentence"),
    [
        ([0, 1], [0.7321], "same length"),
        ([[0, 1]], [[0.7321, 0.5]], "same length"),
        (1, 0.7321, "same length"),
        ([0, 7321], [0.5, 0.5], "outcome to be 0 or 1"),
        ([0, nan], [0.5, 0.7321], "outcome to be 0 or 1"),
        ([0, 1], [0.5, 1.7321], "from 0 to 1"),
        ([0, 1], [0.5, -0.7321], "from 0 to 1"),
        ([0, 1], [0.7321, nan], "from 0 to 1"),
        ([0, 1], [0.7321, float("inf")], "from 0 to 1"),
        ([0, 1], ["0.7321", "0.5"], "list of numbers"),
        ([0, 1], [0.7321, None], "list of numbers"),
        ([0, 1], [[0.7321], [0.5, 0.5]], "list of numbers"),
        ([0, 1], [0.7321j, 0.5], "list of numbers"),
    ],
)
def test_bad_data_is_refused_without_repeating_it(y: object, p: object, sentence: str) -> None:
    for refuse in (evaluate, reliability, auroc):
        with pytest.raises(ValueError, match=sentence) as caught:
            refuse(y, p)  # type: ignore[call-overload]
        assert "7321" not in str(caught.value)
        assert caught.value.__context__ is None or caught.value.__suppress_context__


@pytest.mark.parametrize(
    "bad", [{"threshold": 1.5}, {"threshold": nan}, {"level": 1.0}, {"level": 0.0}, {"resamples": 0}]
)
def test_bad_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        evaluate([0, 1], [0.2, 0.7], **bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one bin"):
        reliability([0, 1], [0.2, 0.7], bins=0)


# --- from counts -------------------------------------------------------------------------------------------
def test_metrics_of_counts_are_those_of_the_patients_in_the_middle_of_their_bins():
    ill, well = np.array([1.0, 0.0, 2.0, 3.0]), np.array([4.0, 2.0, 1.0, 0.0])
    middles = np.array([0.125, 0.375, 0.625, 0.875])
    p = np.concatenate([np.repeat(middles, ill.astype(int)), np.repeat(middles, well.astype(int))])
    y = np.repeat([1.0, 0.0], [int(ill.sum()), int(well.sum())])
    of_each = metrics.evaluate(y, p, threshold=0.4, resamples=1)
    found = metrics.of_counts(ill, well, threshold=0.4)
    assert found == pytest.approx({name: estimate.value for name, estimate in of_each.items()})


def test_counts_of_one_outcome_cannot_say_how_well_both_are_told_apart():
    found = metrics.of_counts(np.array([0.0, 5.0]), np.zeros(2))
    assert (found["auroc"], found["specificity"]) == (None, None)
    assert found["brier"] == pytest.approx(0.0625)
    assert set(metrics.of_counts(np.zeros(2), np.zeros(2)).values()) == {None}
