"""cloister_shared.wire: what is sent is what is read, and anything else is refused without being run."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from pydantic import ValidationError

from cloister_shared.errors import ReplyRejected, TicketRefused
from cloister_shared.parcel import CHUNK, Delivered, chunk_name, cut
from cloister_shared.wire import (
    Reply,
    ReplyHeader,
    Ticket,
    TicketHeader,
    chunks_of,
    digest_of,
    pack,
    pack_vectors,
    unpack_reply,
    unpack_ticket,
)

ASK = TicketHeader(run="study-1f", plan="ab" * 32, round=3, site="st-marys", normalisation=((0.5, 2.0), (1.0, 1.0)))
ANSWER = ReplyHeader(
    run="study-1f",
    round=3,
    site="st-marys",
    layout="cd" * 8,
    rows=412,
    metrics={"loss": 0.25, "auroc": None},
    estimates={"final": {"auroc": (0.9, 0.85, None)}},
)
MODEL = {"model": np.array([1.0, -2.5, 3e-8], dtype=np.float32)}

vector = arrays_of.arrays(np.float32, st.integers(0, 30), elements=st.floats(width=32))
vectors = st.dictionaries(st.text("abcdefgh_", min_size=1, max_size=8), vector, max_size=3)


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(
        a[name].tobytes() == b[name].tobytes() and a[name].shape == b[name].shape for name in a
    )


@settings(deadline=None)
@given(vectors)
def test_what_is_packed_is_unpacked(sent):
    """NaN too: whether a number may be used is for the receiver to say."""
    ticket = unpack_ticket(pack(ASK, pack_vectors(sent)))
    assert ticket.header == ASK
    assert same(ticket.vectors, sent)
    reply = unpack_reply(pack(ANSWER, pack_vectors(sent)))
    assert reply.header == ANSWER
    assert same(reply.vectors, sent)


def test_bytes_on_the_wire_are_little_endian_float32():
    """A golden for whoever writes the other side in another language."""
    content = pack(ASK, pack_vectors(MODEL))
    array = content.array_records["vectors"]["model"]
    assert (array.dtype, array.shape, array.stype) == ("float32", (3,), "cloister.float32.le")
    assert (
        array.data == bytes.fromhex("0000803f000020c0de17f032")
        or array.data == np.array([1, -2.5, 3e-8], "<f4").tobytes()
    )
    assert json.loads(str(content.config_records["header"]["json"])) == {
        "run": "study-1f",
        "plan": "ab" * 32,
        "round": 3,
        "site": "st-marys",
        "normalisation": [[0.5, 2.0], [1.0, 1.0]],
        "cohort": [],
    }


def test_received_vectors_cannot_be_written_to():
    """One message may be in many hands."""
    received = unpack_ticket(pack(ASK, pack_vectors(MODEL))).vectors["model"]
    with pytest.raises(ValueError, match="read-only"):
        received[0] = 0


@pytest.mark.parametrize(
    "other", [np.zeros(3), np.zeros(3, np.float16), np.zeros(3, np.int32), np.zeros((3, 1), np.float32)]
)
def test_only_flat_float32_vectors_are_sent(other):
    with pytest.raises(TypeError, match="only flat vectors of float32 or of octets travel"):
        pack_vectors({"model": other})


def array(dtype="float32", shape=(2,), stype="cloister.float32.le", data=bytes(8)) -> Array:
    return Array(dtype=dtype, shape=shape, stype=stype, data=data)


HEADER = ConfigRecord({"json": ASK.model_dump_json()})
BAD_CONTENT = {
    "nothing": RecordDict(),
    "no vectors": RecordDict({"header": HEADER}),
    "no header": RecordDict({"vectors": ArrayRecord()}),
    "a part too many": RecordDict({"header": HEADER, "vectors": ArrayRecord(), "rows": MetricRecord({"n": 1})}),
    "header of another kind": RecordDict({"header": MetricRecord({"json": 1}), "vectors": ArrayRecord()}),
    "vectors of another kind": RecordDict({"header": HEADER, "vectors": ConfigRecord({})}),
    "header with a second key": RecordDict(
        {"header": ConfigRecord({"json": ASK.model_dump_json(), "x": 1}), "vectors": ArrayRecord()}
    ),
    "header that is no text": RecordDict({"header": ConfigRecord({"json": b"{}"}), "vectors": ArrayRecord()}),
}
BAD_VECTORS = {
    "float64": array("float64", (1,)),
    "an object": array(stype="pickle", data=pickle.dumps([0.0])),
    "another encoding of as many bytes": array(stype="cloister.float32.be"),
    "numpy's own format": Array(np.zeros(2, np.float32)),
    "two dimensions": array(shape=(1, 2)),
    "no dimension": array(shape=(), data=bytes(4)),
    "bytes missing": array(data=bytes(7)),
    "bytes too many": array(data=bytes(12)),
    "a negative length": array(shape=(-2,)),
}
BAD_HEADERS = {
    "not JSON": "{",
    "a list": "[]",
    "an unknown key": ASK.model_dump_json()[:-1] + ', "debug": true}',
    "no run": json.dumps({k: v for k, v in ASK.model_dump().items() if k != "run"}),
    "a path for a run": json.dumps({**ASK.model_dump(), "run": "../../etc/passwd"}),
    "an empty run": json.dumps({**ASK.model_dump(), "run": ""}),
    "a line end after the run": json.dumps({**ASK.model_dump(), "run": "run\n"}),
    "a long run": json.dumps({**ASK.model_dump(), "run": "r" * 65}),
    "a negative round": json.dumps({**ASK.model_dump(), "round": -1}),
    "half a round": json.dumps({**ASK.model_dump(), "round": 1.5}),
    "text for a round": json.dumps({**ASK.model_dump(), "round": "1"}),
    "true for a round": json.dumps({**ASK.model_dump(), "round": True}),
    "NaN": json.dumps({**ASK.model_dump(), "normalisation": [[float("nan"), 1.0]]}),
    "infinity": json.dumps({**ASK.model_dump(), "normalisation": [[0.0, float("inf")]]}),
    "a constant alone": json.dumps({**ASK.model_dump(), "normalisation": [[0.0]]}),
}


@pytest.mark.parametrize("content", BAD_CONTENT.values(), ids=BAD_CONTENT)
def test_other_content_is_refused(content):
    with pytest.raises(TicketRefused, match=r"^The ticket cannot be read: .+ Run the same release"):
        unpack_ticket(content)
    with pytest.raises(ReplyRejected, match=r"^the reply cannot be read: .+"):
        unpack_reply(content)


@pytest.mark.parametrize("bad", BAD_VECTORS.values(), ids=BAD_VECTORS)
def test_other_vectors_are_refused(bad):
    with pytest.raises(TicketRefused, match="The ticket cannot be read: vector model"):
        unpack_ticket(pack(ASK, ArrayRecord({"model": bad})))
    with pytest.raises(ReplyRejected, match="the reply cannot be read: vector model"):
        unpack_reply(pack(ANSWER, ArrayRecord({"model": bad})))


@pytest.mark.parametrize("text", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_other_headers_are_refused(text):
    content = RecordDict({"vectors": ArrayRecord(), "header": ConfigRecord({"json": text})})
    with pytest.raises(TicketRefused, match="The ticket cannot be read: ") as refused:
        unpack_ticket(content)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": -1},
        {"rows": 1.5},
        {"metrics": {"loss": float("nan")}},
        {"metrics": {"loss": "low"}},
        {"estimates": {"final": {"auroc": [0.9, 0.8]}}},
        {"patients": [1, 2, 3]},
        {"run": "a/b"},
    ],
)
def test_other_replies_are_rejected(changes):
    text = json.dumps({**ANSWER.model_dump(), **changes})
    with pytest.raises(ReplyRejected):
        unpack_reply(RecordDict({"vectors": ArrayRecord(), "header": ConfigRecord({"json": text})}))


def test_a_ticket_is_no_reply_and_the_other_way_round():
    with pytest.raises(ReplyRejected):
        unpack_reply(pack(ASK, pack_vectors(MODEL)))
    with pytest.raises(TicketRefused):
        unpack_ticket(pack(ANSWER, pack_vectors(MODEL)))


def test_headers_are_frozen_and_strict():
    with pytest.raises(ValidationError):
        ASK.round = 4  # type: ignore[misc]
    with pytest.raises(ValidationError):
        TicketHeader(run="r", plan="p", round="1", site="s")  # type: ignore[arg-type]


# --- the digest of a ticket --------------------------------------------------------------------------------
def test_a_ticket_has_the_same_digest_on_both_sides():
    sent = Ticket(ASK, {"model": MODEL["model"], "control": np.zeros(3, np.float32)})
    assert unpack_ticket(pack(sent.header, pack_vectors(dict(reversed(sent.vectors.items()))))).digest == sent.digest
    assert len(sent.digest) == 64


def test_any_change_changes_the_digest():
    tickets = [Ticket(ASK, MODEL), Ticket(ASK), Ticket(ASK, {"control": MODEL["model"]})]
    for key, value in {"run": "r", "plan": "p", "round": 4, "site": "s", "normalisation": None}.items():
        tickets.append(Ticket(TicketHeader(**{**ASK.model_dump(), key: value}), MODEL))
    for at in range(3):
        for changed in (np.nextafter(MODEL["model"][at], np.float32(9)), -MODEL["model"][at]):
            vector = MODEL["model"].copy()
            vector[at] = changed
            tickets.append(Ticket(ASK, {"model": vector}))
    tickets += [Ticket(ASK, {**MODEL, "control": MODEL["model"]}), Ticket(ASK, {"model": MODEL["model"][:2]})]
    assert len({ticket.digest for ticket in tickets}) == len(tickets)


def test_no_two_tickets_share_a_digest():
    """One vector whose bytes hold another's name, against two vectors."""
    name = np.frombuffer(b"bcd\0", dtype="<f4")
    first, second = np.ones(1, np.float32), np.zeros(1, np.float32)
    one = Ticket(ASK, {"a": np.concatenate([first, name, second])})
    two = Ticket(ASK, {"a": first, "bcd": second})
    assert one.digest != two.digest


