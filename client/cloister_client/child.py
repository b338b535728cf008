"""The training process of one study: its own program, begun by the agent, without a network.

It opens the study that lies approved on disk, once, and answers the agent's messages with the hospital's own
``client_app``. What a message may hold is decided by ``objects`` and ``wire``: plain values. It ends with the agent.
"""

from __future__ import annotations

import logging
import os
import select
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cloister_client.channel import receive, send
from cloister_shared import memory
from cloister_shared.console import extras_named, one_core
from cloister_shared.errors import CloisterError, ConsentRefused

if TYPE_CHECKING:
    from flwr.app import Message

    from cloister_client.site import Site
    from cloister_shared.carried import Octets

log = logging.getLogger("cloister.child")

OUT_OF_MEMORY = 12
"""Exit code, where not even a message could be taken in."""


def main(end: int, folder: Path, digest: str, open_site: Callable[[Path, str], Site] | None = None) -> None:
    """Serve the study with this plan's ``digest`` at the hospital in ``folder``, over the file descriptor ``end``.

    ``open_site`` opens it in another way; simulations alone pass it.
    """
    threading.Thread(target=_leave_with_agent, args=(end,), daemon=True).start()
    one_core()
    memory.keep()
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s {digest[:12]} %(message)s", datefmt="%Y-%m-%d %H:%M:%S"
    )
    from cloister_client.app import client_app
    from cloister_client.opt_outs import stamp
    from cloister_client.sandbox import confine, out_of_memory
    from cloister_client.site_file import read_site

    policy = read_site(folder / "site.yaml").policy
    try:
        confine(policy.memory_gb, network=policy.sandbox == "off")
    except ConsentRefused as refusal:
        send(end, "refused", why=str(refusal))
        return
    if policy.sandbox == "off":
        log.warning("The policy in site.yaml says sandbox: off, so training here is not kept from the network.")
    send(end, "ready")
    opened = _once(extras_named()(lambda: (open_site or approved_site)(folder, digest)), lambda: stamp(folder))
    try:
        opened()  # before the first message, which then finds data and model in place
    except CloisterError as refusal:
        log.warning("%s", refusal)  # and told to whoever asks
    except Exception:
        log.exception("the study could not be opened; it is tried again when a message comes")
    app = client_app(lambda _: opened())
    try:
        while True:
            _serve(end, app)
    except MemoryError as fault:
        log.error("%s", out_of_memory(fault))
        raise SystemExit(OUT_OF_MEMORY) from None
    except (EOFError, BrokenPipeError):
        return  # the agent is gone


def _leave_with_agent(end: int) -> None:
    """End at once when the agent is gone: what it asked for is asked again, and whatever is durable stays."""
    waiting = select.poll()
    waiting.register(end, 0)  # nothing but the other end's closing
    waiting.poll()
    os._exit(0)


def _once(work: Callable[[], Site], stamp: Callable[[], object]) -> Callable[[], Site]:
    """What ``work`` made, from the first time it succeeds, and anew whenever ``stamp`` is another."""
    made: list[tuple[object, Site]] = []

    def opened() -> Site:
        now = stamp()
        if made and made[0][0] != now:
            log.info("The list of patients who opted out is another one: the records are read anew.")
            made.pop()[1].close()
        if not made:
            made.append((now, work()))
        return made[0][1]

    return opened


def approved_site(folder: Path, digest: str, noise_seed: int | None = None) -> Site:
    """The hospital in the study as its people approved it. ``noise_seed`` voids privacy; simulations alone pass it."""
    from cloister_client.approvals import Approvals
    from cloister_client.connectors.connector import open_records
    from cloister_client.dataset import load_dataset
    from cloister_client.lineage import Lineage
    from cloister_client.lineage_book import LineageBook
    from cloister_client.offers import study_of
    from cloister_client.site import Site

    agent = folder / "agent"
    quote = Approvals(agent).quote(digest)  # and with it that the study is approved, once more
    study, connector = study_of(agent, digest), open_records(folder / "site.yaml")
    dataset = load_dataset(connector, study.plan)
    return Site(
        study.plan,
        replace(dataset, ids=None),
        study.folder,
        ledger=folder / "ledger.sqlite",
        population=connector.site.population,
        approved=quote,
        identity=agent / "identity.key",
        lineage=Lineage(LineageBook(folder), study.plan, dataset),
        noise_seed=noise_seed,
    )


def _serve(end: int, app: Callable[..., object]) -> None:
    """Answer the next message: with an error, or with a header and arrays, which the agent packs."""
    from cloister_shared.parcel import cut
    from cloister_shared.wire import opened

    objects: dict[str, Octets] = {}
    while (frame := receive(end)).kind != "answer":
        if frame.kind == "message":
            objects.clear()
        else:
            objects[str(frame.said["name"])] = frame.octets
    reply = _answer(str(frame.said["root"]), objects, app)
    objects.clear()
    if isinstance(reply, tuple):
        return send(end, "error", reply[1].encode(), code=reply[0])
    header, arrays = opened(reply.content)
    said = [(name, array.dtype, array.stype, len(array.data)) for name, array in arrays.items()]
    send(end, "reply", header.encode(), arrays=said)
    for array in arrays.values():
        for chunk in cut(array.data):
            send(end, "chunk", chunk)


def _answer(root: str, objects: dict[str, Octets], app: Callable[..., object]) -> Message | tuple[int, str]:
    """The reply, or why there is none: a code and a reason."""
    from flwr.app import Context, Message, RecordDict

    from cloister_client.objects import inflated
    from cloister_client.sandbox import out_of_memory
    from cloister_shared.wire import FAILED, REFUSED

    try:
        asked = inflated(root, objects)
        objects.clear()  # the message holds what it needs of them
        node = asked.metadata.dst_node_id
        reply = app(asked, Context(asked.metadata.run_id, node, {}, RecordDict(), {}))
        assert isinstance(reply, Message)
        return (reply.error.code, reply.error.reason or "") if reply.has_error() else reply
    except CloisterError as refusal:
        log.warning("refused: %s", refusal)
        return REFUSED, refusal.abroad or str(refusal)
    except Exception as fault:  # also Flower's, of a kind of message that nobody here answers
        log.exception("the message could not be answered")
        return FAILED, out_of_memory(fault) or f"{type(fault).__name__} at the hospital"


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
