"""What privacy costs twenty hospitals in AUROC, and what each option of a plan gains at the same epsilon.

Twenty invented hospitals of the scenario ``generated-ehr`` with 20,000 patients, of whom three in four train: 160 to
2,000 a hospital. Five seeds, each a population, hospitals, initial model and noise of its own. Points lost are
100 (AUROC of the non-private federated model - AUROC of the private one) on the same held-out rows of all hospitals;
the interval is Student's at 95 % over the seeds' differences. Epsilon is a patient's, for the whole run, at delta 1e-5,
by the platform's accountant, against a coordinator with whom no hospital colludes; against a third of the hospitals
colluding with it, ``accuracy.shared.eps1.third`` tells what the additional noise costs.

How the learning rates were chosen: on the populations of seeds 100 to 102, which no figure here is of, so that no
held-out row of a figure was looked at and the choice costs no hospital any epsilon. Tried there, the best mean AUROC
taken: without privacy some 60 draws of width, rounds, rate and sample rate and a grid of 24 around the best; for the
secure sum some 200 draws, then rates 1.2, 1.8 and 2.5 at epsilon 2, and clip 1 with rate 2.2 against clip 1.5 with 1.5
at epsilon 1; local rates 0.1, 0.3, 1 and 3. The options keep the rate of the plan without them, but for momentum, Adam
and the pre-trained layers, whose rates come from grids with 64 units; the rate of ten hospitals was not searched. The
copies' jitter is the best of 0.05, 0.1, 0.2, 0.4 and 0.8 there.

    python simulations/benchmarks/privacy_accuracy.py    prints the figures
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

from accuracy_hospitals import Terms, trained_auroc
from figures import Figure, at_most, progress, told

from cloister_shared.plan import FedAdam, FedAvgM

ADAM = FedAdam(name="fedadam", server_learning_rate=0.01, beta2=0.99, tau=1e-6)
CORRECTED = FedAdam(name="fedadam", server_learning_rate=0.003, beta2=0.99, tau=1e-3, correct_noise=True)
SEEDS = (0, 1, 2, 3, 4)
PROCESSES = 2
STUDENT = 2.776
"""97.5 % quantile of Student's t with four degrees of freedom."""

WIDE = (("hidden", (128,)),)
PLAIN = Terms("none", learning_rate=1.5, rounds=200, sample_rate=0.3, decay=0.98, task=WIDE)
SHARED = Terms("shared", learning_rate=1.5, rounds=300, clip_norm=1.5, epsilon=1.0, decay=0.95, task=WIDE)
LOCAL = Terms("local", learning_rate=0.3, rounds=200, sample_rate=0.2, local_steps=20, epsilon=1.0, task=WIDE)
ARMS = {
    "plain": PLAIN,
    "shared.eps1": SHARED,
    "shared.eps2": replace(SHARED, learning_rate=1.2, clip_norm=2.0, epsilon=2.0),
    "shared.eps1.third": replace(SHARED, colluding=6),
    "local.eps1": LOCAL,
    "local.eps2": replace(LOCAL, epsilon=2.0),
}
BARS = {"shared.eps1": 1.5, "shared.eps2": 0.5}
OPTIONS = {
    "averaging": (replace(SHARED, decay=None), SHARED),
    "hospitals": (replace(SHARED, learning_rate=1.3, hospitals=10), SHARED),
    "batch": (replace(SHARED, sample_rate=0.02), SHARED),
    "momentum": (SHARED, replace(SHARED, learning_rate=0.15, strategy=FedAvgM(name="fedavgm", momentum=0.9))),
    "adam": (SHARED, replace(SHARED, learning_rate=1.0, strategy=ADAM)),
    "adam-corrected": (
        replace(SHARED, learning_rate=1.0, strategy=ADAM),
        replace(SHARED, learning_rate=1.0, strategy=CORRECTED),
    ),
    "group-norm": (SHARED, replace(SHARED, task=(*WIDE, ("norm", "group")))),
    "standardise": (
        replace(SHARED, task=(*WIDE, ("norm", "group"))),
        replace(SHARED, task=(*WIDE, ("norm", "group"), ("standardise", True))),
    ),
    "augment": (SHARED, replace(SHARED, copies=4, jitter=0.05)),
    "pre-trained": (SHARED, replace(SHARED, learning_rate=3.0, public=True)),
}
"""Each option at epsilon 1: the plan without it, and with it. ``hospitals`` is twenty instead of ten, ``batch`` a draw
of one patient in ten instead of one in fifty; ``pre-trained`` the hidden layer of a public population, held still."""


def figures() -> list[Figure]:
    ways = list(dict.fromkeys([*ARMS.values(), *(terms for pair in OPTIONS.values() for terms in pair)]))
    found = measured(ways)
    plain = found[PLAIN]
    made = [told("accuracy.plain", statistics.mean(plain), "AUROC {:.4f} without privacy")]
    for name, terms in ARMS.items():
        if terms is not PLAIN:
            lost, said = difference(plain, found[terms], "points lost")
            figure = at_most(f"accuracy.{name}", lost, BARS[name], said) if name in BARS else None
            made.append(figure or told(f"accuracy.{name}", lost, said))
    for name, (without, having) in OPTIONS.items():
        made.append(told(f"accuracy.options.{name}", *difference(found[having], found[without], "points")))
    return made


def difference(better: Sequence[float], worse: Sequence[float], word: str) -> tuple[float, str]:
    """Mean difference in points of AUROC, paired by seed, and how its interval is printed."""
    points = [100 * (one - other) for one, other in zip(better, worse, strict=True)]
    half = STUDENT * statistics.stdev(points) / math.sqrt(len(points))
    mean = statistics.mean(points)
    return mean, f"{{:.2f}} {word} ({mean - half:.2f} to {mean + half:.2f})"


def measured(ways: Sequence[Terms]) -> dict[Terms, list[float]]:
    """AUROC of every way to train with every seed; a seed's ways follow each other, since they share its population."""
    jobs = [(terms, seed) for seed in SEEDS for terms in ways]
    progress(f"accuracy: {len(ways)} ways to train, {len(SEEDS)} seeds")
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        scores = list[float]()
        for (_, seed), score in zip(jobs, pool.map(trained_auroc, *zip(*jobs, strict=True)), strict=True):
            scores.append(score)
            if len(scores) % len(ways) == 0:
                progress(f"accuracy: seed {seed}: {' '.join(f'{one:.4f}' for one in scores[-len(ways) :])}")
    return {terms: scores[at :: len(ways)] for at, terms in enumerate(ways)}


if __name__ == "__main__":
    for figure in figures():
        print(figure.line(), flush=True)
