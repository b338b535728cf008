"""The patient as the unit: the same epsilon however many records a patient has, by law and by the platform's own step.

The law of a step is given to dp-accounting's exact mixture of Gaussians. That the step keeps to it is seen on tables
where each patient has 1, 2, 4 or 8 records: what a round is charged, and how far one patient moves the real sum.
"""

from __future__ import annotations

import numpy as np
import torch
from figures import Figure, at_most, progress, told

from cloister_client.dataset import Rows
from cloister_client.privacy import Units, dp_sgd
from cloister_shared import budget
from cloister_shared.budget import Event
from cloister_shared.charges import training_event
from cloister_shared.layout import initial_model
from cloister_shared.noise import reproducible
from cloister_shared.objective import objective_of
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend
from cloister_simulations.scenario import read_scenario

DELTA, PATIENTS, CLIP = 1e-5, 200, 0.05
RECORDS, OF_RECORDS = (1, 2, 4, 8), Event(2.0, 0.05, 1000)


def figures() -> list[Figure]:
    plan = amend(
        read_scenario("breast-cancer").plan,
        privacy={"unit": "patient", "clip_norm": CLIP},
        training={"sample_rate": 1.0},
    )
    charged = {training_event(plan, len(Units.of(table(k), "patient"))) for k in RECORDS}
    most = max(moved(plan, table(k)) for k in RECORDS)
    return [
        *patients(),
        at_most("patient.charges", len(charged), 1, "{:.0f} price for 1, 2, 4, 8 records"),
        at_most("patient.moves", most, 1.0001, "{:.5f} clips by any patient"),
    ]


def table(records: int) -> Rows:
    """So many records for every patient, not side by side and not alike."""
    draw = np.random.default_rng(records)
    x = draw.normal(size=(PATIENTS * records, 30)).astype(np.float32)
    y = (draw.random(PATIENTS * records) < 0.4).astype(np.float32)
    return Rows(torch.from_numpy(x), torch.from_numpy(y), np.tile(np.arange(PATIENTS), records))


def moved(plan: StudyPlan, rows: Rows) -> float:
    """By how much the platform's step changes at most without one of ten patients, over clip_norm; no noise on it."""
    whole = step(plan, rows)
    distances: list[float] = []
    for patient in range(10):
        stay = rows.patients != patient
        others = Rows(rows.x[stay], rows.y[stay], rows.patients[stay])
        distances.append(float(np.linalg.norm(whole - step(plan, others))))
    return max(distances) / CLIP


def step(plan: StudyPlan, rows: Rows) -> np.ndarray:
    """The sum of all patients' clipped gradients, as the platform makes it."""
    silent = Event(1e-9, 1.0, 1)
    mechanism = dp_sgd(initial_model(plan), objective_of(plan), rows, plan, silent, reproducible("patient"))
    mechanism.gradient()
    made = [part.grad.flatten() for part in mechanism.parameters if part.grad is not None]
    return torch.cat(made).double().numpy() * plan.training.batch_size


def patients() -> list[Figure]:
    """Exact mixture-PLD of DP-SGD where a patient has 1, 2, 4, 8 records, by what is drawn and clipped as one."""
    whole: list[float] = []
    apart: list[float] = []
    for records in RECORDS:
        progress(f"patient: exact mixture for {records} records")
        whole.append(law(records, drawn_whole=True))
        apart.append(law(records, drawn_whole=False))
    ours = [budget.pld_epsilon([Event(2.0, 0.05, 1000, records=k)], DELTA) for k in RECORDS[:2]]
    assert max(abs(a - b) for a, b in zip(ours, apart, strict=False)) < 1e-3
    shown = " / ".join(f"{value:.2f}" for value in whole)
    bounds = [budget.epsilon([Event(2.0, 0.05, 1000, records=k)], DELTA) for k in RECORDS]
    return [
        at_most("patient.records", max(whole) - min(whole), 1e-9, shown),
        told("patient.records.apart", apart[-1], " / ".join(f"{value:.1f}" for value in apart) + ", each clipped"),
        told("patient.records.ledger", bounds[-1], " / ".join(f"{value:.1f}" for value in bounds) + ", as counted"),
    ]


def law(records: int, *, drawn_whole: bool) -> float:
    """Epsilon from the law of how far a patient with so many records can move one step's sum, in clip norms.

    Computed here from each record's fate by convolution, and given to dp-accounting's mixture of Gaussians: not by
    the functions that the ledger uses. Drawn whole, all records share one draw and one clip.
    """
    from dp_accounting.pld import privacy_loss_distribution as pld

    moved = np.array([1.0])
    one_draw = np.array([1 - OF_RECORDS.sample_rate, OF_RECORDS.sample_rate])
    if drawn_whole:
        # The draw takes none or all of the records, whose clipped sum or mean moves by one clip norm at most.
        by_count = np.zeros(records + 1)
        by_count[[0, records]] = one_draw
        moved = np.array([by_count[0], by_count[1:].sum()])
    else:
        for _ in range(records):
            moved = np.convolve(moved, one_draw)
    one = pld.from_mixture_gaussian_mechanism(
        OF_RECORDS.noise_multiplier, list(range(len(moved))), moved.tolist(), value_discretization_interval=1e-3
    )
    return float(one.self_compose(OF_RECORDS.steps).get_epsilon_for_delta(DELTA))
