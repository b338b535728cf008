"""Whether the mechanism does what its event says, line by line. Each fails by chance once in 10,000 audits at most."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from cloister_simulations.audit.bounds import measured
from cloister_simulations.audit.canaries import Observed

CHANCE = 1e-4
_MARGIN = 0.02
_PAIRED = 1000
"""Canaries whose noises are compared with each other; of all, the table would not fit a small memory."""


@dataclass(frozen=True)
class Check:
    """A line of the audit. ``said`` is the sentence for when it does not hold."""

    name: str
    bar: str
    found: str
    holds: bool
    said: str
    sampling: bool = False
    """Whether it is of the draws: where one fails, no bound that composes Poisson steps means anything."""


def checks(observed: Observed, refused: bool) -> Iterator[Check]:
    """Every line; ``refused`` says whether the client refused a model with BatchNorm."""
    yield from _clipping(observed)
    yield from _noise(observed)
    yield from _draws(observed)
    moved = observed.moved
    yield Check(
        "state without noise",
        "none moves",
        moved[0] if moved else "none moves",
        not moved,
        f"The model's {moved[0] if moved else 'state'} moved in training with no noise, and would leave with it.",
    )
    yield Check(
        "model with BatchNorm",
        "refused",
        "refused" if refused else "taken",
        refused,
        "A model with BatchNorm was not refused: its running statistics are of raw rows.",
    )


def _clipping(observed: Observed) -> Iterator[Check]:
    shift, spread, n_in, n_out = measured(observed)
    margin = float(stats.norm.isf(CHANCE / 2)) * spread * math.sqrt(1 / n_in + 1 / n_out)
    yield Check(
        "canary before clipping",
        "10 C or more",
        f"{observed.reach:.1e} C",
        observed.reach >= 10,
        f"A canary's gradient fell to {observed.reach:.2g} clip bounds before clipping: the audit sees too little.",
    )
    yield Check(
        "one record in the sum",
        "1 C",
        f"{shift:.3f} ± {margin:.3f} C",
        abs(shift - 1) <= margin,
        f"One record moves the sum by {shift:.2f} clip bounds, where the event allows 1.",
    )


def _noise(observed: Observed) -> Iterator[Check]:
    claimed = observed.event.noise_multiplier
    shift, spread, n_in, n_out = measured(observed)
    ratio, free = spread / claimed, n_in + n_out - 2
    yield Check(
        "noise, sd over claimed",
        f"1 ± {_MARGIN}",
        f"{ratio:.4f}",
        abs(ratio - 1) <= _MARGIN,
        f"The noise has {ratio:.3f} of the standard deviation that the event claims.",
    )
    noise = observed.sums - np.float32(shift) * observed.drawn
    statistic = free * ratio**2
    p_values = {
        "noise, chi-square": (
            2 * min(float(stats.chi2.cdf(statistic, free)), float(stats.chi2.sf(statistic, free))),
            f"The noise's variance is {ratio**2:.4f} of the claimed, more than chance explains.",
        ),
        "noise, normal (Kolmogorov)": (
            float(stats.kstest(noise.ravel()[:: max(1, noise.size // 100_000)] / spread, "norm").pvalue),
            "The noise is not normal.",
        ),
        "noise, step and step": (_most_alike(noise), "Two steps have noise in common."),
        "noise, canary and canary": (_most_alike(noise.T[:_PAIRED]), "Two canaries' directions have noise in common."),
    }
    for name, (p, said) in p_values.items():
        yield _likely(name, p, said)


def _draws(observed: Observed) -> Iterator[Check]:
    """A coin of its own for every row and step: the rate, then every way in which fixed batches differ."""
    rate, drawn = observed.event.sample_rate, observed.counts > 0
    steps, rows = drawn.shape
    variance = rate * (1 - rate)
    twice = int((observed.counts > 1).sum())
    yield Check(
        "row twice in a batch",
        "never",
        f"{twice} times" if twice else "never",
        twice == 0,
        f"A row was twice in one batch, {twice} times.",
        sampling=True,
    )
    sizes, totals = drawn.sum(axis=1), drawn.sum(axis=0)
    again = float((drawn[1:] & drawn[:-1]).sum())
    count = (steps - 1) * rows
    spread = math.sqrt(count * rate**2 * (1 - rate**2) + 2 * (steps - 2) * rows * rate**3 * (1 - rate))
    apart = abs(again - count * rate**2) / spread if spread else 0.0
    p_values = {
        "draws, rate": (
            2 * float(stats.norm.sf(abs(int(drawn.sum()) - drawn.size * rate) / math.sqrt(drawn.size * variance))),
            f"A row is drawn with chance {drawn.mean():.4f}, where the event says {rate:.4f}.",
        ),
        "draws, size of batches": (
            _dispersion(sizes, rows * rate, rows * variance),
            f"Batches of {sizes.min()} to {sizes.max()} rows are no Poisson draws: sizes should vary by"
            f" ± {math.sqrt(rows * variance):.1f}.",
        ),
        "draws, how often each row": (
            _dispersion(totals, steps * rate, steps * variance),
            f"Each row was drawn {totals.min()} to {totals.max()} times in {steps} steps, not as coins of their own"
            " would have it.",
        ),
        "draws, step after step": (
            2 * float(stats.norm.sf(apart)),
            f"Rows drawn twice in a row: {again:.0f}, where independent steps would give {count * rate**2:.0f}.",
        ),
    }
    for name, (p, said) in p_values.items():
        yield _likely(name, p, said, sampling=True)


def _likely(name: str, p: float, said: str, sampling: bool = False) -> Check:
    return Check(name, f"p over {CHANCE:g}", f"p = {min(p, 1):.2g}", p >= CHANCE, said, sampling)


def _dispersion(counts: NDArray[np.int64], mean: float, variance: float) -> float:
    """Two-sided p-value of counts that vary more or less than binomial ones."""
    statistic = float(((counts - mean) ** 2).sum() / variance)
    return 2 * min(float(stats.chi2.cdf(statistic, len(counts))), float(stats.chi2.sf(statistic, len(counts))))


def _most_alike(noise: NDArray[np.float32]) -> float:
    """P-value of the strongest correlation between two rows of a matrix, corrected for the number of pairs."""
    pairs, free = len(noise) * (len(noise) - 1) // 2, noise.shape[1] - 2
    centred = noise - noise.mean(axis=1, keepdims=True)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    alike = np.abs(unit @ unit.T)
    np.fill_diagonal(alike, 0.0)
    r = min(float(alike.max()), 1 - 1e-7)
    return min(1.0, pairs * 2 * float(stats.t.sf(r * math.sqrt(free / (1 - r * r)), free)))
