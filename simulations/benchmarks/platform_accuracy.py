"""What privacy costs twenty hospitals in AUROC on the platform itself: agents, secure sums, ledgers and all.

The hospitals, patients, seeds and terms are those of ``privacy_accuracy``, whose vectorised runs chose the learning
rates on other populations and give the model without privacy that these are held against. Here every round of every
study is 20 hospitals' own draws, clips and parts of the noise, and one secure sum. Some two minutes a run.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from accuracy_hospitals import DELTA, HOSPITALS, PATIENTS, Terms, study, trained_auroc
from figures import Figure, at_most, progress, told
from privacy_accuracy import ARMS, BARS, PLAIN, SEEDS, difference

from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend
from cloister_simulations import federation
from cloister_simulations.federation import Options
from cloister_simulations.generated import GeneratedEhr
from cloister_simulations.scenario import Scenario, read_scenario

PROCESSES = max(2, os.cpu_count() or 2)


def figures() -> list[Figure]:
    jobs = [(name, seed) for seed in SEEDS for name in BARS]
    progress(f"platform: {len(jobs)} studies of {ARMS['shared.eps1'].rounds} secure sums, {PROCESSES} at a time")
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        plain = list(pool.map(trained_auroc, [PLAIN] * len(SEEDS), SEEDS))
        found: dict[tuple[str, int], tuple[float, float]] = {}
        for job, said in zip(jobs, pool.map(platform, *zip(*jobs, strict=True)), strict=True):
            found[job] = said
            progress(f"platform: {job[0]}, seed {job[1]}: AUROC {said[0]:.4f}, epsilon {said[1]:.3f}")
    made: list[Figure] = []
    for name, bar in BARS.items():
        lost, said = difference(plain, [found[name, seed][0] for seed in SEEDS], "lost")
        made.append(at_most(f"platform.{name}", lost, bar, said))
        spent = max(found[name, seed][1] for seed in SEEDS)
        made.append(at_most(f"platform.{name}.spent", spent, ARMS[name].epsilon or 0, "epsilon {:.4f} by any ledger"))
    return [told("platform.plain", statistics.mean(plain), "AUROC {:.4f} without privacy"), *made]


def platform(name: str, seed: int) -> tuple[float, float]:
    """AUROC over the held-out rows of all hospitals, and the most that any hospital's ledger counts."""
    plan = plan_of(ARMS[name], seed)
    source = read_scenario("generated-ehr").simulation.hospitals
    assert isinstance(source, GeneratedEhr)
    drawn = source.model_copy(update={"sites": HOSPITALS, "patients": PATIENTS, "seed": seed})
    simulated = read_scenario("generated-ehr").simulation.model_copy(
        update={"hospitals": drawn, "seeds": (seed,), "epsilons": (ARMS[name].epsilon,)}
    )
    with tempfile.TemporaryDirectory() as folder:
        options = Options(Path(folder), arms=("private",))
        (result,) = federation.compare(Scenario(simulation=simulated, plan=plan, name="platform"), options).results
    return result.overall["auroc"].value or math.nan, max(result.epsilon.values())


def plan_of(terms: Terms, seed: int) -> StudyPlan:
    """What ``terms`` are as a plan."""
    return amend(
        study(seed, terms.task),
        cohort={"min_sites": HOSPITALS},
        rounds=terms.rounds,
        averaging={"decay": terms.decay},
        aggregation={"secure_sum": True, "weights": "equal"},
        training={
            "learning_rate": terms.learning_rate,
            "batch_size": round(terms.sample_rate * 0.75 * PATIENTS / HOSPITALS),
            "local_steps": 1,
            "sample_rate": terms.sample_rate,
        },
        privacy={
            "mechanism": "shared",
            "unit": "patient",
            "epsilon": terms.epsilon,
            "delta": DELTA,
            "clip_norm": terms.clip_norm,
            "colluding": terms.colluding,
        },
    )


if __name__ == "__main__":
    for figure in figures():
        print(figure.line(), flush=True)
