"""cloister_server.statistics: what is made of noisy counts."""

import numpy as np
import pytest

from cloister_server.statistics import _without_negatives, constants, judged
from cloister_shared import tally
from cloister_shared.plan_file import read_plan

PLAN = """
study: three
title: Three hospitals
task: {name: tabular}
table:
  features: [{name: age, kind: number, range: [0, 100]}]
  target: {name: died, positive: 1, negative: 0}
cohort: {min_sites: 2, min_patients: 5}
rounds: 4
strategy: {name: fedavg}
training: {learning_rate: 0.1, batch_size: 8, local_steps: 1}
privacy: {mechanism: none}
evaluation: {threshold: 0.7}
"""


@pytest.mark.parametrize(
    ("noisy", "mended"),
    [
        ([3.0, 1.0, 2.0], [3.0, 1.0, 2.0]),
        ([3.0, -1.0, 2.0], [2.5, 0.0, 1.5]),  # what was below zero comes from the others, each alike
        ([0.2, 3.0, -1.0], [0.0, 2.2, 0.0]),  # and one that this would push below zero stays at zero
        ([-1.0, -2.0, 0.5], [0.0, 0.0, 0.0]),
    ],
)
def test_counts_lose_what_is_negative_and_keep_their_sum(noisy, mended):
    assert _without_negatives(np.array(noisy)) == pytest.approx(mended)


def test_the_final_model_is_judged_by_noisy_counts():
    """Ten ill patients at high risk, thirty well ones at low risk, and noise that must not count as patients."""
    said: dict[str, float | None] = dict.fromkeys(tally.risks(), 0.0)
    said |= {"ill at risk 39": 6.0, "ill at risk 20": 4.0, "well at risk 0": 31.0, "well at risk 1": -1.0}
    found = judged(read_plan(PLAN), said)
    assert found["final auroc"] == pytest.approx(1.0)
    assert found["final sensitivity"] == pytest.approx(0.6, abs=0.02)  # 0.5 and more would call all ten
    assert found["final specificity"] == pytest.approx(1.0)
    assert all(name.startswith("final ") for name in found)


def test_without_a_patient_nothing_is_said_of_the_final_model():
    said: dict[str, float | None] = dict.fromkeys(tally.risks(), -1.0)
    assert set(judged(read_plan(PLAN), said).values()) == {None}


# --- vectors -----------------------------------------------------------------------------------------------
GENES = 400


def noisy(noise: float) -> dict[str, float | None]:
    """Sums over a hundred patients of genes whose means differ by a tenth, in units of half their range."""
    rng = np.random.default_rng(0)
    means = rng.normal(0.2, 0.1, GENES)
    exact = {"count": np.full(GENES, 100.0), "sum": 100 * means, "square": 100 * (means**2 + 0.3**2)}
    return {
        f"{kind} gene_{at}": float(value)
        for kind, values in exact.items()
        for at, value in enumerate(values + rng.normal(0, noise, GENES))
    }


def of_genes(said: dict[str, float | None]) -> np.ndarray:
    plan = read_plan(
        PLAN.replace(
            "{name: age, kind: number, range: [0, 100]}", "{name: gene, kind: vector, length: 400, range: [-1, 1]}"
        )
        + "normalisation: {method: federated}\n"
    )
    found = constants(plan, said)
    assert found
    return np.array(found)


def test_without_noise_each_number_of_a_vector_has_its_own_constants():
    found, said = of_genes(noisy(0)), noisy(0)
    assert found[:, 0] == pytest.approx([(said[f"sum gene_{at}"] or 0) / 100 for at in range(GENES)])
    assert found[:, 1] == pytest.approx(np.full(GENES, 0.3))


def test_what_noise_hides_of_a_vector_is_taken_from_all_of_it():
    right, found = of_genes(noisy(0)), of_genes(noisy(80.0))
    error = np.sqrt(((found - right) ** 2).mean(axis=0))
    assert error[0] < 0.2  # each mean by itself would be off by 0.8
    assert error[1] < 0.15
