"""Two ways to carry messages between the same ServerApp and the same hospitals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.serverapp import ServerApp

from cloister_client.app import Site, client_app
from cloister_shared.errors import PlanRefused
from cloister_simulations.grid import Fault, InProcessGrid

_OPEN: dict[Path, Site] = {}
"""The hospitals that this worker process of Ray has open."""

Engine = Callable[[ServerApp, Mapping[str, Site], tuple[Fault, ...]], None]


def in_process(server: ServerApp, sites: Mapping[str, Site], faults: tuple[Fault, ...]) -> None:
    """One process, one hospital at a time: deterministic, and the place to inject faults."""
    app = client_app(lambda context: sites[str(context.node_config["site"])])
    grid = InProcessGrid(app, sites, faults)
    server(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={}))


def ray(server: ServerApp, sites: Mapping[str, Site], faults: tuple[Fault, ...]) -> None:
    """Flower's simulation engine: each hospital in a worker process of Ray.

    Raises:
        PlanRefused: Ray is not installed, or faults were asked for, which only ``in-process`` injects.
    """
    if faults:
        raise PlanRefused("Faults need the in-process engine.", mend="Leave out --engine ray or --fault.")
    try:
        import ray  # noqa: F401  # pyright: ignore
    except ImportError:
        raise PlanRefused("The engine ray is not installed.", mend="Run pip install 'cloister[ray]'.") from None
    from flwr.simulation import run_simulation

    # A closure over these travels to the workers; whichever worker gets a message opens that hospital there.
    places = [(site.plan, site.dataset, site.folder, site.noise_seed) for site in sites.values()]

    def open_site(context: Context) -> Site:
        plan, dataset, folder, noise_seed = places[int(context.node_config["partition-id"])]
        if folder not in _OPEN:
            _OPEN[folder] = Site(plan, dataset, folder, noise_seed=noise_seed)
        return _OPEN[folder]

    run_simulation(
        server_app=server,
        client_app=client_app(open_site),
        num_supernodes=len(sites),
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}},
    )


ENGINES: dict[str, Engine] = {"in-process": in_process, "ray": ray}
