"""ComBat by sums, against a plain ComBat on the rows of all hospitals in one place."""

import json
import math

import numpy as np
import pytest
import torch

from cloister_client.combat import checked, effects, inputs, sent
from cloister_client.dataset import Rows
from cloister_client.statistics import noisy_statistics
from cloister_server.statistics import constants
from cloister_shared import charges, combat, tally
from cloister_shared.budget import epsilon
from cloister_shared.errors import TicketRefused
from cloister_shared.inputs import numbers
from cloister_shared.noise import reproducible
from cloister_shared.plan_file import read_plan
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
    assert shared
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


# --- what it is for ----------------------------------------------------------------------------------------
def hospitals_x(hospitals):
    return [rows.x for rows in hospitals]


def means(parts, at):
    return np.array([np.asarray(x)[:, at].mean(axis=0) for x in parts])


@pytest.mark.parametrize("epsilon", [None, 20.0])
def test_hospitals_are_less_far_apart_afterwards(epsilon):
    hospitals = [a_hospital(number, 3000) for number in range(3)]
    shared, _, made = harmonised(a_plan(KEPT["ages"], epsilon), hospitals)
    at, number = [1, 5, 7, 8], [1, 2, 3, 4]
    before = (means(hospitals_x(hospitals), at) - np.array(shared)[number, 0]) / np.array(shared)[number, 1]
    assert means(made, at).var(axis=0).mean() < 0.25 * before.var(axis=0).mean()


def test_what_follows_from_age_is_left_in_if_it_is_kept():
    hospitals = [a_hospital(number, 2000) for number in range(3)]
    # Each hospital's patients are eight years older than those of the one before; glucose rises with age.
    kept, without = (harmonised(a_plan(KEPT[keep]), hospitals) for keep in KEPT)
    (_, _, left), (_, _, lost) = kept, without
    slope = kept[0][2][3] / 60  # of glucose, on an age that runs from -1 to 1 over 120 years
    assert slope == pytest.approx(0.6, abs=0.15)
    older = np.ptp(means(hospitals_x(hospitals), 0))
    assert np.ptp(means(left, 5)) == pytest.approx(slope * older / kept[0][2][1], rel=0.2)
    assert np.ptp(means(lost, 5)) < 0.2 * np.ptp(means(left, 5))


def test_one_feature_alone_is_taken_as_it_is_measured(hospitals):
    plan = a_plan("{method: combat, keep: [age, sodium, lactate, albumin]}")
    shared, _, parts = harmonised(plan, hospitals)
    centre, scale, intercept, *slopes = shared[2]
    for rows, x in zip(hospitals, parts, strict=True):
        on_range = (rows.x[:, [0, 1, 7, 8]].double().numpy() - [60, 140, 10, 40]) / [60, 40, 15, 40]
        left = x[:, 5].double().numpy() - (intercept + on_range @ slopes - centre) / scale
        # What the covariates leave over: at every hospital around 0, and of the common spread.
        assert left.mean() == pytest.approx(0, abs=1e-6)
        assert left.std(ddof=1) == pytest.approx(1, abs=1e-6)


def test_a_gap_is_no_measurement():
    plan = a_plan(KEPT["none"], lactate="missing: indicator, fill: 3")
    hospitals = [a_hospital(number, 80) for number in range(3)]
    with_gaps = []
    for rows in hospitals:
        missing = torch.arange(80) % 4 == 0
        x = torch.cat([rows.x[:, :8], missing.float()[:, None], rows.x[:, 8:]], dim=1)
        x[missing, 7] = 3.0
        with_gaps.append(Rows(x, rows.y, rows.patients))
    shared, _, made = harmonised(plan, with_gaps)
    at, values = 3, np.concatenate([rows.x[torch.arange(80) % 4 != 0, 7].numpy() for rows in hospitals])
    assert shared[at][0] == pytest.approx(values.mean(), rel=1e-6)
    for x in made:
        assert x[::4, 7].tolist() == pytest.approx([(3.0 - shared[at][0]) / shared[at][1]] * 20, rel=1e-5)


# --- what it costs -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("keep", KEPT)
def test_no_row_moves_the_sums_by_more_than_their_sensitivity(keep):
    plan, draw = a_plan(KEPT[keep]), np.random.default_rng(0)
    most = 0.0
    for _ in range(200):
        x = torch.from_numpy(draw.normal(0, 1e3, (1, 9))).float()
        x[:, [2, 3, 4, 6]] = torch.tensor([*torch.eye(3)[draw.integers(3)], draw.integers(2)]).float()
        row = Rows(x, torch.zeros(1), np.zeros(1, dtype=np.int64))
        most = max(most, float(np.linalg.norm(list(noisy_statistics(row, plan, reproducible("s")).values()))))
    assert most <= combat.sensitivity(plan) * (1 + 1e-12)
    assert most > 0.99 * combat.sensitivity(plan)  # and the bound is reached


