"""The same attacks on Flower's SecAgg+, where they apply: its own client mod, workflow and functions, as it ships.

A hostile coordinator writes its own messages; a hostile hospital answers Flower's own workflow. Every figure here
is of made-up numbers.
"""

from __future__ import annotations

import base64
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any
from unittest.mock import patch

import flwr.compat.common.recorddict_compat as compat
import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitRes, Status, ndarray_to_bytes, ndarrays_to_parameters
from flwr.common.secure_aggregation import secaggplus_utils
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import factor_extract, parameters_mod
from flwr.common.secure_aggregation.quantization import dequantize
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key
from flwr.compat.common.parameter import bytes_to_ndarray
from flwr.server import LegacyContext, SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.supercore.primitives import asymmetric
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

NODES = tuple(range(1, 7))
VICTIM, CULPRIT = 3, 1
OTHERS = tuple(node for node in NODES if node != VICTIM)
CLIPPING, TARGET, MODULUS, MAX_WEIGHT = 8.0, 1 << 22, 1 << 32, 1000.0
"""The workflow's defaults. The clients take whatever the coordinator says."""

Said = dict[str, Any]
Tamper = Callable[[str, Said], Said]
"""Stage and reply to the reply that a hostile hospital gives instead."""


class Hospitals:
    """Six of Flower's clients, each with an update, and the one verb of its Grid that the workflow uses."""

    def __init__(self, *, threshold: int = 4, rows: int = 30, size: int = 200, spread: float = 0.05) -> None:
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        generator = np.random.default_rng(1)
        self.updates = {node: generator.normal(0, spread, size).astype(np.float32) for node in NODES}
        self.rows, self.threshold = dict.fromkeys(NODES, rows), threshold
        self.tamper: Tamper | None = None
        self.keys: dict[int, tuple[bytes, bytes]] = {}
        self.sealed: dict[int, dict[int, bytes]] = {}
        self.masked: dict[int, list[NDArray[Any]]] = {}
        self.clear: dict[int, list[object]] = {}
        """What came beside each masked update."""
        self.shares: dict[tuple[str, int], list[bytes]] = {}
        self._contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in NODES}

    # --- what a coordinator says -----------------------------------------------------------------------------
    def say(self, node: int, stage: str, terms: Mapping[str, Any]) -> Said:
        """One stage at one client, through the mod."""
        content = RecordDict({RECORD_KEY_CONFIGS: ConfigRecord({**terms, Key.STAGE: stage})})
        reply = self._answer(Message(content, node, "train"))
        if stage == "collect_masked_vectors":
            beside = {**reply.content.metric_records, **reply.content.config_records}
            self.clear[node] = [v for name, part in beside.items() if name != RECORD_KEY_CONFIGS for v in part.values()]
        return dict(reply.content.config_records[RECORD_KEY_CONFIGS])

    def set_up(self, **changes: Any) -> None:
        """Stage 0 at every client."""
        terms = {"sample_num": len(NODES), "share_num": len(NODES), "threshold": self.threshold}
        numbers = {"clipping_range": CLIPPING, "target_range": TARGET, "mod_range": MODULUS, "max_weight": MAX_WEIGHT}
        for node in NODES:
            said = self.say(node, "setup", {**terms, **numbers, **changes})
            self.keys[node] = said["pk1"], said["pk2"]

    def share(self, views: Mapping[int, Mapping[int, tuple[bytes, bytes]]] | None = None) -> None:
        """Stage 1: each client sees the keys of its view; of all clients, if there is none."""
        for node in views or NODES:
            view = views[node] if views else self.keys
            said = self.say(node, "share_keys", {str(peer): list(pair) for peer, pair in view.items()})
            self.sealed[node] = dict(zip(said["dsts"], said["ctxts"], strict=True))

    def collect(self, node: int, sealed: Mapping[int, bytes] | None = None) -> None:
        """Stage 2 at one client, with the shares that others dealt to it."""
        if sealed is None:
            sealed = {peer: found[node] for peer, found in self.sealed.items() if node in found}
        said = self.say(node, "collect_masked_vectors", {"srcs": list(sealed), "ctxts": list(sealed.values())})
        self.masked[node] = [bytes_to_ndarray(part) for part in said["masked_params"]]

    def ask(self, node: int, active: Sequence[int], dead: Sequence[int] = ()) -> None:
        """Stage 3 at one client: its shares of own masks of the active, and of the keys of the dead."""
        said = self.say(node, "unmask", {"active_nids": list(active), "dead_nids": list(dead)})
        kinds = ["own"] * len(active) + ["key"] * len(dead)
        for kind, owner, share in zip(kinds, said["nids"], said["shares"], strict=True):
            self.shares.setdefault((kind, owner), []).append(share)

    def collected(self, **changes: Any) -> Hospitals:
        """All clients, up to their masked updates."""
        self.set_up(**changes)
        self.share()
        for node in NODES:
            self.collect(node)
        return self

    # --- what it can make of it ------------------------------------------------------------------------------
    def seed(self, kind: str, owner: int) -> bytes:
        """An own mask's seed or a private key, of the shares at hand."""
        return combine_shares(self.shares[kind, owner][: self.threshold])

    def open(self) -> str:
        """Take the masks off the victim's update with the shares at hand."""
        pairs = {peer: _pair(self.seed("key", VICTIM), self.keys[peer][0]) for peer in OTHERS}
        return self.unmasked(self.seed("own", VICTIM), pairs)

    def unmasked(self, own: bytes, pairs: Mapping[int, bytes]) -> str:
        """Take these masks off the victim's update, and hold it against the true one."""
        shapes = [part.shape for part in self.masked[VICTIM]]
        bare = [part.astype(np.int64) for part in self.masked[VICTIM]]
        for key, sign in [(own, -1), *((key, -1 if peer < VICTIM else 1) for peer, key in pairs.items())]:
            masks = secaggplus_utils.pseudo_rand_gen(key, MODULUS, shapes)
            bare = [part + sign * mask for part, mask in zip(bare, masks, strict=True)]
        factor, vectors = factor_extract(parameters_mod(bare, MODULUS))
        found, truth = dequantize(vectors, CLIPPING, TARGET)[0] * (TARGET / factor), self.updates[VICTIM]
        assert np.abs(found - truth).max() < 0.05 * np.abs(truth).max(), "the attack's own arithmetic is wrong"
        return "recovered the update"

    # --- Flower's own coordinator ----------------------------------------------------------------------------
    def error(self) -> float | None:
        """How far the mean by Flower's workflow is from the true one, as a part of it; None without a mean."""
        grid: Any = self
        strategy, manager = FedAvg(min_fit_clients=len(NODES), min_available_clients=len(NODES)), SimpleClientManager()
        for node in NODES:
            manager.register(GridClientProxy(node, grid, 1))
        context = LegacyContext(Context(1, 1, {}, RecordDict(), {}), strategy=strategy, client_manager=manager)
        context.state.config_records["config"] = ConfigRecord({"current_round": 1})
        start = ndarrays_to_parameters([np.full_like(self.updates[1], np.nan)])
        context.state.array_records["parameters"] = compat.parameters_to_arrayrecord(start, True)
        with _hushed():
            SecAggPlusWorkflow(1.0, self.threshold / len(NODES))(grid, context)
        (mean,) = context.state.array_records["parameters"].to_numpy_ndarrays()
        truth = np.mean(list(self.updates.values()), axis=0)
        return None if np.isnan(mean).all() else float(np.linalg.norm(mean - truth) / np.linalg.norm(truth))

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> list[Any]:
        """Part of Flower's Grid."""
        replies: list[Any] = []
        for message in messages:
            # The workflow gives all clients one content, and the mod takes entries out of it.
            parts = {k: ConfigRecord(dict(v)) if isinstance(v, ConfigRecord) else v for k, v in message.content.items()}
            message.content = RecordDict(parts)
            replies.append(self._answer(message))
        return replies

    def _answer(self, message: Any) -> Any:
        node, stage = message.metadata.dst_node_id, message.content.config_records[RECORD_KEY_CONFIGS][Key.STAGE]
        message.metadata.__dict__["_message_id"] = f"{stage}-{node}"
        with _hushed():
            reply = secaggplus_mod(message, self._contexts[node], self._train)
        if self.tamper and node == CULPRIT:
            said = dict(reply.content.config_records[RECORD_KEY_CONFIGS])
            reply.content.config_records[RECORD_KEY_CONFIGS] = ConfigRecord(self.tamper(stage, said))
        return reply

    def _train(self, message: Any, context: Any) -> Any:
        parameters = ndarrays_to_parameters([self.updates[context.node_id]])
        fitted = FitRes(Status(Code.OK, ""), parameters, self.rows[context.node_id], {"auroc": 0.75})
        return Message(compat.fitres_to_recorddict(fitted, True), reply_to=message)


