"""ComBat by sums, against a plain ComBat on the rows of all hospitals in one place."""

import json
import math

import numpy as np
import pytest
import torch

from cloister_client import statistics
from cloister_client.combat import checked, effects, inputs, sent
from cloister_client.dataset import Rows
from cloister_client.statistics import noisy_statistics
from cloister_server.statistics import constants
from cloister_shared import charges, combat, tally
from cloister_shared.budget import epsilon
from cloister_shared.errors import TicketRefused
from cloister_shared.noise import reproducible
from cloister_shared.plan_file import read_plan
from cloister_shared.schema import numbers
from cloister_shared.wire import Ticket, TicketHeader

PLAN = """
study: harmonised
title: Laboratories that measure differently
task: {name: tabular, model: logistic}
table:
  target: {name: died, positive: 1, negative: 0}
  features:
    - {name: age, kind: number, range: [0, 120]}
    - {name: sodium, kind: number, range: [100, 180]}
    - {name: ward, kind: category, categories: [medical, surgical, other]}
    - {name: glucose, kind: number, range: [0, 400]}
    - {name: smoker, kind: boolean}
    - {name: lactate, kind: number, range: [-5, 25]}
    - {name: albumin, kind: number, range: [0, 80]}
normalisation: METHOD
cohort: {min_sites: 3, min_patients: 5}
rounds: 2
strategy: {name: fedavg}
training: {learning_rate: 0.1, batch_size: 8, local_steps: 1}
privacy: {mechanism: none}
"""
KEPT = {"ages": "{method: combat, keep: [age, ward, smoker]}", "none": "{method: combat}"}
DP = "privacy: {mechanism: site, unit: record, epsilon: EPSILON, delta: 1.0e-5, clip_norm: 1.0}"
SITES = {"north": 90, "south": 140, "west": 60}


def a_plan(method, epsilon=None, **changes):
    text = PLAN.replace("METHOD", method)
    if epsilon:
        text = text.replace("privacy: {mechanism: none}", DP.replace("EPSILON", str(epsilon)))
    for old, new in changes.items():
        text = text.replace(f"name: {old}, kind: number,", f"name: {old}, kind: number, {new},")
    return read_plan(text)


def a_hospital(number, rows):
    """Older patients at later hospitals, age moves every quantity, and each hospital adds and multiplies."""
    draw = np.random.default_rng(number)
    age = np.clip(draw.normal(50 + 8 * number, 10, rows), 0, 120)
    ward, smoker = draw.integers(0, 3, rows), draw.integers(0, 2, rows)
    noise = draw.normal(0, 1, (rows, 4)) * draw.uniform(0.6, 1.6, 4) + draw.normal(0, 1, 4)
    usual = np.array([140, 150, 4, 38]) + np.array([0.1, 0.6, 0.03, -0.1]) * (age - 60)[:, None]
    sodium, glucose, lactate, albumin = (usual + 2.0 * (ward == 1)[:, None] + np.array([4, 20, 1, 3]) * noise).T
    columns = (age, sodium, *(ward == at for at in range(3)), glucose, smoker, lactate, albumin)
    x = torch.tensor(np.stack(columns, axis=1), dtype=torch.float32)
    return Rows(x, torch.from_numpy(draw.integers(0, 2, rows)).float(), np.arange(rows))


@pytest.fixture(scope="module")
def hospitals():
    return [a_hospital(number, rows) for number, rows in enumerate(SITES.values())]


def harmonised(plan, hospitals):
    """What each hospital trains on: only sums pass between them."""
    own = [noisy_statistics(rows, plan, reproducible(f"{at}")) for at, rows in enumerate(hospitals)]
    said = [sent(plan, numbers) for numbers in own]
    assert all(tuple(numbers) == tally.statistics(plan) for numbers in said)
    shared = constants(plan, {name: sum(numbers[name] for numbers in said) for name in tally.statistics(plan)})
    made = [effects(plan, numbers, shared) for numbers in own]
    return shared, made, [inputs(rows, plan, shared, effect).x for rows, effect in zip(hospitals, made, strict=True)]


def plain_combat(y, batch, covariates):
    """Johnson, Li and Rabinovic 2007, with all rows [n, features] in one place: what is left, on the common scale."""
    sites = np.eye(batch.max() + 1)[batch]
    fitted, *_ = np.linalg.lstsq(np.hstack([sites, covariates]), y, rcond=None)
    share = sites.mean(axis=0)
    usual = share @ fitted[: len(share)] + covariates @ fitted[len(share) :]
    scale = np.sqrt(((y - np.hstack([sites, covariates]) @ fitted) ** 2).mean(axis=0))
    z = (y - usual) / scale
    for site in range(len(share)):
        own, rows = z[batch == site], (batch == site).sum()
        gamma, delta = own.mean(axis=0), own.var(axis=0, ddof=1)
        mean, tau = gamma.mean(), gamma.var(ddof=1)
        m, s = delta.mean(), delta.var(ddof=1)
        shape, rate = (2 * s + m**2) / s, (m * s + m**3) / s
        g, d = gamma, delta
        for _ in range(2000):
            g = (rows * tau * gamma + d * mean) / (rows * tau + d)
            d = (rate + ((own - g) ** 2).sum(axis=0) / 2) / (rows / 2 + shape - 1)
        z[batch == site] = (own - g) / np.sqrt(d)
    return z * scale + usual, scale


@pytest.mark.parametrize("keep", KEPT)
def test_without_privacy_it_is_combat_on_all_rows_in_one_place(keep, hospitals):
    plan = a_plan(KEPT[keep])
    shared, _, made = harmonised(plan, hospitals)
    x = np.concatenate([rows.x.double().numpy() for rows in hospitals])
    batch = np.repeat(np.arange(3), list(SITES.values()))
    at, covariates = ([1, 5, 7, 8], x[:, [0, 3, 4, 6]]) if keep == "ages" else ([0, 1, 5, 7, 8], x[:, :0])
    expected, scale = plain_combat(x[:, at], batch, covariates)
    centre = x[:, at].mean(axis=0)
    np.testing.assert_allclose(torch.cat(made)[:, at], (expected - centre) / scale, atol=1e-6)
    own = [row for row, f in zip(shared, numbers(plan.table), strict=True) if f.name not in plan.keep]
    np.testing.assert_allclose([row[0] for row in own], centre, rtol=1e-7)
    np.testing.assert_allclose([row[1] for row in own], scale, rtol=1e-7)
    assert torch.equal(torch.cat(made)[:, [2, 3, 4, 6]], torch.from_numpy(x[:, [2, 3, 4, 6]]).float())
