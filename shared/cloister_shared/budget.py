"""Price a private release and the history of many. No I/O: events in, epsilon out.

Accounting is Rényi DP (Mironov 2017; Mironov, Talwar and Zhang 2019 for the sampled Gaussian) as implemented by
Google's dp-accounting, over its default grid of orders. Neighbouring relation: add or remove one unit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from cloister_shared.errors import BudgetExceeded

_LEAST_NOISE, _MOST_NOISE = 0.05, 10_000.0
_COARSE = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0, 256.0)


@dataclass(frozen=True)
class Event:
    """``steps`` Gaussian releases, each on its own Poisson sample of the same rows.

    ``noise_multiplier`` is the noise's standard deviation over the ℓ² sensitivity; ``sample_rate`` is each
    row's chance to enter a step, 1 for a release over all rows.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    purpose: str = "training"


def epsilon(history: Iterable[Event], delta: float) -> float:
    """Epsilon at ``delta`` of everything in ``history`` together; 0 for nothing."""
    return _epsilon(history, delta, _orders())


@cache
def calibrate(sample_rate: float, steps: int, epsilon: float, delta: float, before: tuple[Event, ...] = ()) -> float:
    """The least noise multiplier for which ``before`` and ``steps`` training steps stay within ``epsilon``.

    It is found to one part in ten thousand, and from above: the promise is "never over".

    Raises:
        BudgetExceeded: ``before`` alone is already past epsilon, or next to it.
    """
    from scipy.optimize import brentq

    def over(noise_multiplier: float, orders: tuple[float, ...]) -> float:
        return _epsilon((*before, Event(noise_multiplier, sample_rate, steps)), delta, orders) - epsilon

    if over(_LEAST_NOISE, _COARSE) <= 0:
        return _LEAST_NOISE
    coarse = _COARSE if over(_MOST_NOISE, _COARSE) <= 0 else _orders()
    if (least := over(_MOST_NOISE, coarse)) > 0:
        raise BudgetExceeded(f"Epsilon {epsilon:.3g} cannot be kept: drowned in noise it is {least + epsilon:.3g}.")
    # Few orders are priced quickly and bound epsilon from above; all of them then save the last few per cent.
    enough = float(brentq(over, _LEAST_NOISE, _MOST_NOISE, args=(coarse,), rtol=1e-4))
    orders, least = _orders(), max(_LEAST_NOISE, 0.5 * enough)
    if over(least, orders) <= 0:
        return least
    noise_multiplier = float(brentq(over, least, enough * 1.001, args=(orders,), rtol=1e-4))
    while over(noise_multiplier, orders) > 0:
        noise_multiplier *= 1.0001
    return noise_multiplier


def _epsilon(history: Iterable[Event], delta: float, orders: tuple[float, ...]) -> float:
    from dp_accounting.rdp import compute_epsilon

    total = np.zeros(len(orders))
    for event in history:
        total += event.steps * _curve(event.noise_multiplier, event.sample_rate, orders)
    return float(compute_epsilon(orders, total.tolist(), delta)[0]) if total.any() else 0.0


@cache
def _curve(noise_multiplier: float, sample_rate: float, orders: tuple[float, ...]) -> NDArray[np.float64]:
    """Rényi divergence of one step at each order."""
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
def _orders() -> tuple[float, ...]:
    from dp_accounting.rdp import rdp_privacy_accountant

    return tuple(rdp_privacy_accountant.DEFAULT_RDP_ORDERS)
