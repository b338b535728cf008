"""Price a private release and the history of many, and say what a ceiling still admits. No I/O.

Accounting is Rényi DP (Mironov 2017; Mironov, Talwar and Zhang 2019 for the sampled Gaussian) as implemented by
Google's dp-accounting, over a fixed grid of orders. Neighbouring relation: add or remove one unit.

What a history came to is its epsilon over the whole grid. Whether one more study may run is another question: it
may be chosen after the results of the others were seen, and run beside them. That is decided at one order, which
is fixed before anything is released (``order_of``): only of a fixed order is a Rényi filter known to hold for such
studies (Feldman and Zrnic 2021; Haney et al. 2023 for concurrent ones).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from cloister_shared.errors import BudgetExceeded

ORDERS: tuple[float, ...] = (
    *(1 + x / 10 for x in range(1, 100)),
    *map(float, range(11, 64)),
    128.0,
    256.0,
    512.0,
    1024.0,
)
"""The grid of Rényi orders: dp-accounting's own, written down so that no release of it changes a ledger."""

_LEAST_NOISE, _MOST_NOISE = 0.05, 10_000.0
_STEP = 1e-3
"""Of the privacy losses that are told apart; its rounding adds 0.01 to epsilon 10 of 30,000 steps."""

_MOST_POINTS = 400_000
_COARSE = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 63.0, 256.0)
"""Some of ``ORDERS``: an order of its own would be under the bound that all of them make."""


