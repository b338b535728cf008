"""Readiness from end to end: real hospitals in one process, before the first round."""

import pytest

from cloister_client.app import client_app
from cloister_server import readiness
from cloister_server.app import run_study
from cloister_server.store import Store
from cloister_shared.errors import StudyHeld
from cloister_shared.plan_file import amend
from cloister_shared.readiness import names
from cloister_shared.wire import pack, pack_vectors, unpack_reply
from cloister_simulations import learned, report
from cloister_simulations.federation import Options, compare
from cloister_simulations.grid import InProcessGrid


class Hostile(InProcessGrid):
    """``asked`` are the kinds of all messages; ``lies`` changes the readiness that one hospital sends.

    Those ``gone`` are back once a round has begun, if ``comes``.
    """

    lies, comes = None, False

    def __init__(self, app, sites):
        super().__init__(app, sites)
        self.asked, self.gone = [], []

    def get_node_ids(self):
        return [node for node in self._contexts if node not in self.gone]

    def _answer(self, message, name):
        kind = message.metadata.message_type
        self.asked.append(kind)
        if self.comes and kind == "train":
            self.gone = []
        reply = super()._answer(message, name)
        if reply and self.lies and kind == "query.readiness" and message.metadata.dst_node_id == 1:
            read = unpack_reply(reply.content)
            header = read.header.model_copy(update={"metrics": self.lies(dict(read.header.metrics))})
            reply.content["header"] = pack(header, pack_vectors())["header"]
        return reply


@pytest.fixture
def consortium(opened, folder):
    """``consortium(plan)``: four hospitals, their grid, and a function that runs the study as a coordinator does."""

    def of(plan):
        sites = opened(plan)
        grid = Hostile(client_app(lambda context: sites[str(context.node_config["site"])]), sites)

        def run():
            return run_study(plan, Store(folder), grid, members=lambda: dict(enumerate(sites, start=1)))

        return sites, grid, run

    return of


@pytest.fixture
def plan(small):
    return amend(
        small.plan,
        rounds=2,
        privacy={"epsilon": 20.0},
        readiness={"epsilon_share": 0.2},
        training={"sample_rate": 1.0, "local_steps": 1},
    )


def table_in(folder):
    found = readiness.load(folder)
    assert found
    return found


def test_the_table_comes_first_and_every_ledger_pays_for_it(consortium, plan, folder):
    sites, grid, run = consortium(plan)
    run()
    table = table_in(folder)
    assert table.spread
    assert sorted(table.told) == sorted(sites)
    assert grid.asked.index("query.readiness") < grid.asked.index("query.advertise") < grid.asked.index("train")
    for site in sites.values():
        assert site.ledger
        assert site.ledger.history(plan.digest)[0].purpose == "readiness"
        assert abs(table.told[site.name]["units"] - site.dataset.quality.patients) < 6 * table.spread


def test_a_hospital_is_asked_once_over_restarts(consortium, plan):
    _, grid, run = consortium(plan)
    run()
    run()
    assert grid.asked.count("query.readiness") == 4


def test_a_hospital_that_lies_is_left_out_of_the_table_and_not_of_the_study(consortium, plan, folder):
    sites, grid, run = consortium(plan)
    grid.lies = lambda said: said | {"has everything": 1.0}
    finished = run()
    liar = next(iter(sites))
    table = table_in(folder)
    assert table.missing == {liar: f"the readiness is not {len(names(plan))} counts"}
    assert liar not in table.told
    assert liar in finished.enrolled


def test_a_hospital_that_comes_late_is_asked_when_it_joins(consortium, plan, folder):
    sites, grid, run = consortium(amend(plan, cohort={"min_sites": 3}))
    grid.gone, grid.comes = [1], True
    run()
    assert next(iter(sites)) in table_in(folder).told
    assert grid.asked.count("query.readiness") == 4
    assert table_in(folder).missing == {}


def test_one_that_comes_back_is_not_asked_again(consortium, plan, folder):
    _, grid, run = consortium(amend(plan, cohort={"min_sites": 3}, readiness={"hold": True}))
    with pytest.raises(StudyHeld):
        run()
    readiness.released(folder)
    grid.gone, grid.comes = [1], True
    finished = run()
    assert len(finished.enrolled) == 4
    assert grid.asked.count("query.readiness") == 4


def test_a_plan_that_holds_waits_for_its_reader(consortium, plan, folder):
    _, grid, run = consortium(amend(plan, readiness={"hold": True}))
    for _ in range(2):  # a restart lets nothing go
        with pytest.raises(StudyHeld, match="4 hospitals told what they hold"):
            run()
    assert "train" not in grid.asked
    readiness.released(folder)
    run()
    assert grid.asked.count("query.readiness") == 4


@pytest.mark.slow
def test_the_report_shows_it_with_its_price(small, folder):
    plan = amend(small.plan, readiness={"epsilon_share": 0.2})
    scenario = small.model_copy(update={"plan": plan})
    found = compare(scenario, Options(folder, arms=("federated", "private")))
    told = learned.readiness(found)
    assert told
    assert told.arm.kind == "private"
    assert told.epsilon == pytest.approx(0.2 * 2.0, rel=5e-3)
    assert all(site in told.page for site in found.rows)
    html = report.html(found)
    assert "What each hospital holds, under differential privacy, noise included" in html
    assert "but for what each told before training" in html
    exact = next(result for result in found.results if result.arm.kind == "federated")
    assert exact.readiness["spread"] is None
    for site, counts in found.rows.items():
        assert exact.readiness["told"][site]["units"] == counts["train"] + counts["test"] + counts["left out"]