def test_a_reply_needs_no_vectors():
    assert unpack_reply(pack(ANSWER, pack_vectors({}))) == Reply(ANSWER)


def test_a_large_vector_has_the_same_digest_whoever_hashes_it():
    vectors = {"update": np.random.default_rng(0).integers(0, 256, 2**23 + 5, np.uint8), "none": np.zeros(0, np.uint8)}
    with ThreadPoolExecutor(3) as pool:
        assert chunks_of(vectors, pool.map) == chunks_of(vectors)


@pytest.mark.parametrize("size", [1, CHUNK, CHUNK + 1])
def test_what_was_delivered_in_named_chunks_is_not_hashed_again(size, monkeypatch):
    vector = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    before = digest_of({"update": vector})
    chunks = [(chunk_name(chunk), len(chunk)) for chunk in cut(vector.data)]
    content = RecordDict({"vectors": ArrayRecord(), "header": ConfigRecord({"json": ANSWER.model_dump_json()})})
    content["vectors"]["update"] = Delivered("uint8", "cloister.octets", vector.data, chunks)
    reply = unpack_reply(content)
    monkeypatch.setattr("cloister_shared.wire.chunk_name", None)
    assert digest_of(reply.octets, reply.chunks) == before


def test_what_was_cut_otherwise_is_hashed():
    vector = np.arange(8, dtype=np.float32)
    chunks = [(chunk_name(memoryview(vector.tobytes())[at : at + 16]), 16) for at in (0, 16)]
    content = pack(ASK, ArrayRecord())
    content["vectors"]["a"] = Delivered("float32", "cloister.float32.le", vector.tobytes(), chunks)
    ticket = unpack_ticket(content)
    assert not ticket.chunks
    assert ticket.digest == Ticket(ASK, {"a": vector}).digest


@pytest.mark.parametrize("at", [0, CHUNK - 1, CHUNK, 2**23 + 4])
def test_every_octet_of_a_large_vector_is_in_its_digest(at):
    vector = np.zeros(2**23 + 5, np.uint8)
    before = digest_of({"update": vector})
    vector[at] = 1
    assert digest_of({"update": vector}) != before


def test_vectors_that_run_together_into_the_same_octets_have_other_digests():
    whole = np.zeros(CHUNK + 8, np.uint8)
    parts = [{"a": whole}, {"a": whole[:-4], "b": whole[-4:]}, {"a": whole[:CHUNK], "b": whole[CHUNK:]}]
    assert len({digest_of(part) for part in parts}) == 3