@dataclass(frozen=True)
class Event:
    """``steps`` Gaussian releases, each on its own Poisson sample of the same rows.

    ``noise_multiplier`` is the noise's standard deviation over the ℓ² sensitivity; ``sample_rate`` is each
    row's chance to enter a step, 1 for a release over all rows.

    The unit is one patient. ``records`` is the most records of one patient that the mechanism draws and clips on
    their own; it is 1 where patients are drawn and clipped whole, however many records each has.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    purpose: str = "training"
    records: int = 1


def merged(history: Iterable[Event]) -> list[Event]:
    """The same history with one event for each mechanism and purpose, in an order that its own does not change."""
    steps = Counter[Event]()
    for event in history:
        steps[replace(event, steps=0)] += event.steps
    every = [replace(event, steps=count) for event, count in steps.items() if count]
    return sorted(every, key=lambda e: (e.purpose, e.noise_multiplier, e.sample_rate, e.records))


def unspent(events: Iterable[Event], spent: Iterable[Event]) -> list[Event]:
    """What of ``events`` is left after ``spent``, mechanism by mechanism."""
    gone = {replace(event, steps=0): event.steps for event in merged(spent)}
    rest = (replace(e, steps=e.steps - gone.get(replace(e, steps=0), 0)) for e in merged(events))
    return [event for event in rest if event.steps > 0]


def covers(events: Iterable[Event], spent: Iterable[Event]) -> bool:
    """Whether ``events`` hold all that was spent, mechanism by mechanism."""
    most = {replace(event, steps=0): event.steps for event in merged(events)}
    return all(event.steps <= most.get(replace(event, steps=0), 0) for event in merged(spent))


def epsilon(history: Iterable[Event], delta: float) -> float:
    """Epsilon at ``delta`` of everything in ``history`` together; 0 for nothing."""
    return _epsilon(history, delta, ORDERS)


@cache
def calibrate(
    sample_rate: float,
    steps: int,
    epsilon: float,
    delta: float,
    before: tuple[Event, ...] = (),
    records: int = 1,
) -> float:
    """The least noise multiplier for which ``before`` and ``steps`` training steps stay within ``epsilon``.

    It is found to one part in ten thousand, and from above: the promise is "never over".

    Raises:
        BudgetExceeded: ``before`` alone is already past epsilon, or next to it.
    """
    from scipy.optimize import brentq

    def over(noise_multiplier: float, orders: tuple[float, ...]) -> float:
        return (
            _epsilon((*before, Event(noise_multiplier, sample_rate, steps, records=records)), delta, orders) - epsilon
        )

    if over(_LEAST_NOISE, _COARSE) <= 0:
        return _LEAST_NOISE
    coarse = _COARSE if over(_MOST_NOISE, _COARSE) <= 0 else ORDERS
    if (least := over(_MOST_NOISE, coarse)) > 0:
        raise BudgetExceeded(f"Epsilon {epsilon:.3g} cannot be kept: drowned in noise it is {least + epsilon:.3g}.")
    # Few orders are priced quickly and bound epsilon from above; all of them then save the last few per cent.
    enough = float(brentq(over, _LEAST_NOISE, _MOST_NOISE, args=(coarse,), rtol=1e-4))
    orders, least = ORDERS, max(_LEAST_NOISE, 0.5 * enough)
    if over(least, orders) <= 0:
        return least
    noise_multiplier = float(brentq(over, least, enough * 1.001, args=(orders,), rtol=1e-4))
    while over(noise_multiplier, orders) > 0:
        noise_multiplier *= 1.0001
    return noise_multiplier


# --- the filter --------------------------------------------------------------------------------------------
def order_of(epsilon: float, delta: float, first: Iterable[Event] = ()) -> float:
    """The order at which a ceiling is kept; it has to be fixed before the first release under that ceiling.

    It is where the ceiling admits the largest multiple of ``first``, so that a plan which any order admits is
    admitted; without it, of a Gaussian mechanism, which many studies together come close to.
    """
    likely = merged(first) or [Event(1.0, 1.0, 1)]
    cost = sum((event.steps * curve(event) for event in likely), np.zeros(len(ORDERS)))
    rooms = np.array([room(epsilon, delta, order) for order in ORDERS])
    return ORDERS[int(np.argmax(rooms / cost))]


def room(epsilon: float, delta: float, order: float) -> float:
    """The Rényi divergence that a ceiling admits at an order; negative where it can never be kept there."""
    return epsilon - _conversion(order, delta)


def spending(history: Iterable[Event], order: float) -> float:
    """Rényi divergence of a history at one order; the same to the last bit whatever the order of its events."""
    return math.fsum(event.steps * float(curve(event, (order,))[0]) for event in merged(history))


def fits(history: Iterable[Event], epsilon: float, delta: float, order: float) -> bool:
    """The filter: whether a whole history, however its studies were chosen, is within a ceiling kept at ``order``."""
    return spending(history, order) <= room(epsilon, delta, order)


def left(history: Iterable[Event], epsilon: float, delta: float, order: float) -> float:
    """Epsilon at ``delta``, by itself, of the largest Gaussian study that a ceiling admits after a history."""
    rest = room(epsilon, delta, order) - spending(history, order)
    return _epsilon([Event(math.sqrt(order / (2 * rest)), 1.0, 1)], delta, ORDERS) if rest > 0 else 0.0


def quieter(
    asked: Iterable[Event], history: Iterable[Event], epsilon: float, delta: float, order: float
) -> list[Event]:
    """The events asked for with as much more noise as a ceiling needs to admit them; none where no noise would do."""
    rest = room(epsilon, delta, order) - spending(history, order)

    def louder(by: float) -> list[Event]:
        return [replace(event, noise_multiplier=event.noise_multiplier * by) for event in merged(asked)]

    low, high = 1.0, 1.0
    while spending(louder(high), order) > rest:
        low, high = high, 2 * high
        if high > _MOST_NOISE:
            return []
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if spending(louder(middle), order) <= rest else (middle, high)
    return louder(high)


def pld_epsilon(history: Iterable[Event], delta: float, step: float = _STEP) -> float:
    """Epsilon at ``delta`` by privacy loss distributions, rounded up: tighter, for a history fixed in advance.

    For information only. It licenses nothing where a study was chosen after another's results: "the natural
    f-DP filter is fundamentally invalid" (Tran et al. 2026, arXiv 2602.06756). With ``records`` it is the exact
    mixture of Gaussians (Choquette-Choo et al. 2024). A coarser ``step`` of the losses is quicker, and only ever
    rounds further up.
    """
    import dp_accounting
    from dp_accounting.pld import privacy_loss_distribution as pld

    total = pld.identity(value_discretization_interval=step)
    for event in merged(history):
        if event.records == 1 or event.sample_rate == 1:  # all of a patient's records at once are one longer step
            one = pld.from_gaussian_mechanism(
                event.noise_multiplier / event.records,
                value_discretization_interval=step,
                sampling_prob=event.sample_rate,
                neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
            )
        else:
            one = pld.from_mixture_gaussian_mechanism(
                event.noise_multiplier,
                list(range(event.records + 1)),
                _drawn(event.records, event.sample_rate).tolist(),
                value_discretization_interval=step,
            )
        total = total.compose(one.self_compose(event.steps))
    return float(total.get_epsilon_for_delta(delta))


# --- curves ------------------------------------------------------------------------------------------------
def curve(event: Event, orders: tuple[float, ...] = ORDERS) -> NDArray[np.float64]:
    """Rényi divergence of ONE step of an event at each order; infinite where it cannot be computed."""
    return _curve(event.noise_multiplier, event.sample_rate, orders, event.records)


def epsilon_of(divergence: NDArray[np.float64], delta: float, orders: tuple[float, ...] = ORDERS) -> float:
    """Epsilon at ``delta`` of a whole curve, one divergence an order."""
    from dp_accounting.rdp import compute_epsilon

    return float(compute_epsilon(orders, divergence.tolist(), delta)[0]) if divergence.any() else 0.0


def _epsilon(history: Iterable[Event], delta: float, orders: tuple[float, ...]) -> float:
    total = np.zeros(len(orders))
    for event in merged(history):
        total += event.steps * curve(event, orders)
    return epsilon_of(total, delta, orders)


def _conversion(order: float, delta: float) -> float:
    """What to add to a divergence at ``order`` for epsilon at ``delta`` (Canonne et al. 2020, proposition 12)."""
    return math.log1p(-1 / order) - math.log(delta * order) / (order - 1)


@cache
def _curve(
    noise_multiplier: float, sample_rate: float, orders: tuple[float, ...], records: int = 1
) -> NDArray[np.float64]:
    if records > 1:
        return np.array([_mixture(noise_multiplier, sample_rate, records, order) for order in orders])
    import dp_accounting
    from absl import logging
    from dp_accounting import rdp

    # At large noise the lowest orders do not converge; dp-accounting leaves them out (safe) and warns each time.
    logging.set_verbosity(logging.ERROR)
    accountant = rdp.RdpAccountant(orders, dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    step = dp_accounting.GaussianDpEvent(noise_multiplier)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(sample_rate, step))
    # The curve has no public name; test_budget holds it against the public epsilon.
    return np.asarray(accountant._rdp)  # pyright: ignore[reportPrivateUsage, reportUnknownArgumentType]


@cache
def _mixture(spread: float, rate: float, records: int, order: float) -> float:
    """Divergence at ``order`` of one step that draws and clips each of a patient's ``records`` on its own.

    With the patient the sum moves by i clip norms for i ~ Binomial(records, rate), at worst all one way; so it is
    the larger divergence between M = sum_i P(i) N(i, spread^2) and N(0, spread^2), which dominate the pair
    (Choquette-Choo et al. 2024). Integrated by the trapezoid rule, whose error for functions that are analytic
    within ``reach`` of the real line falls as exp(-2 pi reach / step) (Trefethen and Weideman 2014).
    """
    from scipy.special import logsumexp

    reach = math.pi * spread**2 / records  # M has no zero nearer to the real line
    narrow = spread / math.sqrt(1 + order * (records / (2 * spread)) ** 2)  # no peak of either integrand is narrower
    step = min(spread / 6, reach / 3, narrow / 4)
    low, high = -12 * spread - order * records, order * records + 12 * spread
    points = int((high - low) / step) + 1
    if points > _MOST_POINTS:
        return math.inf
    x = np.linspace(low, high, points)
    shift = np.arange(records + 1)
    with np.errstate(divide="ignore"):  # rate 1: all records or nothing, and log 0 is what is meant
        weights = np.log(_drawn(records, rate))
    ratio = np.asarray(logsumexp(weights + (np.outer(x, shift) - shift**2 / 2) / spread**2, axis=1))  # log M / N
    normal = -(x**2) / (2 * spread**2) - math.log(spread * math.sqrt(2 * math.pi))
    width = math.log((high - low) / (points - 1))
    both = (float(logsumexp(normal + power * ratio)) + width for power in (order, 1 - order))
    # Rounding in sums of so many points is far below this part in 10^9, which keeps the figure an upper bound.
    return max(0.0, max(both) / (order - 1)) * (1 + 1e-9) + 1e-12


def _drawn(records: int, rate: float) -> NDArray[np.float64]:
    """Chance that 0, 1, ... of a patient's records are drawn."""
    from scipy.stats import binom

    return np.asarray(binom.pmf(np.arange(records + 1), records, rate))
