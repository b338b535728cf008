"""Lower bounds on epsilon from what was observed. Each holds with 95 % confidence over the run's noise and draws.

They are of the whole claimed run, for add or remove one record, at the delta given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from cloister_shared.budget import Event
from cloister_simulations.audit.canaries import Observed

RISK = 0.05
"""Chance that a bound is above the truth, however many numbers it is made of."""
_SHIFT_RISK, _RATE_RISK, _SPREAD_RISK = 0.8 * RISK, 0.18 * RISK, 0.02 * RISK
"""How the three numbers of a step share it (union bound): most to the one that is known least."""
_GUESSED = (0.05, 0.1, 0.2, 0.4)
"""Shares of the coins that the one-run audit guesses, surest first; it takes the best and pays for all four."""


@cache
def tight_epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """Epsilon of a Poisson-sampled Gaussian by its privacy loss distribution (dp-accounting; Doroshenko et al. 2022).

    Numerically exact to about 0.001; the platform's own price, by Rényi DP, is some 8 % to 20 % above it.
    """
    from dp_accounting.pld import privacy_loss_distribution

    step = privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier, value_discretization_interval=1e-3, sampling_prob=sample_rate
    )
    return float(step.self_compose(steps).get_epsilon_for_delta(delta))


@dataclass(frozen=True)
class StepBound:
    """One step as seen through its canaries, the three numbers each at its worst for the attacker."""

    shift: float
    """A record moves the sum along its direction by so much at least, in clip bounds."""
    spread: float
    """Standard deviation of the noise at most, in clip bounds."""
    rate: float
    """A row's chance to be drawn, at least."""
    epsilon: float


def per_step(observed: Observed, delta: float) -> StepBound:
    """Nasr et al. 2023: bound one step's Gaussians from many canaries and steps, then compose over the whole run.

    Student's interval for the shift, a chi-square one for the noise, Clopper and Pearson's for the draws. It takes
    for granted that noise is normal and independent and that draws are Poisson's, which ``conformance`` tests.
    """
    shift, spread, n_in, n_out = measured(observed)
    free = n_in + n_out - 2
    least = shift - float(stats.t.isf(_SHIFT_RISK, free)) * spread * math.sqrt(1 / n_in + 1 / n_out)
    most = spread * math.sqrt(free / float(stats.chi2.ppf(_SPREAD_RISK, free)))
    drawn, trials = int((observed.counts > 0).sum()), observed.counts.size
    rate = float(stats.beta.ppf(_RATE_RISK, drawn, trials - drawn + 1)) if drawn else 0.0
    sees = least > 0 and rate > 0
    epsilon = tight_epsilon(most / least, rate, observed.event.steps, delta) if sees else 0.0
    return StepBound(least, most, rate, epsilon)


def measured(observed: Observed) -> tuple[float, float, int, int]:
    """Mean shift by a record that is drawn, standard deviation about it, and how many sums were with and without."""
    parts = observed.sums[observed.drawn], observed.sums[~observed.drawn]
    inside, outside = (float(part.mean(dtype=np.float64)) for part in parts)
    squares = sum(
        float(np.square(part - mean, dtype=np.float64).sum())
        for part, mean in zip(parts, (inside, outside), strict=True)
    )
    return inside - outside, math.sqrt(squares / (observed.sums.size - 2)), len(parts[0]), len(parts[1])


def known_batches(
    full: list[NDArray[np.int64]], less: list[NDArray[np.int64]], step: StepBound, delta: float
) -> float | None:
    """The bound where batch sizes are no secret: the same in every run, and others with one row less.

    Where all rows pull in one direction, the released sums are then two known sequences plus noise, and no
    sampling hides the row: a Gaussian mechanism whose shift is the distance of the sequences. None where sizes are
    drawn. (That fixed-size batches are not Poisson: Chua et al. 2024.)
    """
    if any((sizes != same[0]).any() for same in (full, less) for sizes in same):
        return None
    shift = float(np.linalg.norm(full[0] - less[0])) * step.shift
    return tight_epsilon(step.spread / shift, 1.0, 1, delta) if shift > 0 else 0.0


def one_run(observed: Observed, delta: float) -> float:
    """Steinke, Nasr and Jagielski 2023, theorem 5.2: guess from the final model alone which canaries were rows.

    Looser than ``per_step`` and free of its assumptions, but for the coins that chose the rows.
    """
    coins = slice(1, observed.coins)
    score, truth = observed.final[coins], observed.member[coins]
    ranked = truth[np.argsort(score)]
    best = 0.0
    for share in _GUESSED:
        half = int(share * len(ranked) / 2)
        right = int(ranked[len(ranked) - half :].sum() + (~ranked[:half]).sum())
        best = max(best, _guesses(len(ranked), 2 * half, right, delta, RISK / len(_GUESSED)))
    return best


def _guesses(coins: int, guesses: int, right: int, delta: float, risk: float) -> float:
    """The largest epsilon under which so many right guesses have a chance of at most ``risk``; 0 if none has."""

    def chance(epsilon: float) -> float:
        law = stats.binom(guesses, 1 / (1 + math.exp(-epsilon)))
        near = np.cumsum(law.pmf(right - np.arange(1, right + 1))) / np.arange(1, right + 1)
        return float(law.sf(right - 1)) + 2 * coins * delta * float(near.max(initial=0.0))

    low, high = 0.0, 50.0
    if not guesses or chance(low) > risk:
        return 0.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if chance(middle) <= risk else (low, middle)
    return low


def spent(event: Event, delta: float) -> float:
    """What the whole claimed run may release by exact accounting."""
    return tight_epsilon(event.noise_multiplier, event.sample_rate, event.steps, delta)