@pytest.mark.parametrize("mechanism", ["site", "shared"])
def test_each_hospital_adds_all_of_the_noise_for_it_uses_the_sums_itself(mechanism):
    plan = a_plan(KEPT["ages"], 3.0)
    if mechanism == "shared":
        plan = plan.model_copy(
            update={"privacy": plan.privacy.model_copy(update={"mechanism": "shared"}),
                    "training": plan.training.model_copy(update={"sample_rate": 0.5})}
        )  # fmt: skip
    event, rows = charges.statistics_event(plan), a_hospital(0, 50)
    assert event
    assert epsilon([event], 1e-5) == pytest.approx(0.3, rel=5e-3)
    exact = np.array(list(noisy_statistics(rows, a_plan(KEPT["ages"]), reproducible("s")).values()))
    drawn = [list(noisy_statistics(rows, plan, reproducible(f"{at}")).values()) for at in range(100)]
    noise = np.array(drawn) - exact
    assert noise.std() == pytest.approx(event.noise_multiplier * combat.sensitivity(plan), rel=0.05)
    assert noise.std() == pytest.approx(tally.harmony_noise(plan), rel=0.05)


def test_noise_that_is_larger_than_the_effects_takes_nothing_out(hospitals):
    """Each effect by itself would be off by ten scales: then most of the time nobody is believed to have one."""
    worst = []
    for _ in range(20):
        _, made, _ = harmonised(a_plan(KEPT["none"], 0.3), hospitals)
        worst.append(max(np.abs(effect.gamma).max() for effect in made))
    assert np.median(worst) < 1


def test_effects_are_drawn_and_paid_for_once(plan_with, open_site, rows):
    plan = plan_with(dp=True, normalisation={"method": "combat"})
    site = open_site(plan)

    def asked(run, of=site):
        header = TicketHeader(run=run, plan=plan.digest, round=0, site=of.name)
        return of.statistics(Ticket(header)).header.metrics

    first = asked("one")
    assert asked("one") == asked("two") == asked("three", open_site(plan)) == first
    assert [event.purpose for event in site.ledger.history(plan.digest)] == ["statistics"]
    kept = json.loads((site.folder / f"{plan.digest}.moments.json").read_text())
    assert sent(plan, kept) == first


def test_a_hospital_that_comes_late_draws_its_own_before_it_trains(plan_with, open_site):
    plan = plan_with(dp=True, normalisation={"method": "combat"})
    site = open_site(plan)
    site.enrol()
    model = np.zeros(site.layout.size, np.float32)
    header = TicketHeader(run="r", plan=plan.digest, round=2, site=site.name, normalisation=((0.0, 1.0),) * 3)
    reply = site.train(Ticket(header, {"model": model}))
    assert np.isfinite(reply.vectors["update"]).all()
    assert sorted(event.purpose for event in site.ledger.history(plan.digest)) == ["statistics", "training"]
    assert site.train(Ticket(header, {"model": model})).vectors["update"].tolist() == reply.vectors["update"].tolist()


@pytest.mark.parametrize("odd", [((0.0, 1.0),) * 2, ((0.0, 0.0),) * 3, ((0.0, 1.0, 0.0),) * 3, ((math.nan, 1.0),) * 3])
def test_constants_that_do_not_fit_are_refused(plan_with, odd):
    with pytest.raises(TicketRefused, match="constants do not fit"):
        checked(plan_with(normalisation={"method": "combat"}), odd)


def test_once_the_sums_are_drawn_no_row_moves_another_rows_inputs(plan_with, open_site, rows):
    plan = plan_with(dp=True, normalisation={"method": "combat"})
    header = TicketHeader(run="r", plan=plan.digest, round=1, site="st-marys", normalisation=((0.0, 1.0),) * 3)

    def made(train):
        site = open_site(plan, train=train)
        return site._rows(Ticket(header.model_copy(update={"site": site.name})))[0].x

    first = made(rows())
    other = rows()
    other.x[0] = torch.tensor([2.0, -2.0, 2.0])
    second = made(other)
    assert torch.equal(first[1:], second[1:])
    assert not torch.equal(first[0], second[0])


def test_the_noises_own_square_is_not_taken_for_spread():
    plan, draw, noise = a_plan(KEPT["ages"]), np.random.default_rng(0), 60.0
    exact = noisy_statistics(a_hospital(0, 400), plan, reproducible("s"))
    right = combat.centred(combat.read(plan, exact), 0.0)
    found = []
    for _ in range(3000):
        noisy = {name: (value or 0.0) + draw.normal(0, noise) for name, value in exact.items()}
        found.append(combat.centred(combat.read(plan, noisy), noise))
    error = 4 * 1.5 * noise / 3000**0.5  # four standard errors
    np.testing.assert_allclose(np.mean([each.yy for each in found], axis=0), right.yy, atol=error)
    np.testing.assert_allclose(np.mean([np.diag(each.xx) for each in found], axis=0), np.diag(right.xx), atol=error)
