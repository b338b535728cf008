"""How the hospitals' updates become the next model. Pure functions on flat float32 vectors.

A strategy is ``(model, mean update, state, terms) -> (model, state)``; its state is named vectors that the
checkpoint keeps. A robust rule turns all updates into one, and so needs to see each of them: only for studies
without secure sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.floating[Any]]  # float32 in practice; numpy's stubs lose that in arithmetic
State = dict[str, Vector]
Strategy = Callable[[Vector, Vector, State, Any], tuple[Vector, State]]
RobustRule = Callable[[Sequence[Vector], Any], Vector]


def fedavg(model: Vector, update: Vector, state: State, terms: Any) -> tuple[Vector, State]:
    """McMahan et al. 2017 (and FedProx, whose difference is local). Works in place of ``update``."""
    update *= np.float32(terms.server_learning_rate)
    update += model
    return update, state


def fedavgm(model: Vector, update: Vector, state: State, terms: Any) -> tuple[Vector, State]:
    """Hsu et al. 2019: momentum at the coordinator."""
    momentum = update + np.float32(terms.momentum) * state.get("momentum", np.zeros_like(model))
    return model + np.float32(terms.server_learning_rate) * momentum, {"momentum": momentum}


def fedadam(model: Vector, update: Vector, state: State, terms: Any) -> tuple[Vector, State]:
    """Reddi et al. 2021, algorithm 2: v <- b2 v + (1 - b2) d^2."""
    beta2 = np.float32(terms.beta2)
    second = beta2 * state.get("second", np.zeros_like(model)) + (1 - beta2) * update**2
    return _adaptive(model, update, second, state, terms)


def fedadam_without_noise(
    model: Vector, update: Vector, state: State, terms: Any, variance: float
) -> tuple[Vector, State]:
    """DP-AdamBC (Tang et al. 2024, algorithm 1), for updates that carry noise of this ``variance`` in each parameter.

    Under DP the noise is most of the second moment, so that plain Adam divides every parameter by nearly the same
    number. Unlike Reddi's Adam both moments are first rid of their start at zero, or the noise's share of the
    second would not be known; ``count`` is the weight that they have gathered, 1 - b1^t and 1 - b2^t.
    """
    beta1, beta2 = terms.beta1, terms.beta2
    first = np.float32(beta1) * state.get("first", np.zeros_like(model)) + np.float32(1 - beta1) * update
    second = np.float32(beta2) * state.get("second", np.zeros_like(model)) + np.float32(1 - beta2) * update**2
    count = np.array([beta1, beta2]) * state.get("count", np.zeros(2)) + (1 - np.array([beta1, beta2]))
    signal = corrected(second / np.float32(count[1]), variance, terms.tau)
    step = first / (np.float32(count[0]) * np.sqrt(signal))
    state = {"first": first, "second": second, "count": count.astype(np.float32)}
    return model + np.float32(terms.server_learning_rate) * step, state


def corrected(second: Vector, variance: float, tau: float) -> Vector:
    """The mean square of an update without its noise: ``second`` less the noise's ``variance``, at least tau^2."""
    return np.maximum(second - np.float32(variance), np.float32(tau) ** 2)


def update_variance(spread: float, learning_rate: float, batch_size: float, hospitals: int) -> float:
    """Variance of the noise in each parameter of the mean update, after one local step under shared noise.

    ``spread`` is the noise's standard deviation in the sum over ``hospitals`` of clipped gradients; what the sum is
    divided by is the plan's hospitals * batch_size, whatever was drawn.
    """
    return (learning_rate * spread / (hospitals * batch_size)) ** 2


def averaged(average: Vector | None, model: Vector, number: int, decay: float) -> Vector:
    """The mean of the models of rounds 1 to ``number``, each counting ``decay`` times as much as the next.

    From the mean before round ``number`` (None at the first): a running mean whose weights sum to 1 in every round,
    so that the untrained model has no part in it (as Adam's moments are corrected, Kingma and Ba 2015).
    """
    if average is None:
        return model.copy()
    return average + np.float32((1 - decay) / (1 - decay**number)) * (model - average)


def fedyogi(model: Vector, update: Vector, state: State, terms: Any) -> tuple[Vector, State]:
    """Reddi et al. 2021, algorithm 2: v <- v - (1 - b2) d^2 sign(v - d^2)."""
    square = update**2
    old = state.get("second", np.zeros_like(model))
    second = old - np.float32(1 - terms.beta2) * square * np.sign(old - square)
    return _adaptive(model, update, second, state, terms)


def fedadagrad(model: Vector, update: Vector, state: State, terms: Any) -> tuple[Vector, State]:
    """Reddi et al. 2021, algorithm 2: v <- v + d^2."""
    second = state.get("second", np.zeros_like(model)) + update**2
    return _adaptive(model, update, second, state, terms)


def scaffold(model: Vector, update: Vector, state: State, terms: Any) -> tuple[Vector, State]:
    """Karimireddy et al. 2020: the model moves by the mean update; ``rounds`` adds the mean control change."""
    return fedavg(model, update, state, terms)


def _adaptive(model: Vector, update: Vector, second: Vector, state: State, terms: Any) -> tuple[Vector, State]:
    beta1 = np.float32(terms.beta1)
    first = beta1 * state.get("first", np.zeros_like(model)) + (1 - beta1) * update
    step = first / (np.sqrt(second) + np.float32(terms.tau))
    return model + np.float32(terms.server_learning_rate) * step, {"first": first, "second": second}


def trimmed_mean(updates: Sequence[Vector], terms: Any) -> Vector:
    """Yin et al. 2018: each coordinate's mean without its ``trim`` largest and smallest values."""
    return np.sort(np.stack(updates), axis=0)[terms.trim : len(updates) - terms.trim].mean(axis=0)


def median(updates: Sequence[Vector], terms: Any) -> Vector:
    """Yin et al. 2018: each coordinate's median."""
    return np.median(np.stack(updates), axis=0).astype(np.float32)


def krum(updates: Sequence[Vector], terms: Any) -> Vector:
    """Blanchard et al. 2017: the update with the least distance to its n - hostile - 2 nearest neighbours."""
    distances = np.array([[float(np.sum((a - b) ** 2)) for b in updates] for a in updates])
    nearest = np.sort(distances, axis=1)[:, 1 : len(updates) - terms.hostile - 1]
    return updates[int(nearest.sum(axis=1).argmin())].copy()


STRATEGIES: dict[str, Strategy] = {
    "fedavg": fedavg,
    "fedprox": fedavg,
    "fedavgm": fedavgm,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
    "fedadagrad": fedadagrad,
    "scaffold": scaffold,
}

ROBUST_RULES: dict[str, RobustRule] = {"trimmed-mean": trimmed_mean, "median": median, "krum": krum}
