"""Two ways to carry messages between the same ServerApp and the same hospitals."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid, ServerApp

from cloister_client.app import client_app
from cloister_client.site import Site
from cloister_server.rounds import ask, collect
from cloister_shared.errors import PlanRefused
from cloister_simulations.grid import Fault, InProcessGrid

Engine = Callable[[ServerApp, Mapping[str, Site], tuple[Fault, ...]], None]


def in_process(server: ServerApp, sites: Mapping[str, Site], faults: tuple[Fault, ...]) -> None:
    """One process, one hospital at a time: deterministic, and the place to inject faults."""
    app = client_app(lambda context: sites[str(context.node_config["site"])])
    grid = InProcessGrid(app, sites, faults)
    server(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={}))


# --- Ray ---------------------------------------------------------------------------------------------------
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_LOG_LEVEL": "ERROR",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or Ray warns of what a later version will do
}
"""Nothing phones home, and no idle talk. The worker processes inherit it."""

_START_UP = 120.0
"""Seconds that Ray's workers may take until each hospital has answered once."""

_OPEN: dict[Any, Site] = {}
"""The hospitals that this worker process has open, by their place in Ray's store."""


def ray(server: ServerApp, sites: Mapping[str, Site], faults: tuple[Fault, ...]) -> None:
    """Flower's simulation engine: hospitals work side by side, in as many processes as there are cores.

    Raises:
        CloisterError: what the coordinator raised.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray as cluster  # pyright: ignore
    from flwr.simulation import run_simulation

    watched, raised = _watched(server, len(sites), next(iter(sites.values())).plan.digest)
    workers = min(len(sites), os.cpu_count() or 1)
    # Workers import what this process can, also where it was put on the path by hand.
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    with hushed("flwr"):
        try:
            cluster.init(
                num_cpus=workers,
                include_dashboard=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": path},
            )
            # Each hospital travels once, into Ray's store; a worker fetches it when it is first asked.
            places = [cluster.put((s.plan, s.dataset, s.folder, s.noise_seed)) for s in sites.values()]
            run_simulation(
                server_app=watched,
                client_app=client_app(lambda context: _opened(places[int(context.node_config["partition-id"])])),
                num_supernodes=len(sites),
                backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
            )
        finally:
            cluster.shutdown()
    if raised:
        raise raised[0]


def _opened(place: Any) -> Site:
    """In a worker: a hospital, opened when it is first asked and kept open."""
    if place not in _OPEN:
        import ray as cluster  # pyright: ignore

        plan, dataset, folder, noise_seed = cluster.get(place)
        _OPEN[place] = Site(plan, dataset, folder, noise_seed=noise_seed)
    return _OPEN[place]


def _watched(server: ServerApp, hospitals: int, plan: str) -> tuple[ServerApp, list[Exception]]:
    """The same ServerApp once the workers are up, and where what it raises is put.

    Flower starts it in a thread of its own before it registers the hospitals and before Ray's workers have
    imported anything; none of that may count as a hospital's silence.
    """
    app, raised = ServerApp(), list[Exception]()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            deadline = time.monotonic() + _START_UP
            while len(list(grid.get_node_ids())) < hospitals and time.monotonic() < deadline:
                time.sleep(0.05)
            sent = ask(grid, list(grid.get_node_ids()), "query.enrol", plan)
            collect(grid, sent, _START_UP, lambda *_: None)
            server(grid, context)
        except Exception as error:
            raised.append(error)

    return app, raised


@contextmanager
def hushed(name: str, level: int = logging.ERROR) -> Iterator[None]:
    """Nothing of that logger below a level."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


ENGINES: dict[str, Engine] = {"in-process": in_process, "ray": ray}


def ready(engine: str, faults: tuple[Fault, ...]) -> None:
    """Refuse, before anything is trained, what an engine cannot do.

    Raises:
        PlanRefused: Ray is not installed, or faults were asked for, which only ``in-process`` injects.
    """
    if engine != "ray":
        return
    if faults:
        raise PlanRefused("Faults need the in-process engine.", mend="Leave out --engine ray or --fault.")
    if importlib.util.find_spec("ray") is None:
        raise PlanRefused("The engine ray is not installed.", mend="Run pip install 'cloister[ray]'.")