def _hushed() -> AbstractContextManager[object]:
    return patch.object(logging.getLogger("flwr"), "disabled", True)


def _pair(private: bytes, public: bytes) -> bytes:
    return generate_shared_key(asymmetric.bytes_to_private_key(private), asymmetric.bytes_to_public_key(public))


def _key_pair() -> tuple[bytes, bytes]:
    private, public = asymmetric.generate_key_pairs()
    return asymmetric.private_key_to_bytes(private), asymmetric.public_key_to_bytes(public)


def _refused(attempt: Callable[[], object], sentence: str) -> str:
    """The one refusal expected of Flower; anything else is raised."""
    try:
        attempt()
    except ValueError as refusal:
        if sentence not in str(refusal):
            raise
        return f"refused: {sentence}"
    return "accepted"


MEASURES: dict[str, Callable[[], str]] = {}
"""Attack, as ``suite`` names it, to what Flower made of it."""


def measure(*attacks: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Enter a measurement under the attacks that it answers."""

    def enter(made: Callable[[], str]) -> Callable[[], str]:
        MEASURES.update(dict.fromkeys(attacks, cache(made)))
        return made

    return enter


# --- a hostile coordinator -----------------------------------------------------------------------------------
@measure("key substitution", "sybils")
def _key_substitution() -> str:
    hospitals = Hospitals()
    hospitals.set_up()
    own = {peer: (_key_pair(), _key_pair()) for peer in OTHERS}
    shown = {peer: (one[1], two[1]) for peer, (one, two) in own.items()}
    first, second = hospitals.keys[VICTIM]
    hospitals.share({VICTIM: {**shown, VICTIM: (first, second)}})
    sealing = {peer: _pair(own[peer][1][0], second) for peer in OTHERS}
    split, join = secaggplus_utils.share_keys_plaintext_separate, secaggplus_utils.share_keys_plaintext_concat
    dealt = [split(decrypt(sealing[peer], hospitals.sealed[VICTIM][peer]))[2] for peer in OTHERS]
    forged = {peer: encrypt(sealing[peer], join(peer, VICTIM, b"x", b"x")) for peer in OTHERS}
    hospitals.collect(VICTIM, forged)
    pairs = {peer: _pair(own[peer][0][0], first) for peer in OTHERS}
    return hospitals.unmasked(combine_shares(dealt[: hospitals.threshold]), pairs)


@measure("same key twice")
def _same_key_twice() -> str:
    hospitals = Hospitals()
    hospitals.set_up()
    keys = {**hospitals.keys, CULPRIT: hospitals.keys[2]}
    return _refused(lambda: hospitals.share({VICTIM: keys}), "Some public keys are identical")


@measure("cohort too small")
def _small_cohort() -> str:
    hospitals = Hospitals(threshold=1)
    hospitals.set_up(share_num=1)
    hospitals.share({VICTIM: {VICTIM: hospitals.keys[VICTIM]}})
    hospitals.collect(VICTIM, {})
    hospitals.ask(VICTIM, [VICTIM])
    return f"{hospitals.unmasked(hospitals.seed('own', VICTIM), {})}, of a cohort of one"


@measure("split view")
def _split_view() -> str:
    hospitals = Hospitals(threshold=3)
    hospitals.set_up()
    fewer = {node: keys for node, keys in hospitals.keys.items() if node != VICTIM}
    hospitals.share({node: hospitals.keys if node in NODES[:3] else fewer for node in NODES})
    for node in NODES:
        unseen = (VICTIM,) if node in NODES[3:] else ()
        hospitals.collect(node, {p: s[node] for p, s in hospitals.sealed.items() if node in s and p not in unseen})
    for node in NODES[:3]:
        hospitals.ask(node, NODES[:3])
    return "accepted: the clients compare nothing"


@measure("tampered model")
def _model_of_its_own() -> str:
    hospitals = Hospitals()
    hospitals.updates[VICTIM] *= 50
    hospitals.collected()
    for node in OTHERS:
        hospitals.ask(node, NODES)
    return "accepted: the clients compare nothing"


@measure("tampered parameters")
def _other_parameters() -> str:
    Hospitals(threshold=1).collected(clipping_range=1e9, max_weight=1e9)
    return "accepted: range and weight of 1e9, threshold 1"


@measure("active and dropped")
def _active_and_dropped() -> str:
    hospitals = Hospitals().collected()
    for node in OTHERS:
        hospitals.ask(node, NODES, [VICTIM])
    return hospitals.open()


@measure("two halves")
def _two_halves() -> str:
    hospitals = Hospitals(threshold=3).collected()
    for node in NODES[:3]:
        hospitals.ask(node, NODES)
    for node in NODES[3:]:
        hospitals.ask(node, OTHERS, [VICTIM])
    return f"{hospitals.open()}: the coordinator says the threshold"


@measure("sum of one")
def _sum_of_one() -> str:
    hospitals = Hospitals(threshold=1).collected()
    hospitals.ask(VICTIM, [VICTIM], OTHERS)
    pairs = {peer: _pair(hospitals.seed("key", peer), hospitals.keys[VICTIM][0]) for peer in OTHERS}
    return hospitals.unmasked(hospitals.seed("own", VICTIM), pairs)


@measure("replay of a share")
def _asked_twice() -> str:
    hospitals = Hospitals().collected()
    hospitals.ask(2, NODES)
    return _refused(lambda: hospitals.ask(2, OTHERS, [VICTIM]), "expect setup stage")


@measure("replay of a round")
def _round_again() -> str:
    hospitals = Hospitals().collected()
    return _refused(lambda: hospitals.collect(VICTIM), "expect unmask stage")


@measure("rows by refusals")
def _in_clear() -> str:
    seen = Hospitals().collected().clear[VICTIM]
    assert {30, 0.75} <= set(seen), "row count and metric were sent"
    return "no attack needed: row counts and metrics travel in clear"


@measure("rows by rounding")
def _weights() -> str:
    small = Hospitals(rows=20, spread=1e-3, size=2000).error()
    large = Hospitals(rows=50_000, spread=1.0, size=2000).error()
    return f"no attack needed: with 20 rows the mean is off by {small:.1%}, with 50,000 by {large:.0%}"


@measure("guessed masks")
def _mask_seeds(draws: int = 20_000) -> str:
    seeds: list[int] = []
    with patch("numpy.random.RandomState", seeds.append):
        for _ in range(draws):
            key = base64.urlsafe_b64encode(os.urandom(32))  # as generate_shared_key gives them
            secaggplus_utils.pseudo_rand_gen(key, MODULUS, [])
    bits = int(np.bitwise_or.reduce(seeds) & ~np.bitwise_and.reduce(seeds)).bit_count()
    return f"2^{bits} seeds: no other bit varies"


# --- a hostile client ----------------------------------------------------------------------------------------
def _tampered(stage: str, change: Callable[[Said], Said]) -> str:
    hospitals = Hospitals()
    hospitals.tamper = lambda now, said: change(said) if now == stage else said
    try:
        error = hospitals.error()
    except Exception as fault:  # whichever its cryptography or numpy raises
        return f"the round breaks ({type(fault).__name__}), nobody is named"
    return "the round is lost" if error is None else f"accepted: the mean is off by {error:.1g} times its norm"


def _with_vector(change: Callable[[NDArray[Any]], NDArray[Any]]) -> str:
    def changed(said: Said) -> Said:
        factor, vector = said["masked_params"]
        return {**said, "masked_params": [factor, ndarray_to_bytes(change(bytes_to_ndarray(vector)))]}

    return _tampered("collect_masked_vectors", changed)


@measure("truncated update")
def _truncated() -> str:
    return _with_vector(lambda vector: vector[:-1])


@measure("reordered blocks")
def _reordered() -> str:
    return _with_vector(lambda vector: np.roll(vector, vector.size // 2))


@measure("garbage shares")
def _garbage_shares() -> str:
    return _tampered("share_keys", lambda said: {**said, "ctxts": [b"x" * len(sealed) for sealed in said["ctxts"]]})


@measure("wrong share")
def _wrong_shares() -> str:
    return _tampered("unmask", lambda s: {**s, "shares": [x[:4] + bytes(len(x) - 4) for x in s["shares"]]})
