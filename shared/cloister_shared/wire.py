"""The only codec between our values and Flower's records.

A ticket goes to a hospital, a reply comes back. Each is a header (one JSON string) and named float32 vectors
(raw little-endian bytes, read in place). Nothing here accepts a patient's row, and nothing received is ever
unpickled, imported or run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from cloister_shared.errors import ReplyRejected, TicketRefused

Vector = NDArray[np.float32]
Vectors = dict[str, Vector]

RunId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9\-]{1,64}$")]
"""Names files at the hospital, so it may hold no path."""

_ENCODING = "cloister.float32.le"


class _Header(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class TicketHeader(_Header):
    """What is asked of whom. ``plan`` is the digest of the plan that the hospital must have approved."""

    run: RunId
    plan: str
    round: int = Field(ge=0)
    site: str
    normalisation: tuple[tuple[float, float], ...] | None = None
    """Centre and scale of each number feature, where they come from federated statistics."""


class ReplyHeader(_Header):
    """``layout`` names the order of the shared parameters; ``rows`` is the weight asked for."""

    run: RunId
    round: int = Field(ge=0)
    site: str
    layout: str = ""
    rows: int = Field(default=0, ge=0)
    metrics: dict[str, float | None] = Field(default_factory=dict[str, float | None])
    estimates: dict[str, dict[str, tuple[float | None, float | None, float | None]]] = Field(
        default_factory=dict[str, dict[str, tuple[float | None, float | None, float | None]]]
    )
    """Final metrics of each model: value and interval."""


@dataclass(frozen=True)
class Ticket:
    """One coordinator's request to one hospital."""

    header: TicketHeader
    vectors: Vectors = field(default_factory=Vectors)

    @property
    def digest(self) -> str:
        """SHA-256 over header and vectors: equal digests ask for the same work."""
        hashed = hashlib.sha256(self.header.model_dump_json().encode())
        for name in sorted(self.vectors):
            vector = np.ascontiguousarray(self.vectors[name])
            # The length stands before the bytes, so that no other vectors run together into the same ones.
            hashed.update(json.dumps([name, vector.size]).encode())
            hashed.update(vector.data)
        return hashed.hexdigest()


@dataclass(frozen=True)
class Reply:
    """One hospital's answer."""

    header: ReplyHeader
    vectors: Vectors = field(default_factory=Vectors)


def pack_vectors(vectors: Mapping[str, Vector]) -> ArrayRecord:
    """Float32 vectors as Flower arrays. One record may stand in many messages: nobody can change its bytes."""
    record = ArrayRecord()  # its constructor would make every array a second time
    for name, vector in vectors.items():
        record[name] = _array(vector)
    return record


def pack(header: TicketHeader | ReplyHeader, vectors: ArrayRecord) -> RecordDict:
    """A ticket's or reply's content."""
    return RecordDict({"vectors": vectors, "header": ConfigRecord({"json": header.model_dump_json()})})


def unpack_ticket(content: RecordDict) -> Ticket:
    """A ticket as the hospital reads it.

    Raises:
        TicketRefused: something is missing, of another kind, or not known here.
    """
    try:
        header, vectors = _unpack(content)
        return Ticket(TicketHeader.model_validate_json(header), vectors)
    except (KeyError, TypeError, ValueError) as error:
        raise TicketRefused(
            f"The ticket cannot be read: {_reason(error)}.", mend="Run the same release of Cloister on both sides."
        ) from None


def unpack_reply(content: RecordDict) -> Reply:
    """A reply as the coordinator reads it.

    Raises:
        ReplyRejected: something is missing, of another kind, or not known here.
    """
    try:
        header, vectors = _unpack(content)
        return Reply(ReplyHeader.model_validate_json(header), vectors)
    except (KeyError, TypeError, ValueError) as error:
        raise ReplyRejected(f"the reply cannot be read: {_reason(error)}") from None


def _array(vector: Vector) -> Array:
    if vector.dtype != np.float32 or vector.ndim != 1:
        raise TypeError("only flat float32 vectors travel")
    return Array(dtype="float32", shape=vector.shape, stype=_ENCODING, data=vector.astype("<f4", copy=False).tobytes())


def _unpack(content: RecordDict) -> tuple[str, Vectors]:
    if set(content) != {"vectors", "header"}:
        raise KeyError("it has other parts than header and vectors")
    header, vectors = content["header"], content["vectors"]
    # Not content.array_records: that view and the content refer to each other, so a large reply would linger.
    if not isinstance(header, ConfigRecord) or not isinstance(vectors, ArrayRecord):
        raise TypeError("its parts are of another kind")
    text = header.get("json")
    if set(header) != {"json"} or not isinstance(text, str):
        raise KeyError("its header has other keys than json")
    return text, {name: _vector(name, array) for name, array in vectors.items()}


def _vector(name: str, array: Array) -> Vector:
    if array.stype != _ENCODING or array.dtype != "float32":
        raise TypeError(f"vector {name} is {array.dtype} in {array.stype}, not float32 in {_ENCODING}")
    if len(array.shape) != 1 or len(array.data) != 4 * array.shape[0]:
        raise ValueError(f"vector {name} says shape {tuple(array.shape)} and holds {len(array.data)} bytes")
    return np.frombuffer(array.data, dtype="<f4")


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    return str(error.args[0]) if error.args else type(error).__name__
