"""Hospitals that come late or come back, under the secure sum: real hospitals in one process."""

import pytest

from cloister_client.app import client_app
from cloister_server.app import run_study
from cloister_server.store import Store
from cloister_shared.plan_file import amend
from cloister_simulations.grid import InProcessGrid

WITHOUT_NOISE = {"mechanism": "none", "unit": None, "epsilon": None, "delta": None, "clip_norm": None}


class Doors(InProcessGrid):
    """A grid that shows some of its nodes only."""

    def __init__(self, app, sites):
        super().__init__(app, sites)
        self.there = list(self._contexts)

    def get_node_ids(self):
        return self.there


@pytest.fixture
def consortium(opened, folder):
    """A function that opens four hospitals for a plan: the grid, and a function that runs some rounds there."""

    def of(plan):
        sites = opened(plan)
        grid, took = Doors(client_app(lambda context: sites[str(context.node_config["site"])]), sites), []

        def run(after):
            """Rounds to the end; ``after`` is called with each round's number when it is done."""

            def notice(record):
                took.append(record.answered)
                after(record.round)

            store = Store(folder)
            run_study(plan, store, grid, notice, lambda: dict(enumerate(sites, start=1)))
            return took, store.load(plan.digest)

        return grid, run

    return of


@pytest.fixture
def without_noise(small):
    return amend(small.plan, aggregation={"secure_sum": True}, privacy=WITHOUT_NOISE, cohort={"min_sites": 3})


class Stop(Exception):
    """The worker ends here."""


def stop(number):
    raise Stop


def test_a_hospital_that_comes_back_takes_part_with_the_keys_it_has(consortium, without_noise):
    grid, run = consortium(without_noise)
    with pytest.raises(Stop):
        run(stop)  # all four made keys, and the worker died after a round
    everybody, grid.there = grid.there, grid.there[:3]
    took, end = run(lambda number: setattr(grid, "there", everybody))
    assert list(map(len, took)) == [4, 3, 4, 4]
    assert len(end.cohort) == 4


def test_without_noise_nobody_is_asked_for_a_second_run_that_all_would_refuse(consortium, without_noise):
    grid, run = consortium(without_noise)
    everybody, grid.there = grid.there, grid.there[:3]
    took, end = run(lambda number: setattr(grid, "there", everybody))
    assert list(map(len, took)) == [3, 3, 3, 3]
    assert len(end.cohort) == 3


def test_with_noise_one_that_comes_late_joins_between_two_rounds(consortium, small):
    private = {"mechanism": "site", "unit": "patient", "epsilon": 3.0, "delta": 1e-5, "clip_norm": 1.0}
    grid, run = consortium(
        amend(small.plan, aggregation={"secure_sum": True}, privacy=private, cohort={"min_sites": 3})
    )
    everybody, grid.there = grid.there, grid.there[:3]
    took, end = run(lambda number: setattr(grid, "there", everybody))
    assert list(map(len, took)) == [3, 4, 4, 4]
    assert len(end.cohort) == 4
