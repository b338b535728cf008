"""Randomness that privacy rests on, against the quickest that it does not: normals, Poisson draws, integer noise."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
from figures import Figure, progress, told

from cloister_shared.noise import discrete_gaussian, draw_subset, gaussians, keystream, uniforms

NORMALS, POPULATION, RATE, INTEGERS, SIGMA, REPEATS = 11_000_000, 1_000_000, 1e-3, 1_000_000, 50.0, 7


def figures() -> list[Figure]:
    import torch

    torch.set_num_threads(1)
    progress(f"noise: {NORMALS:,} normals, draws from {POPULATION:,}, {INTEGERS:,} integers, {REPEATS} times each")
    entropy = keystream()
    ours, theirs = race(lambda: gaussians(entropy, NORMALS), lambda: torch.normal(0.0, 1.0, (NORMALS,)))
    drawn, coins = race(
        lambda: draw_subset(entropy, POPULATION, RATE),
        lambda: np.flatnonzero(uniforms(entropy, POPULATION) < RATE),
    )
    (integers,) = race(lambda: discrete_gaussian(entropy, SIGMA, INTEGERS))
    return [
        told("noise.gaussians", middle(ours, theirs), "{:.2f} times torch.normal"),
        told("noise.gaussians.cpu", 1e3 * min(ours), f"{{:.0f}} ms (torch.normal {1e3 * min(theirs):.0f} ms)"),
        told("noise.subset", middle(drawn, coins), "{:.3f} of a coin for each"),
        told("noise.subset.cpu", 1e3 * min(drawn), f"{{:.2f}} ms (coins {1e3 * min(coins):.2f} ms)"),
        told("noise.discrete", INTEGERS / min(integers) / 1e6, "{:.1f} million a second"),
    ]


def race(*runners: Callable[[], object]) -> list[list[float]]:
    """CPU seconds of each, in turn, so that what else runs hits all alike; a first turn warms up."""
    taken = [[spent(runner) for runner in runners] for _ in range(REPEATS + 1)][1:]
    return [list(column) for column in zip(*taken, strict=True)]


def spent(runner: Callable[[], object]) -> float:
    began = time.process_time()
    runner()
    return time.process_time() - began


def middle(ours: list[float], theirs: list[float]) -> float:
    """The middle ratio of runs that stood side by side."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    for figure in figures():
        print(figure.line())
