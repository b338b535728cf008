"""The only codec between our values and Flower's records.

A ticket goes to a hospital, a reply comes back. Each is a header (one JSON string) and named vectors: float32
(raw little-endian bytes, read in place), or octets, which is what a masked vector is to everybody. Nothing here
accepts a patient's row, and nothing received is ever unpickled, imported or run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from cloister_shared.envelope import Identity, Roster, verify
from cloister_shared.errors import EnvelopeRefused, ReplyRejected, TicketRefused
from cloister_shared.parcel import Delivered, Each, chunk_name, cut

Vector = NDArray[np.float32]
Vectors = dict[str, Vector]
Octets = dict[str, NDArray[np.uint8]]
Chunks = dict[str, tuple[str, ...]]
"""Of each vector the names of the chunks that it travels in, in order."""

RunId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9\-]{1,64}$")]
"""Names files at the hospital, so it may hold no path."""

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256, in hex."""

REFUSED, FAILED = 1001, 1002
"""Flower error codes of a reply that holds no work: the hospital said no, or something broke there."""

_ENCODINGS = {"float32": ("cloister.float32.le", np.dtype("<f4")), "uint8": ("cloister.octets", np.dtype("u1"))}
_KINDS = {np.dtype(kind): kind for kind in _ENCODINGS}


