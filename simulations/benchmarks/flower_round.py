"""Flower's own SecAgg+, for comparison: its workflow, client mod and arithmetic as they ship, without sockets."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence

import flwr.compat.common.recorddict_compat as compat
import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from flwr.common import Code, FitRes, Status, ndarray_to_bytes, ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_combine,
    get_parameters_shape,
    parameters_addition,
    parameters_mod,
    parameters_multiply,
)
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.server import LegacyContext, SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)
from numpy.typing import NDArray

from cloister_simulations.engines import hushed
from cloister_simulations.grid import InProcessGrid

Vector = NDArray[np.float32]
CLIPPING, TARGET, MODULUS, MAX_WEIGHT = 8.0, 1 << 22, 1 << 32, 1000.0
"""Its defaults."""


def mask(update: Vector, neighbours: int, sample: int = 3) -> tuple[float, int]:
    """CPU seconds to mask an update, and bytes on the wire: what ``_collect_masked_vectors`` does, step by step.

    A neighbour costs what each other costs, so ``sample`` of them are timed and scaled up.
    """
    private, public = generate_key_pairs()
    own, peer = private_key_to_bytes(private), public_key_to_bytes(public)
    began = time.process_time()
    parts = quantize(parameters_multiply([update], 0.5), CLIPPING, TARGET)
    parts = factor_combine(TARGET // 2, parts)
    shapes = get_parameters_shape(parts)
    parts = parameters_addition(parts, pseudo_rand_gen(os.urandom(32), MODULUS, shapes))
    once = time.process_time() - began
    began = time.process_time()
    for _ in range(sample):
        shared = generate_shared_key(bytes_to_private_key(own), bytes_to_public_key(peer))
        parts = parameters_addition(parts, pseudo_rand_gen(shared, MODULUS, shapes))
    each = (time.process_time() - began) / sample
    began = time.process_time()
    parts = parameters_mod(parts, MODULUS)
    packed = [ndarray_to_bytes(part) for part in parts]
    once += time.process_time() - began
    return once + neighbours * each, sum(map(len, packed))


def secure_round(updates: Sequence[Vector], rows: Sequence[int]) -> tuple[Vector, float]:
    """The weighted mean by one SecAgg+ round, and its wall seconds."""
    grid, strategy = _hospitals(updates, rows), FedAvg(min_fit_clients=len(updates), min_available_clients=len(updates))
    manager = SimpleClientManager()
    for node in grid.get_node_ids():
        manager.register(GridClientProxy(node, grid, 1))
    context = LegacyContext(Context(1, 1, {}, RecordDict(), {}), strategy=strategy, client_manager=manager)
    context.state.config_records["config"] = ConfigRecord({"current_round": 1})
    start = ndarrays_to_parameters([np.zeros_like(updates[0])])
    context.state.array_records["parameters"] = compat.parameters_to_arrayrecord(start, True)
    with hushed("flwr", logging.CRITICAL):
        began = time.perf_counter()
        SecAggPlusWorkflow(1.0, 0.6)(grid, context)
        seconds = time.perf_counter() - began
    (mean,) = context.state.array_records["parameters"].to_numpy_ndarrays()
    return mean, seconds


def plain_round(updates: Sequence[Vector], rows: Sequence[int]) -> tuple[Vector, float]:
    """The same by its FedAvg alone."""
    grid = _hospitals(updates, rows)
    began = time.perf_counter()
    results = [
        (GridClientProxy(node, grid, 1), compat.recorddict_to_fitres(_learned(updates, rows, node), True))
        for node in grid.get_node_ids()
    ]
    with hushed("flwr", logging.CRITICAL):
        parameters, _ = FedAvg().aggregate_fit(1, list(results), [])
    seconds = time.perf_counter() - began
    assert parameters
    (mean,) = compat.parameters_to_arrayrecord(parameters, True).to_numpy_ndarrays()
    return mean, seconds


def _hospitals(updates: Sequence[Vector], rows: Sequence[int]) -> InProcessGrid:
    """Each node hands over its update, through SecAgg+'s client mod."""
    app = ClientApp(mods=[_own_copy, secaggplus_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(_learned(updates, rows, context.node_id), reply_to=message)

    return InProcessGrid(app, [f"hospital-{at}" for at in range(len(updates))])


def _own_copy(message: Message, context: Context, work: ClientAppCallable) -> Message:
    """Nodes share one content here, and the mod takes entries out of it."""
    content = message.content.items()
    message.content = RecordDict(
        {name: ConfigRecord(dict(part)) if isinstance(part, ConfigRecord) else part for name, part in content}
    )
    return work(message, context)


def _learned(updates: Sequence[Vector], rows: Sequence[int], node: int) -> RecordDict:
    fitted = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([updates[node - 1]]), rows[node - 1], {})
    return compat.fitres_to_recorddict(fitted, True)
