"""A coordinator's messages as objects, without a coordinator."""

import time

import numpy as np
from flwr.app import RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata

from cloister_client.objects import deflated
from cloister_shared.parcel import Parcel
from cloister_shared.wire import TicketHeader, pack, pack_vectors


def asked(plan, site: str, kind: str = "train", number: int = 1, **vectors: np.ndarray) -> Parcel:
    """A coordinator's message as objects."""
    header = TicketHeader(run="run-1", plan=plan.digest, round=number, site=site)
    return message(pack(header, pack_vectors(vectors)), kind)


def message(content: RecordDict, kind: str = "train") -> Parcel:
    metadata = Metadata(
        run_id=7,
        message_id="",
        src_node_id=1,
        dst_node_id=99,
        reply_to_message_id="",
        group_id="1",
        created_at=time.time(),
        ttl=3600.0,
        message_type=kind,
    )
    made = make_message(metadata, content=content)
    return deflated(made, made)


def parts(parcel: Parcel) -> tuple:
    return parcel.message, parcel.root, parcel.objects.items()