class _Header(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class TicketHeader(_Header):
    """What is asked of whom. ``plan`` is the digest of the plan that the hospital must have approved."""

    run: RunId
    plan: str
    round: int = Field(ge=0)
    site: str
    normalisation: tuple[Annotated[tuple[float, ...], Field(min_length=2)], ...] | None = None
    """Centre and scale of each number feature, where they come from federated statistics; what else ``combat`` has."""
    cohort: tuple[str, ...] = ()
    """For a secure sum: each hospital's signed ``Advert``, sorted by hospital."""


class Advert(_Header):
    """A hospital's key for one run, which it signs with its long-term key."""

    run: RunId
    plan: str
    site: str
    key: Digest
    """X25519, in hex."""
    min_cohort: int = Field(ge=2)
    """Hospitals that must be in a sum before this one helps to open it."""


class Statement(_Header):
    """What a hospital signs of its masked reply: the terms that it took part under, and every byte of it."""

    transcript: Digest
    site: str
    masked: str
    """``digest_of`` its octets."""


Said = TypeVar("Said", Advert, Statement)


class UnmaskHeader(_Header):
    """Who is in a round's sum and who is not, with the statements of those who are."""

    run: RunId
    round: int = Field(ge=0)
    site: str
    transcript: Digest
    active: tuple[str, ...]
    dropped: tuple[str, ...]
    statements: tuple[str, ...]
    """Signed; in the order of ``active``."""


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
    signed: str = ""
    """An envelope: the ``Advert`` asked for, or the ``Statement`` of a masked reply."""


@dataclass(frozen=True)
class Ticket:
    """One coordinator's request to one hospital."""

    header: TicketHeader
    vectors: Vectors = field(default_factory=Vectors)
    chunks: Chunks = field(default_factory=Chunks)
    """Of vectors whose chunks have been hashed at this place."""

    @property
    def digest(self) -> str:
        """SHA-256 over header and vectors: equal digests ask for the same work."""
        return self._digest(self.header.model_dump_json())

    @property
    def transcript(self) -> str:
        """The same without the addressee: equal for all hospitals that were asked under the same terms."""
        return self._digest("transcript" + self.header.model_dump_json(exclude={"site"}))

    def _digest(self, said: str) -> str:
        return hashlib.sha256(f"{said}{self._vectors}".encode()).hexdigest()

    @cached_property
    def _vectors(self) -> str:
        return digest_of(self.vectors, self.chunks)


@dataclass(frozen=True)
class Reply:
    """One hospital's answer."""

    header: ReplyHeader
    vectors: Vectors = field(default_factory=Vectors)
    octets: Octets = field(default_factory=Octets)
    chunks: Chunks = field(default_factory=Chunks)


def chunks_of(vectors: Mapping[str, NDArray[Any]], each: Each = map) -> Chunks:
    """The names of the chunks that each vector travels in. ``each`` is ``map``, or what hashes several at once."""
    octets = {name: np.ascontiguousarray(vector).view(np.uint8).data for name, vector in vectors.items()}
    return {name: tuple(each(chunk_name, cut(octets[name]))) for name in octets}


def digest_of(vectors: Mapping[str, NDArray[Any]], known: Chunks | None = None) -> str:
    """SHA-256 over named vectors, in the order of their names: of each, over the names of its chunks.

    ``known`` are those of vectors that were delivered in them, so that nothing is hashed twice at one place.
    """
    known, hashed = known or {}, hashlib.sha256()
    for name in sorted(vectors):
        chunks = known.get(name) or chunks_of({name: vectors[name]})[name]
        # The length stands before the names, so that no other vectors run together into the same ones.
        hashed.update(json.dumps([name, vectors[name].size, *chunks]).encode())
    return hashed.hexdigest()


def pack_vectors(*named: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """Vectors as Flower arrays. One record may stand in many messages: nobody can change its bytes."""
    record = ArrayRecord()  # its constructor would make every array a second time
    for vectors in named:
        for name, vector in vectors.items():
            record[name] = _array(vector)
    return record


def pack(header: TicketHeader | UnmaskHeader | ReplyHeader, vectors: ArrayRecord) -> RecordDict:
    """A ticket's or reply's content."""
    return RecordDict({"vectors": vectors, "header": ConfigRecord({"json": header.model_dump_json()})})


def sign(identity: Identity, said: Advert | Statement) -> str:
    """What a hospital says, in an envelope that names its purpose."""
    return identity.sign(type(said).__name__.lower(), said.model_dump_json().encode())


def read_signed(envelope: str, kind: type[Said], roster: Roster) -> Said:
    """What a pinned hospital signed, and said of itself.

    Raises:
        EnvelopeRefused: another signed it, or it is of another kind.
    """
    purpose = kind.__name__.lower()
    site, payload = verify(envelope, purpose, roster)
    try:
        said = kind.model_validate_json(payload)
    except ValidationError as error:
        raise EnvelopeRefused(f"The {purpose} of {site} cannot be read: {_reason(error)}.") from None
    if said.site != site:
        raise EnvelopeRefused(f"{site} signed a {purpose} in another hospital's name.")
    return said


def unpack_ticket(content: RecordDict) -> Ticket:
    """A ticket as the hospital reads it.

    Raises:
        TicketRefused: something is missing, of another kind, or not known here.
    """
    header, vectors = _ticket(content, TicketHeader)
    return Ticket(header, vectors, _delivered(content))


def unpack_unmask(content: RecordDict) -> UnmaskHeader:
    """A request for shares as the hospital reads it.

    Raises:
        TicketRefused: something is missing, of another kind, or not known here.
    """
    return _ticket(content, UnmaskHeader)[0]


def unpack_reply(content: RecordDict) -> Reply:
    """A reply as the coordinator reads it.

    Raises:
        ReplyRejected: something is missing, of another kind, or not known here.
    """
    try:
        header, vectors, octets = _unpack(content)
        return Reply(ReplyHeader.model_validate_json(header), vectors, octets, _delivered(content))
    except (KeyError, TypeError, ValueError) as error:
        raise ReplyRejected(f"the reply cannot be read: {_reason(error)}") from None


Kind = TypeVar("Kind", TicketHeader, UnmaskHeader)


def _ticket(content: RecordDict, kind: type[Kind]) -> tuple[Kind, Vectors]:
    try:
        header, vectors, octets = _unpack(content)
        if octets:
            raise TypeError("it holds octets")
        return kind.model_validate_json(header), vectors
    except (KeyError, TypeError, ValueError) as error:
        raise TicketRefused(
            f"The ticket cannot be read: {_reason(error)}.", mend="Run the same release of Cloister on both sides."
        ) from None


def _array(vector: NDArray[Any]) -> Array:
    kind = _KINDS.get(vector.dtype)
    if kind is None or vector.ndim != 1:
        raise TypeError("only flat vectors of float32 or of octets travel")
    encoding, order = _ENCODINGS[kind]
    return Array(dtype=kind, shape=vector.shape, stype=encoding, data=vector.astype(order, copy=False).tobytes())


def opened(content: RecordDict) -> tuple[str, ArrayRecord]:
    """The header's JSON and the arrays of a ticket or reply.

    Raises:
        KeyError, TypeError: it is neither.
    """
    if set(content) != {"vectors", "header"}:
        raise KeyError("it has other parts than header and vectors")
    header, vectors = content["header"], content["vectors"]
    # Not content.array_records: that view and the content refer to each other, so a large reply would linger.
    if not isinstance(header, ConfigRecord) or not isinstance(vectors, ArrayRecord):
        raise TypeError("its parts are of another kind")
    if set(header) != {"json"} or not isinstance(text := header["json"], str):
        raise KeyError("its header has other keys than json")
    return text, vectors


def _unpack(content: RecordDict) -> tuple[str, Vectors, Octets]:
    text, vectors = opened(content)
    read = {name: _vector(name, array) for name, array in vectors.items()}
    return (
        text,
        {name: vector for name, vector in read.items() if vector.dtype == np.float32},
        {name: vector for name, vector in read.items() if vector.dtype == np.uint8},
    )


def _delivered(content: RecordDict) -> Chunks:
    _, vectors = opened(content)
    return {name: array.chunks for name, array in vectors.items() if isinstance(array, Delivered) and array.chunks}


def _vector(name: str, array: Array) -> NDArray[Any]:
    encoding, order = _ENCODINGS.get(array.dtype, ("", np.dtype("u1")))
    if not encoding or array.stype != encoding:
        raise TypeError(f"vector {name} is {array.dtype} in {array.stype}, not float32 in {_ENCODINGS['float32'][0]}")
    if len(array.shape) != 1 or len(array.data) != order.itemsize * array.shape[0]:
        raise ValueError(f"vector {name} says shape {tuple(array.shape)} and holds {len(array.data)} bytes")
    return np.frombuffer(array.data, dtype=order)


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    return str(error.args[0]) if error.args else type(error).__name__
