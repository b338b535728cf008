"""The same plan and seed on both engines: how far apart the models end, over the largest weight.

With privacy the noise is drawn from a seed, or no two runs would be alike. The last bits differ because Ray's
hospitals answer in any order, and a sum of floats depends on its order.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import numpy as np
from figures import Figure, at_most, missed, progress

from cloister_client.connectors.connector import open_records
from cloister_client.dataset import load_dataset
from cloister_server.store import Store
from cloister_shared.plan_file import amend
from cloister_simulations.engines import ENGINES
from cloister_simulations.federation import Arm, Options, plan_for, run_federated
from cloister_simulations.hospitals import build
from cloister_simulations.scenario import read_scenario

ARMS = {"plain": (Arm("federated"), None), "private": (Arm("private", 3.0), 1)}
"""Name to arm and seed of the noise."""


def figures() -> list[Figure]:
    if importlib.util.find_spec("ray") is None:
        return [missed(f"engines.{name}", "Ray is not installed") for name in ARMS]
    return [at_most(f"engines.{name}", apart(name), 1e-6, "{:.1e} of the largest weight") for name in ARMS]


def apart(name: str) -> float:
    arm, noise_seed = ARMS[name]
    scenario = read_scenario("breast-cancer")
    plan = amend(plan_for(scenario.plan, arm, 0), rounds=3)
    models = []
    with tempfile.TemporaryDirectory() as scratch:
        paths = build(scenario.simulation.hospitals, Path(scratch) / "hospitals")
        datasets = {path.parent.name: load_dataset(open_records(path), plan) for path in paths}
        for engine in ENGINES:
            progress(f"engines: {plan.rounds} rounds on {engine}, {name}")
            folder = Path(scratch) / engine
            options = Options(folder, engine=engine, noise_seed=noise_seed)
            run_federated(plan, datasets, arm, folder, options, lambda *_: None)
            checkpoint = Store(folder).load(plan.digest)
            assert checkpoint
            models.append(checkpoint.model)
    first, second = models
    return float(np.abs(first - second).max() / np.abs(first).max())
