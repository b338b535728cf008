"""Flower's own SecAgg+, for comparison: its workflow, client mod and arithmetic as they ship, without sockets."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import flwr.compat.common.recorddict_compat as compat
import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
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
from flwr.serverapp import Grid
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

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
    grid, strategy = _Hospitals(updates, rows), FedAvg(min_fit_clients=len(updates), min_available_clients=len(updates))
    manager = SimpleClientManager()
    for node in grid.get_node_ids():
        manager.register(GridClientProxy(node, grid, 1))
    context = LegacyContext(Context(1, 1, {}, RecordDict(), {}), strategy=strategy, client_manager=manager)
    context.state.config_records["config"] = ConfigRecord({"current_round": 1})
    start = ndarrays_to_parameters([np.zeros_like(updates[0])])
    context.state.array_records["parameters"] = compat.parameters_to_arrayrecord(start, True)
    with _hushed():
        began = time.perf_counter()
        SecAggPlusWorkflow(1.0, 0.6)(grid, context)
        seconds = time.perf_counter() - began
    (mean,) = context.state.array_records["parameters"].to_numpy_ndarrays()
    return mean, seconds


def plain_round(updates: Sequence[Vector], rows: Sequence[int]) -> tuple[Vector, float]:
    """The same by its FedAvg alone."""
    grid = _Hospitals(updates, rows)
    began = time.perf_counter()
    results = [
        (GridClientProxy(node, grid, 1), compat.recorddict_to_fitres(grid.learned(node), True))
        for node in grid.get_node_ids()
    ]
    with _hushed():
        parameters, _ = FedAvg().aggregate_fit(1, list(results), [])
    seconds = time.perf_counter() - began
    assert parameters
    (mean,) = compat.parameters_to_arrayrecord(parameters, True).to_numpy_ndarrays()
    return mean, seconds


class _Hospitals(Grid):
    """Each node hands over its update, through SecAgg+'s client mod."""

    def __init__(self, updates: Sequence[Vector], rows: Sequence[int]) -> None:
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        self._updates, self._rows, self._sent = updates, rows, 0
        self._contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in range(1, len(updates) + 1)}

    def learned(self, node: int) -> RecordDict:
        parameters = ndarrays_to_parameters([self._updates[node - 1]])
        fitted = FitRes(Status(Code.OK, ""), parameters, self._rows[node - 1], {})
        return compat.fitres_to_recorddict(fitted, True)

    def get_node_ids(self) -> list[int]:
        return list(self._contexts)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies: list[Message] = []
        for message in messages:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = f"message-{self._sent}"
            context = self._contexts[message.metadata.dst_node_id]
            # Its nodes share one content here, and the mod takes entries out of it.
            content = message.content.items()
            message.content = RecordDict(
                {name: ConfigRecord(dict(part)) if isinstance(part, ConfigRecord) else part for name, part in content}
            )
            replies.append(secaggplus_mod(message, context, self._train))
        return replies

    def _train(self, message: Message, context: Context) -> Message:
        return Message(self.learned(message.metadata.dst_node_id), reply_to=message)

    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        return Run.create_empty(1)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        raise NotImplementedError


@contextmanager
def _hushed() -> Iterator[None]:
    """Without its running commentary."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
